"""scDataset: sorted fetches of several batches, over a mapped file of pre-cut windows.

Two strategies. ``BlockShuffling(block_size=1)`` is a global shuffle; what is left of the idea is that the
numbers of several batches are sorted before they are fetched. ``block_size=16`` is the trade that
its authors recommend: neighbours stay together, and a fetch mixes 64 blocks. A fetch advises the kernel of
all of its windows (``MADV_WILLNEED``) and gathers them with one call. The fetch is 16 batches, its default,
in blocks; 4 in the global shuffle, where more buys nothing. Workers convert.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from benchmarks.loading.corpus import BATCH_WINDOWS, N_CHANNELS, WINDOW_BYTES, WINDOW_SAMPLES
from benchmarks.loading.reader import Batch, Reader, Request, forever, to_batch
from benchmarks.loading.readers import read_memmap
from numpy.typing import NDArray

FETCH_GLOBAL = 4
FETCH_BLOCKS = 16
BLOCK_WINDOWS = 16

Stored = tuple[NDArray[np.int64], NDArray[np.float16]]


def fetch(windows: read_memmap.Windows, numbers: NDArray[np.int64]) -> Stored:
    """Gather sorted windows, all of them advised first."""
    for number in numbers.tolist():
        windows.mapped.will_need(number * WINDOW_BYTES, WINDOW_BYTES)
    values = windows.mapped.values.reshape(-1, N_CHANNELS, WINDOW_SAMPLES)
    return numbers, values[numbers]


def take(fetched: Stored, rows: NDArray[np.int64]) -> Batch:
    """Take a batch out of a fetch."""
    import torch

    numbers, windows = fetched
    return torch.from_numpy(numbers[rows]), to_batch(windows[rows])


def batches(request: Request, *, block_windows: int, fetch_factor: int) -> Iterator[Batch]:
    """Iterate through a ``DataLoader``, as its documentation does."""
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    windows = read_memmap.Windows(read_memmap.Mapped(request.folder / read_memmap.WINDOWS))
    dataset = scDataset(
        windows,
        BlockShuffling(block_size=block_windows),
        batch_size=BATCH_WINDOWS,
        fetch_factor=fetch_factor,
        drop_last=True,
        fetch_callback=fetch,
        batch_callback=take,
        seed=0,
    )
    loader = DataLoader(
        dataset, batch_size=None, num_workers=request.workers, persistent_workers=request.workers > 0
    )
    return forever(lambda _: loader)


READERS = (
    Reader(
        name="scDataset",
        kind="whole batches",
        settings=f"pre-cut windows in a mapped file, sorted fetches of {FETCH_GLOBAL} batches, `DataLoader`",
        distribution="scDataset",
        libraries=("torch", "scdataset"),
        form="windows",
        prepare=read_memmap.prepare_windows,
        batches=partial(batches, block_windows=1, fetch_factor=FETCH_GLOBAL),
    ),
    Reader(
        name="scDataset, blocks",
        kind="whole batches",
        settings=f"the same file, sorted fetches of {FETCH_BLOCKS} batches, `DataLoader`",
        distribution="scDataset",
        libraries=("torch", "scdataset"),
        form="windows",
        prepare=read_memmap.prepare_windows,
        batches=partial(batches, block_windows=BLOCK_WINDOWS, fetch_factor=FETCH_BLOCKS),
        workers=(0,),
        shuffle=f"blocks of {BLOCK_WINDOWS} windows, mixed within {FETCH_BLOCKS} batches",
    ),
)
