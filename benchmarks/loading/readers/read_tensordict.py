"""tensordict: a ``MemoryMappedTensor`` of pre-cut windows.

``index_select`` of the mapped tensor with the numbers of a batch: one call that copies in C++, twice
as fast as ``tensordict[numbers]``, which copies by element. It is the loader, so there is nothing for
worker processes to do. The kernel cannot be advised: PyTorch maps the file itself. The file holds
nothing but the values, so that it is the same as the memmap readers'.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.loading.corpus import N_CHANNELS, WINDOW_SAMPLES
from benchmarks.loading.reader import Batch, Reader, Request
from benchmarks.loading.readers import read_memmap


def batches(request: Request) -> Iterator[Batch]:
    """Gather."""
    import torch
    from tensordict import MemoryMappedTensor

    shape = (len(request.starts), N_CHANNELS, WINDOW_SAMPLES)
    path = request.folder / read_memmap.WINDOWS
    windows = MemoryMappedTensor.from_filename(path, dtype=torch.float16, shape=torch.Size(shape))
    for row in request.numbers:
        numbers = torch.from_numpy(row)
        yield numbers, windows.index_select(0, numbers).float()


READERS = (
    Reader(
        name="tensordict",
        kind="no loader",
        settings="pre-cut windows in a mapped file, `MemoryMappedTensor.index_select`; no `DataLoader`",
        distribution="tensordict",
        libraries=("torch", "tensordict"),
        form="windows",
        prepare=read_memmap.prepare_windows,
        batches=batches,
        workers=(0,),
    ),
)
