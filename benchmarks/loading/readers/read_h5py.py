"""HDF5 by h5py, in three layouts.

- *contiguous*: recordings as one dataset without chunks; a window is one ``pread``.
- *one-window chunks*: each pre-cut window a chunk, uncompressed: what a careful user writes.
- *gzip*: ``chunks=True, compression="gzip"``, the usual recipe. h5py's guess makes chunks that
  are small in every axis, so that one window touches hundreds of them.

HDF5 holds one lock per process, so threads do not help and worker processes do. Every worker opens
the file for itself, since a handle must not cross a fork. ``read_direct`` would save one copy of the
window, but takes longer to set up than it saves; ``dataset[a:b]`` is h5py's fast path.
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
    collate,
    collate_transposed,
    load_with_torch,
)
from numpy.typing import NDArray

FILE = "corpus.h5"
NAME = "eeg"


def prepare_contiguous(corpus: Corpus, folder: Path) -> None:
    """Write recordings as one dataset (sample, channel) without chunks."""
    import h5py

    samples = corpus.samples()
    with h5py.File(folder / FILE, "w") as file:
        dataset = file.create_dataset(NAME, samples.shape, np.float16)
        start = 0
        for recording in corpus.recordings():
            dataset[start : start + len(recording)] = recording
            start += len(recording)


def prepare_chunked(corpus: Corpus, folder: Path) -> None:
    """Write windows (window, channel, time), one chunk each."""
    _write_windows(corpus, folder, chunks=(1, N_CHANNELS, WINDOW_SAMPLES))


def prepare_gzip(corpus: Corpus, folder: Path) -> None:
    """Write windows (window, channel, time) as most scripts do."""
    _write_windows(corpus, folder, chunks=True, compression="gzip")


def _write_windows(corpus: Corpus, folder: Path, **options: Any) -> None:
    import h5py

    shape = (corpus.n_windows, N_CHANNELS, WINDOW_SAMPLES)
    with h5py.File(folder / FILE, "w") as file:
        dataset = file.create_dataset(NAME, shape, np.float16, **options)
        # A chunk that reaches over several recordings is compressed once.
        n_rows = dataset.chunks[0]
        pending = np.empty((0, *shape[1:]), np.float16)
        start = 0
        for windows in corpus.windows():
            pending = np.concatenate([pending, windows])
            n_whole = len(pending) - len(pending) % n_rows
            dataset[start : start + n_whole] = pending[:n_whole]
            start, pending = start + n_whole, pending[n_whole:]
        dataset[start:] = pending


@dataclass(slots=True)
class Hdf5:
    """A dataset that each process opens for itself, when it first reads."""

    path: Path
    starts: NDArray[np.int64] | None = None
    """First sample of each window; None where windows are pre-cut."""
    _dataset: Any = field(default=None, init=False)

    def __getitem__(self, number: int) -> Item:
        if self._dataset is None:
            import h5py

            self._dataset = h5py.File(self.path, "r")[NAME]
        if self.starts is None:
            return number, self._dataset[number]
        start = int(self.starts[number])
        return number, self._dataset[start : start + WINDOW_SAMPLES]


def batches_contiguous(request: Request) -> Iterator[Batch]:
    """Windows cut from recordings."""
    return load_with_torch(Hdf5(request.folder / FILE, request.starts), request, collate_transposed)


def batches_windows(request: Request) -> Iterator[Batch]:
    """Pre-cut windows."""
    return load_with_torch(Hdf5(request.folder / FILE), request, collate)


READERS = (
    Reader(
        name="h5py, contiguous",
        kind="one by one",
        settings="recordings in one contiguous dataset, `DataLoader`, a handle per process",
        distribution="h5py",
        libraries=("torch", "h5py"),
        form="h5py-contiguous",
        prepare=prepare_contiguous,
        batches=batches_contiguous,
        regimes=("warm", "capped", "overlap"),
    ),
    Reader(
        name="h5py, one-window chunks",
        kind="one by one",
        settings="pre-cut windows, a chunk each, uncompressed, `DataLoader`, a handle per process",
        distribution="h5py",
        libraries=("torch", "h5py"),
        form="h5py-chunks",
        prepare=prepare_chunked,
        batches=batches_windows,
    ),
    Reader(
        name="h5py, gzip",
        kind="one by one",
        settings='pre-cut windows, `chunks=True, compression="gzip"`, `DataLoader`, a handle per process',
        distribution="h5py",
        libraries=("torch", "h5py"),
        form="h5py-gzip",
        prepare=prepare_gzip,
        batches=batches_windows,
    ),
)
