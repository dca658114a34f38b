"""Cell: one reader, one number of workers, one regime, in a process of its own.

This module is what that process runs. It prints one line of JSON: how fast the batches came, what they
cost, and that they were right. The clock starts when everything is imported, and the files are in the
page cache, or out of it, as the regime wants them. After the first batch, and half a second of warming
up, batches are counted for as long as was asked; a batch that takes longer than that by itself is the
measurement. Then, with the clock stopped, some batches are compared with the corpus, byte for byte: a
reader that delivers anything else has no row.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from benchmarks.loading.corpus import (
    BATCH_WINDOWS,
    N_CHANNELS,
    WINDOW_BYTES,
    WINDOW_SAMPLES,
    WINDOWS_PER_RECORDING,
    Corpus,
)
from benchmarks.loading.reader import Batch, Reader, Request
from benchmarks.loading.readers import READERS
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

N_EPOCHS = 20
"""Epochs of the order: more windows than any reader gets through."""
GATE_S = 0.01
SLOW_WINDOWS_PER_S = 50
"""Below this, a further batch to look at would take longer than the measurement."""


class WrongBatch(Exception):
    """A reader delivered something else than it was asked for."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is started with."""

    reader: str
    """Name of the reader."""
    folder: str
    """Its form of the corpus."""
    corpus: str
    """File of the corpus."""
    n_recordings: int
    """Recordings in it."""
    is_preparation: bool = False
    """Write the form, and measure nothing."""
    workers: int = 0
    """Worker processes."""
    stride_samples: int = WINDOW_SAMPLES
    """From window to window."""
    seconds: float = 5.0
    """How long to count."""
    warm_up_s: float = 0.5
    """How long not to count before."""
    seed: int = 0
    """Of the order."""
    gate: str | None = None
    """File that is there once the reader's files are as the regime wants them; None: they are."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process found out."""

    n_windows: int
    """Windows counted."""
    windows_per_s: float
    """Windows delivered per second."""
    cpu_s_per_window: float
    """CPU seconds of all processes."""
    disk_bytes_per_window: float
    """Bytes that the processes had the disk read."""
    first_batch_s: float
    """From the call to the first batch."""
    recordings_per_batch: float
    """Distinct recordings in a batch, on average: how well the order is mixed."""


@dataclass(frozen=True, slots=True)
class Meters:
    """Time, and what this process and its workers have used so far."""

    time_s: float
    cpu_s: float
    disk_bytes: int

    @classmethod
    def read(cls) -> Meters:
        """Read them; workers that have ended are in their parent's."""
        own = psutil.Process()
        tree = [own, *own.children(recursive=True)]
        cpu_s = sum(sum(process.cpu_times()[:4]) for process in tree)
        disk_bytes = sum(process.io_counters().read_bytes for process in tree)
        return cls(time.perf_counter(), cpu_s, disk_bytes)


def imported_mark(gate: Path) -> Path:
    """Give the file that a process makes when it has come to its gate."""
    return gate.with_suffix(".imported")


def prepare(reader: Reader, corpus: Corpus, folder: Path) -> None:
    """Write a form."""
    for library in reader.libraries:
        import_module(library)
    reader.prepare(corpus, folder)


def measure(reader: Reader, corpus: Corpus, request: Request, task: Task) -> Measured:
    """Measure a reader, then check what it delivers."""
    for library in reader.libraries:
        import_module(library)
    if task.gate:
        imported_mark(Path(task.gate)).touch()
        while not Path(task.gate).exists():
            time.sleep(GATE_S)
    begun = Meters.read()
    batches = reader.batches(request)
    last = next(batches)
    first_batch_s = time.perf_counter() - begun.time_s
    if first_batch_s < task.seconds:
        begun, last = _warm_up(batches, task.warm_up_s)
        n_windows = n_batches = 0
    else:  # this batch is the measurement
        n_windows, n_batches = len(last[0]), 1
    while time.perf_counter() - begun.time_s < task.seconds or n_batches < max(1, request.workers):
        last = next(batches)
        n_windows += len(last[0])
        n_batches += 1
    ended = Meters.read()
    windows_per_s = n_windows / (ended.time_s - begun.time_s)
    n_further = 3 if windows_per_s > SLOW_WINDOWS_PER_S else 0
    looked_at = [last, *(next(batches) for _ in range(n_further))]
    return Measured(
        n_windows=n_windows,
        windows_per_s=windows_per_s,
        cpu_s_per_window=(ended.cpu_s - begun.cpu_s) / n_windows,
        disk_bytes_per_window=(ended.disk_bytes - begun.disk_bytes) / n_windows,
        first_batch_s=first_batch_s,
        recordings_per_batch=check(looked_at, corpus, request.starts),
    )


def _warm_up(batches: Iterator[Batch], seconds: float) -> tuple[Meters, Batch]:
    begin = time.perf_counter()
    while True:
        last = next(batches)
        if time.perf_counter() - begin > seconds:
            return Meters.read(), last


def check(batches: list[Batch], corpus: Corpus, starts: NDArray[np.int64]) -> float:
    """Compare batches with the corpus, all of them alive at once; count their recordings.

    Raises
    ------
    WrongBatch
        If anything differs: shape, type, layout, a number, a byte.
    """
    per_recording = WINDOWS_PER_RECORDING * WINDOW_SAMPLES
    with corpus.path.open("rb", buffering=0) as file:
        for numbers, windows in batches:
            _check_form(windows)
            if len(np.unique(numbers.numpy())) < BATCH_WINDOWS:
                raise WrongBatch("A window came twice in one batch.")
            for start, window in zip(starts[numbers.numpy()], windows.numpy(), strict=True):
                file.seek(int(start) * N_CHANNELS * 2)
                stored = np.frombuffer(file.read(WINDOW_BYTES), np.float16)
                truth = stored.reshape(WINDOW_SAMPLES, N_CHANNELS).T.astype(np.float32)
                if not np.array_equal(truth, window):
                    raise WrongBatch(f"The window at sample {start} is not what the corpus has there.")
    n_recordings = [len(np.unique(starts[numbers.numpy()] // per_recording)) for numbers, _ in batches]
    return float(np.mean(n_recordings))


def _check_form(windows: Tensor) -> None:
    form = (tuple(windows.shape), str(windows.dtype), windows.is_contiguous())
    wanted = ((BATCH_WINDOWS, N_CHANNELS, WINDOW_SAMPLES), "torch.float32", True)
    if form != wanted:
        raise WrongBatch(f"A batch has shape, type, contiguity {form}, not {wanted}.")


def order(n_windows: int, seed: int, n_epochs: int = N_EPOCHS) -> NDArray[np.int64]:
    """Shuffle all windows, epoch after epoch: (batch, row); what is left of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    n_kept = n_windows - n_windows % BATCH_WINDOWS
    epochs = [rng.permutation(n_windows)[:n_kept].reshape(-1, BATCH_WINDOWS) for _ in range(n_epochs)]
    return np.concatenate(epochs)


def main(task: Task) -> dict[str, Any]:
    """Do what a task says."""
    corpus = Corpus(Path(task.corpus), task.n_recordings)
    reader, folder = READERS[task.reader], Path(task.folder)
    if task.is_preparation:
        prepare(reader, corpus, folder)
        return {}
    starts = corpus.starts(task.stride_samples)
    request = Request(folder, starts, order(len(starts), task.seed), task.workers, task.stride_samples)
    return asdict(measure(reader, corpus, request, task))


if __name__ == "__main__":
    print(json.dumps(main(Task(**json.loads(sys.argv[1])))))
