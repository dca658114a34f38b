"""What a batch from the page cache takes beside copying and converting it.

Three ways over the same windows (129 channels x 200 samples of float16, 64 in a batch, global shuffle), in
turns:

- ``bare``: the C part alone, called from as many threads as the loader has, into buffers of their own. No
  Python between two batches but the call, and nobody takes them. What the loader would be at its best.
- ``loader``: the loader, and a consumer that only lets go of the batches.
- ``python``: the loader with a C part that does nothing: what finding windows, handing batches over and
  Python's lock take. No machine gets more batches per second than this, however many cores it has.

Usage: python benchmarks/overhead.py [--rounds N] [--seconds S] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

import engram
from engram.batches.loader import Loader
from engram.store import gather

N_RECORDINGS, N_SAMPLES, N_CHANNELS = 40, 80_000, 129
BATCH_WINDOWS = 64
OUT = 7
"""Which argument of ``_native.gather`` is the batch; the next is scratch."""


def main() -> None:
    """Measure all three ways in turns, and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in each round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not gather.IS_NATIVE:
        raise SystemExit("Nothing is compiled here to measure. Install a C compiler, then Engram again.")
    with tempfile.TemporaryDirectory() as folder, _store(Path(folder) / "store") as store:
        spec = engram.FixedWindows(signal="eeg", window_size_samples=200)
        loader = store.windows(spec).loader(BATCH_WINDOWS, mode="shuffled", memory="100 MB")
        calls = _calls(loader)
        ways: dict[str, Callable[[], float]] = {
            "bare": lambda: _bare(calls, loader, options.seconds),
            "loader": lambda: _loaded(loader, options.seconds),
            "python": lambda: _without_c(loader, options.seconds),
        }
        _loaded(loader, options.seconds)  # all is in the page cache then
        rounds = [{name: measure() for name, measure in ways.items()} for _ in range(options.rounds)]
    found = {name: statistics.median(each[name] for each in rounds) for name in ways}
    found["loader/bare"] = statistics.median(each["loader"] / each["bare"] for each in rounds)
    if options.json:
        print(json.dumps({"machine": platform.processor(), "cores": os.cpu_count(), **found}))
        return
    for name in ways:
        print(
            f"{name:8} {found[name]:9,.0f} windows/s  {BATCH_WINDOWS / found[name] * 1e6:5.0f} us per batch"
        )
    print(f"loader / bare: {found['loader/bare']:.2f}")


@contextmanager
def _store(path: Path) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    shape = (N_SAMPLES, N_CHANNELS)
    recordings = {
        f"{number:03}": engram.ArrayRecording(
            {"eeg": engram.ArraySignal(rng.standard_normal(shape, np.float32) * 30, 100.0)}
        )
        for number in range(N_RECORDINGS)
    }
    with engram.prepare(engram.ArraySource(recordings), path, precision="float16").store as store:
        yield store


class _Recorder:
    """A C part that does nothing, and notes what it was asked for, but for the memory that it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hint = gather._native.hint  # noqa: SLF001 - it takes its place

    def gather(self, *arguments: Any) -> int:
        """Note, and do nothing."""
        out, scratch = arguments[OUT : OUT + 2]
        self.calls.append((*arguments[:OUT], out.shape, scratch.shape, *arguments[OUT + 2 :]))
        time.sleep(0)  # as the C part does, let others have Python's lock
        return len(arguments[0])


@contextmanager
def _replaced(native: _Recorder) -> Iterator[None]:
    real = gather._native  # noqa: SLF001 - see above
    gather._native = native  # type: ignore[assignment]  # noqa: SLF001
    try:
        yield
    finally:
        gather._native = real  # noqa: SLF001


def _calls(loader: Loader) -> list[tuple[Any, ...]]:
    """Note with what the C part is called for every batch of an epoch."""
    recorder = _Recorder()
    with _replaced(recorder):
        for _ in loader:
            pass
    return recorder.calls


def _bare(calls: list[tuple[Any, ...]], loader: Loader, seconds: float) -> float:
    """Give windows per second of the C part alone."""
    done, n_threads = Event(), loader.sizes.n_threads
    n_batches = [0] * n_threads

    def work(thread: int) -> None:
        outs = [np.empty(calls[0][OUT], np.float32) for _ in range(2)]
        scratch = np.empty(calls[0][OUT + 1], np.uint8)
        while not done.is_set():
            call = calls[(n_batches[thread] * n_threads + thread) % len(calls)]
            out = outs[n_batches[thread] % 2]
            gather._native.gather(*call[:OUT], out, scratch, *call[OUT + 2 :])  # noqa: SLF001
            n_batches[thread] += 1

    threads = [Thread(target=work, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    begun, n_begun = time.perf_counter(), sum(n_batches)
    time.sleep(seconds)
    duration_s, n_counted = time.perf_counter() - begun, sum(n_batches) - n_begun
    done.set()
    for thread in threads:
        thread.join()
    return n_counted * BATCH_WINDOWS / duration_s


def _loaded(loader: Loader, seconds: float) -> float:
    """Give windows per second of the loader."""
    n_batches, begun = 0, time.perf_counter()
    while (duration_s := time.perf_counter() - begun) < seconds:
        for _ in loader:
            n_batches += 1
    return n_batches * BATCH_WINDOWS / duration_s


def _without_c(loader: Loader, seconds: float) -> float:
    with _replaced(_Recorder()):
        return _loaded(loader, seconds)


if __name__ == "__main__":
    main()
