"""zarr-python: one chunk per window, uncompressed.

A chunk is a file of its own: reading one inner chunk out of a shard takes zarr-python three to five
times as long, since it reads the shard's index each time. ``oindex`` with all numbers of a batch has
the chunks fetched concurrently, and beats window by window; a higher ``async.concurrency`` does not
change it. Windows that overlap are cut as slices out of recordings, in chunks of one stride: no
byte is read that is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, WINDOW_SAMPLES, Corpus
from benchmarks.loading.reader import (
    Batch,
    Item,
    Reader,
    Request,
    collate_transposed,
    load_batches_with_torch,
    load_with_torch,
    to_batch,
)
from numpy.typing import NDArray

NAME = "eeg"
STRIDE_SAMPLES = WINDOW_SAMPLES // 2


def prepare_windows(corpus: Corpus, folder: Path) -> None:
    """Write (window, channel, time), a chunk for each window."""
    import zarr

    array = zarr.create_array(
        folder / NAME,
        shape=(corpus.n_windows, N_CHANNELS, WINDOW_SAMPLES),
        chunks=(1, N_CHANNELS, WINDOW_SAMPLES),
        dtype="float16",
        compressors=None,
    )
    start = 0
    for windows in corpus.windows():
        array[start : start + len(windows)] = windows
        start += len(windows)


def prepare_recordings(corpus: Corpus, folder: Path) -> None:
    """Write (sample, channel) in chunks of half a window."""
    import zarr

    array = zarr.create_array(
        folder / NAME,
        shape=corpus.samples().shape,
        chunks=(STRIDE_SAMPLES, N_CHANNELS),
        dtype="float16",
        compressors=None,
    )
    start = 0
    for recording in corpus.recordings():
        array[start : start + len(recording)] = recording
        start += len(recording)


@dataclass(slots=True)
class Array:
    """An array that each process opens for itself: zarr's event loop does not survive a fork."""

    path: Path
    starts: NDArray[np.int64] | None = None
    _array: Any = field(default=None, init=False)

    @property
    def array(self) -> Any:
        """Give the open array."""
        if self._array is None:
            import zarr

            self._array = zarr.open_array(self.path, mode="r")
        return self._array


@dataclass(slots=True)
class Windows(Array):
    """Pre-cut windows, a batch at a time."""

    def __getitem__(self, numbers: list[int]) -> Batch:
        import torch

        return torch.tensor(numbers), to_batch(self.array.oindex[np.asarray(numbers)])


@dataclass(slots=True)
class Recordings(Array):
    """Windows cut from recordings."""

    def __getitem__(self, number: int) -> Item:
        assert self.starts is not None
        start = int(self.starts[number])
        return number, self.array[start : start + WINDOW_SAMPLES]


def batches_windows(request: Request) -> Iterator[Batch]:
    """Pre-cut windows, a batch at a time."""
    return load_batches_with_torch(Windows(request.folder / NAME), request)


def batches_recordings(request: Request) -> Iterator[Batch]:
    """Slices of recordings."""
    return load_with_torch(Recordings(request.folder / NAME, request.starts), request, collate_transposed)


READERS = (
    Reader(
        name="zarr-python",
        kind="whole batches",
        settings="pre-cut windows, a chunk and file each, `array.oindex[numbers]`, `DataLoader`",
        distribution="zarr",
        libraries=("torch", "zarr"),
        form="zarr-windows",
        prepare=prepare_windows,
        batches=batches_windows,
    ),
    Reader(
        name="zarr-python, views",
        kind="one by one",
        settings="recordings in chunks of half a window, `array[start:stop]`, `DataLoader`",
        distribution="zarr",
        libraries=("torch", "zarr"),
        form="zarr-recordings",
        prepare=prepare_recordings,
        batches=batches_recordings,
        regimes=("overlap",),
    ),
)
