"""A mapped file: PyTorch's ``DataLoader`` over it, and one gather per batch.

The usual way to read what does not fit in memory, and the fastest where it does. Settings that
matter, each measured here:

- The kernel reads ahead at every page fault, by default 128 KiB and on some machines 8 MiB, which
  throws away most of what it reads. ``MADV_RANDOM`` stops that, and then every page is a read of
  its own; ``MADV_WILLNEED`` for each window, as it is asked for, reads it as a whole while the
  other windows of the batch are asked for.
- ``np.asarray`` of the mapped file: slices of a ``np.memmap`` cost ten times as much.
- Pre-cut windows need no transposing, so they are the faster form where nothing overlaps.
- Converting and transposing is one call per batch, in a ``collate_fn`` of ours: ``as usual`` is what it
  costs to leave that to each window and to PyTorch.
- The gather is NumPy's, a ``memcpy`` per window; ``torch.index_select`` copies by element.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, WINDOW_BYTES, WINDOW_SAMPLES, Corpus
from benchmarks.loading.reader import (
    Batch,
    Item,
    Reader,
    Request,
    Rows,
    collate,
    collate_transposed,
    load_with_torch,
    to_batch,
)
from numpy.typing import NDArray

RECORDINGS = "recordings.f16"
WINDOWS = "windows.f16"


def prepare_recordings(corpus: Corpus, folder: Path) -> None:
    """Link the corpus: it is this form already."""
    (folder / RECORDINGS).hardlink_to(corpus.path)


def prepare_windows(corpus: Corpus, folder: Path) -> None:
    """Write all windows into one file, (window, channel, time)."""
    with (folder / WINDOWS).open("wb") as file:
        for windows in corpus.windows():
            windows.tofile(file)


class Mapped:
    """A file of float16, mapped, with advice to the kernel."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self.values: NDArray[np.float16] = np.frombuffer(self._map, np.float16)

    def will_need(self, start: int, n_bytes: int) -> None:
        """Have a range read in the background."""
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, start + n_bytes - first)


@dataclass(frozen=True, slots=True)
class Recordings:
    """Windows as views of recordings: (time, channel)."""

    mapped: Mapped
    starts: NDArray[np.int64]
    is_advised: bool

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Item:
        start = int(self.starts[number]) * N_CHANNELS
        if self.is_advised:
            self.mapped.will_need(start * 2, WINDOW_BYTES)
        window = self.mapped.values[start : start + WINDOW_SAMPLES * N_CHANNELS]
        return number, window.reshape(WINDOW_SAMPLES, N_CHANNELS)


@dataclass(frozen=True, slots=True)
class Windows:
    """Pre-cut windows as views: (channel, time)."""

    mapped: Mapped

    def __len__(self) -> int:
        return len(self.mapped.values) * 2 // WINDOW_BYTES

    def __getitem__(self, number: int) -> Item:
        self.mapped.will_need(number * WINDOW_BYTES, WINDOW_BYTES)
        start = number * WINDOW_SAMPLES * N_CHANNELS
        window = self.mapped.values[start : start + WINDOW_SAMPLES * N_CHANNELS]
        return number, window.reshape(N_CHANNELS, WINDOW_SAMPLES)


@dataclass(frozen=True, slots=True)
class Converted:
    """Windows as they are delivered: (channel, time) float32."""

    views: Recordings

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> tuple[int, NDArray[np.float32]]:
        number, window = self.views[number]
        return number, window.T.astype(np.float32, order="C")


def batches_random(request: Request) -> Iterator[Batch]:
    """Cut views, with MADV_RANDOM alone."""
    dataset = Recordings(Mapped(request.folder / RECORDINGS), request.starts, is_advised=False)
    return load_with_torch(dataset, request, collate_transposed)


def batches_willneed(request: Request) -> Iterator[Batch]:
    """Cut views, with MADV_WILLNEED for each."""
    dataset = Recordings(Mapped(request.folder / RECORDINGS), request.starts, is_advised=True)
    return load_with_torch(dataset, request, collate_transposed)


def batches_windows(request: Request) -> Iterator[Batch]:
    """Read pre-cut windows, with MADV_WILLNEED for each."""
    return load_with_torch(Windows(Mapped(request.folder / WINDOWS)), request, collate)


def batches_usual(request: Request) -> Iterator[Batch]:
    """Cut and convert in ``__getitem__``, and leave the rest to ``DataLoader``: as most people write it."""
    from torch.utils.data import DataLoader

    views = Recordings(Mapped(request.folder / RECORDINGS), request.starts, is_advised=True)
    order = Rows(request.numbers)
    return iter(DataLoader(Converted(views), batch_sampler=order, num_workers=request.workers))


def batches_gathered(request: Request) -> Iterator[Batch]:
    """Advise the kernel of a whole batch, then gather it."""
    import torch

    mapped = Mapped(request.folder / WINDOWS)
    windows = mapped.values.reshape(-1, N_CHANNELS, WINDOW_SAMPLES)
    for numbers in request.numbers:
        for number in numbers.tolist():
            mapped.will_need(number * WINDOW_BYTES, WINDOW_BYTES)
        yield torch.from_numpy(numbers), to_batch(windows[numbers])


READERS = (
    Reader(
        name="memmap, random",
        kind="one by one",
        settings="recordings in one mapped file, `MADV_RANDOM`, `DataLoader`",
        distribution="numpy",
        libraries=("torch",),
        form="recordings",
        prepare=prepare_recordings,
        batches=batches_random,
        regimes=("warm", "capped", "overlap"),
    ),
    Reader(
        name="memmap, willneed",
        kind="one by one",
        settings="the same, and `MADV_WILLNEED` for each window as it is asked for",
        distribution="numpy",
        libraries=("torch",),
        form="recordings",
        prepare=prepare_recordings,
        batches=batches_willneed,
        regimes=("warm", "capped", "overlap"),
    ),
    Reader(
        name="memmap, as usual",
        kind="as usual",
        settings="as before, converted in `__getitem__`, with `DataLoader`'s own `collate_fn`",
        distribution="numpy",
        libraries=("torch",),
        form="recordings",
        prepare=prepare_recordings,
        batches=batches_usual,
    ),
    Reader(
        name="memmap, pre-cut",
        kind="one by one",
        settings="pre-cut windows in one mapped file, `MADV_WILLNEED` for each, `DataLoader`",
        distribution="numpy",
        libraries=("torch",),
        form="windows",
        prepare=prepare_windows,
        batches=batches_windows,
    ),
    Reader(
        name="gather, pre-cut",
        kind="no loader",
        settings="the same file, `MADV_WILLNEED` for a whole batch, then `windows[numbers]`; no `DataLoader`",
        distribution="numpy",
        libraries=("torch",),
        form="windows",
        prepare=prepare_windows,
        batches=batches_gathered,
        workers=(0,),
    ),
)
