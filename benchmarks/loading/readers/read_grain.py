"""grain: a ``MapDataset`` over a mapped file.

Its shuffle is global: an index cipher. The source is the mapped file with ``MADV_WILLNEED`` for each
window, as for the memmap readers; grain's own ArrayRecord files hand out bytes that have to be
parsed, window by window. Batching comes before threads, so that a thread works on a whole batch:
threads per window are slower by half, since each passes a lock. Few threads and a short buffer: the
defaults (16 threads, 500 batches ahead) would hold 1.6 GB here. Worker processes hand over float16, half
the bytes. The process that asks converts, with one thread of PyTorch's, as grain's threads are at work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from benchmarks.loading.corpus import BATCH_WINDOWS
from benchmarks.loading.reader import Batch, Item, Reader, Request, to_batch, to_batch_transposed
from benchmarks.loading.readers import read_memmap
from numpy.typing import NDArray

N_THREADS = 2
BATCHES_AHEAD = 4

Stored: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float16]]


@dataclass(slots=True)
class Source:
    """A mapped dataset, opened by each process for itself: mapped files cannot be pickled."""

    path: Path
    length: int
    starts: NDArray[np.int64] | None = None
    _dataset: Any = field(default=None, init=False)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Item:
        if self._dataset is None:
            mapped = read_memmap.Mapped(self.path)
            self._dataset = (
                read_memmap.Windows(mapped)
                if self.starts is None
                else read_memmap.Recordings(mapped, self.starts, is_advised=True)
            )
        item: Item = self._dataset[int(number)]
        return item


def stack(items: Sequence[Item]) -> Stored:
    """Stack windows as they are stored."""
    return np.array([number for number, _ in items]), np.stack([window for _, window in items])


def _batches(source: Source, request: Request, *, is_view: bool) -> Iterator[Batch]:
    import grain
    import torch

    torch.set_num_threads(1)
    dataset = (
        grain.MapDataset.source(source)
        .seed(0)
        .shuffle()
        .batch(BATCH_WINDOWS, drop_remainder=True, batch_fn=stack)
        .repeat()
    )
    options = grain.ReadOptions(num_threads=N_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    stored = dataset.to_iter_dataset(options)
    if request.workers:
        processes = grain.MultiprocessingOptions(num_workers=request.workers, per_worker_buffer_size=2)
        stored = stored.mp_prefetch(processes)
    convert = to_batch_transposed if is_view else to_batch
    for numbers, windows in stored:
        yield torch.from_numpy(numbers), convert(windows)


def batches_windows(request: Request) -> Iterator[Batch]:
    """Pre-cut windows."""
    source = Source(request.folder / read_memmap.WINDOWS, len(request.starts))
    return _batches(source, request, is_view=False)


def batches_recordings(request: Request) -> Iterator[Batch]:
    """Windows cut from recordings."""
    source = Source(request.folder / read_memmap.RECORDINGS, len(request.starts), request.starts)
    return _batches(source, request, is_view=True)


READERS = (
    Reader(
        name="grain",
        kind="own loader",
        settings=f"pre-cut windows in a mapped file, `MADV_WILLNEED`, {N_THREADS} threads",
        distribution="grain",
        libraries=("torch", "grain"),
        form="windows",
        prepare=read_memmap.prepare_windows,
        batches=batches_windows,
    ),
    Reader(
        name="grain, views",
        kind="own loader",
        settings=f"recordings in a mapped file, `MADV_WILLNEED`, {N_THREADS} threads",
        distribution="grain",
        libraries=("torch", "grain"),
        form="recordings",
        prepare=read_memmap.prepare_recordings,
        batches=batches_recordings,
        regimes=("overlap",),
    ),
)
