"""Speed: how fast windows come here, beside what memory and the medium could give.

This module decides what is measured, and what the figures say about the limit. Two regimes:

*warm*
    windows that the page cache holds, in turns with ``np.copyto`` between two arrays;
*capped*
    windows that come from the medium, as they do where memory is far smaller than the store: the
    kernel is asked to forget the files first, and each window is read once. In turns with random
    reads of the same files. What the disk delivered is counted, and where that is not what was
    read, nothing is concluded.

How the medium is read is left to ``engram.store.medium``, how windows become batches to the loader.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import psutil

from engram.batches.loader import Loader
from engram.batches.windows import Windows
from engram.errors import DoesNotFit, InputError
from engram.memory import Budget, binding_limit, read_usage
from engram.store.medium import (
    RandomReads,
    can_forget,
    forget,
    read_ahead_kb,
    read_at_random,
    total_disk_bytes,
)
from engram.store.reader import Extent, Store
from engram.windows.order import Mode
from engram.windows.spec import FixedWindows

__all__ = ["Speed", "SpeedReport", "choose_windows", "measure_speed"]

_ROUNDS = 5
_MEMCPY_BYTES = 256 << 20
"""Bytes of an array that is copied: far above any processor's cache."""
_N_COPIES = 3
_WARM_BYTES = 1 << 30
"""Most that is brought into the page cache for the warm regime."""
_LOADER_BYTES = 256 << 20
"""What the loader may hold where nobody says: eight batches of 64 windows of 0.5 MB."""
_N_BATCHES = 64
"""Fewer batches say little: making threads and fresh memory takes much of the time."""
_N_SIZED = 1 << 16
"""Windows that are looked at to know their mean size."""

# What counts as a limit. Rounds differ by some hundredths on a quiet machine, by a tenth on a busy one.
_NEAR_MEDIUM = 0.7
_NEAR_MEMCPY = 0.6
_GAIN = 1.25
_BUSY = 0.8
_OTHERS = 0.25


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast windows came in one regime: medians over the rounds."""

    windows_per_s: float
    """Windows handed out per second."""
    gb_per_s: float
    """1e9 bytes of the batches as handed out, per second."""
    disk_gb_per_s: float | None
    """1e9 bytes that the disk delivered meanwhile, per second; None where that is not counted."""
    disk_bytes_per_window: float | None
    """Bytes that the disk delivered for a window; None where that is not counted."""
    n_cores: float
    """Cores that this process kept busy."""
    n_other_cores: float
    """Cores, of those that it may use, that others kept busy."""
    n_windows: int
    """Different windows that were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedReport:
    """What `measure_speed` found, and what it says about the limit."""

    n_windows: int
    """All windows."""
    batch_size: int
    """Windows in a batch: what was asked for, or fewer where those do not fit into memory."""
    stored_bytes_per_window: float
    """Mean bytes of a window in the store."""
    data_bytes: int
    """Bytes of the store that all windows lie in."""
    cache_bytes: int
    """What memory leaves for the page cache beside the loader."""
    n_cores: int
    """Cores that this process may use."""
    n_threads: int
    """Threads of the loader."""
    warm: Speed
    """Windows that the page cache holds."""
    capped: Speed | None
    """Windows that come from the medium; None where the system cannot be asked to forget files."""
    memcpy_gb_per_s: float
    """1e9 bytes copied per second by ``np.copyto`` between two float32 arrays on one thread."""
    memcpy_bytes: int
    """Size of each of the two arrays."""
    medium_gb_per_s: float | None
    """1e9 bytes per second that the disk delivers of random reads; None where that is not known."""
    medium_read_bytes: int | None
    """Size of one of those reads."""
    is_medium_direct: bool | None
    """Whether they went past the page cache."""
    is_direct: bool
    """Whether a loader of all windows reads past the page cache here, as the capped ones were."""
    read_ahead_kb: int | None
    """What the kernel reads ahead on the store's disk, in KiB; None where it does not say."""

    @property
    def fraction_of_memcpy(self) -> float:
        """Bytes of warm batches per byte that is copied in the same time."""
        return self.warm.gb_per_s / self.memcpy_gb_per_s

    @property
    def fraction_of_medium(self) -> float | None:
        """Bytes that the disk delivers for capped windows, per byte of random reads; None: not known."""
        if self.capped is None or self.medium_gb_per_s is None or not self.is_from_medium:
            return None
        assert self.capped.disk_gb_per_s is not None, "what came from the medium was counted"
        return self.capped.disk_gb_per_s / self.medium_gb_per_s

    @property
    def is_from_medium(self) -> bool:
        """Whether the disk delivered at least half of the capped windows' bytes.

        Half, since rows of a bank that several windows share are read once.
        """
        counted = None if self.capped is None else self.capped.disk_bytes_per_window
        return counted is not None and counted >= self.stored_bytes_per_window / 2

    @property
    def is_rough(self) -> bool:
        """Whether there are so few windows that starting to read takes much of the time."""
        return self.n_windows < _N_BATCHES * self.batch_size

    @property
    def is_held(self) -> bool:
        """Whether the page cache has room for all windows."""
        return self.data_bytes <= self.cache_bytes

    @property
    def limit(self) -> str:
        """What limits these windows on this machine, in words.

        Where the page cache has room for all of them the warm figures decide, else the capped ones.
        """
        return self._judge()[0]

    @property
    def advice(self) -> str:
        """What helps, and what does not."""
        return self._judge()[1]

    def _judge(self) -> tuple[str, str]:
        if self.is_rough:
            return "not known", f"There are too few windows to tell: fewer than {_N_BATCHES} batches."
        if not self.is_held:
            fraction = self.fraction_of_medium
            if self.capped is None or fraction is None:
                return "not known", "Not all fit into memory, and what the disk delivers is not known here."
            gain = self.warm.windows_per_s / self.capped.windows_per_s
            if gain >= _GAIN:
                return self._judge_disk(self.capped, fraction, gain)
        if self.fraction_of_memcpy >= _NEAR_MEMCPY:
            return "memory copying", "Neither more memory nor a faster disk helps; batches of bfloat16 may."
        if self.warm.n_cores < _BUSY * self.n_cores and self._are_others_in_the_way(self.warm):
            return self._others(self.warm)
        return "the processor: reading and decoding", self._advice_on_cores()

    def _judge_disk(self, capped: Speed, fraction: float, gain: float) -> tuple[str, str]:
        memory = f"More memory helps: windows that it holds come {gain:.1f} times as fast."
        if fraction >= _NEAR_MEDIUM:
            return "the disk", f"{memory} So does a faster disk; more cores do not."
        if self._are_others_in_the_way(capped):
            return self._others(capped)
        return (
            "the loader: it leaves the disk waiting",
            f"{memory} More threads than {self.n_threads} may, too.",
        )

    def _are_others_in_the_way(self, speed: Speed) -> bool:
        """Tell whether the cores are busy, and not with this process alone."""
        others = speed.n_other_cores
        return others >= _OTHERS * self.n_cores and speed.n_cores + others >= _BUSY * self.n_cores

    def _others(self, speed: Speed) -> tuple[str, str]:
        kept = f"They keep {speed.n_other_cores:.1f} of {self.n_cores} cores busy."
        return "other programs", f"{kept} Measure again when it is quiet."

    def _advice_on_cores(self) -> str:
        if self.warm.n_cores >= _BUSY * self.n_cores:
            helps = "More cores help"
        elif self.n_threads < self.n_cores:
            helps = f"More threads may help, the loader has {self.n_threads} for {self.n_cores} cores"
        else:
            helps = "Larger batches may help"
        return f"{helps}; more memory or a faster disk does not."


def choose_windows(store: Store, signal: str | None = None, window_s: float = 2.0) -> Windows:
    """Choose windows to measure with: fixed ones, one after another, of one form.

    Parameters
    ----------
    store
        An open store, which stays the caller's to close.
    signal
        Which signal; None: the one that takes most bytes.
    window_s
        Length in seconds. Where half of the recordings are shorter, as long as the middle one; where
        samples are further apart, one sample.

    Returns
    -------
    Windows
        Of the recordings that have the commonest channels and rate; its ``counts`` tells of the others.

    Raises
    ------
    InputError
        If there is no such signal, or no window of it, or ``window_s`` is not above zero.

    Examples
    --------
    >>> import tempfile
    >>> import engram
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> source = engram.ArraySource({"a": engram.ArrayRecording({"eeg": eeg})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     windows = choose_windows(store)
    ...     store.close()
    >>> windows.index.spec.signal, len(windows), windows.n_times
    ('eeg', 5, 200)
    """
    if not window_s > 0:
        raise InputError(f"A window of {window_s} s holds nothing. Give a length above zero.")
    stored = _Stored(store)
    signal = stored.largest() if signal is None else signal
    extents = stored.extents(signal)
    window_s = min(window_s, median([extent.n_samples / extent.rate_hz for extent in extents] or [window_s]))
    is_one_sample = window_s * median([extent.rate_hz for extent in extents] or [math.inf]) < 1
    size: dict[str, Any] = {"window_size_samples": 1} if is_one_sample else {"window_size_s": window_s}
    return store.windows(FixedWindows(signal=signal, **size))


def measure_speed(
    windows: Windows,
    *,
    batch_size: int = 64,
    seconds: float = 5.0,
    memory: int | str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpeedReport:
    """Measure how fast windows come in shuffled order, warm and capped, and what limits them.

    Parameters
    ----------
    windows
        What is read; of one form. Nothing is written.
    batch_size
        Windows in a batch; halved until batches fit into memory.
    seconds
        How long to read warm windows, capped windows, and the medium: each so long.
    memory
        What the loader may hold, as bytes or text such as ``"500 MB"``; None: 256 MiB, or half of
        what is left here if that is less. Arrays and page cache of the measurement come from the rest.
    threads
        Threads of the loader; None: its default.
    progress
        Told after each round how many are done, and how many there are.

    Raises
    ------
    DoesNotFit
        If two windows do not fit into memory.
    InputError
        If ``seconds`` is not above zero, or windows differ in form.
    StoreDamaged
        If a file of the store is missing or cut short.

    Examples
    --------
    >>> import tempfile
    >>> import engram
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> source = engram.ArraySource({"a": engram.ArrayRecording({"eeg": eeg})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     report = measure_speed(choose_windows(store), seconds=0.05)
    ...     store.close()
    >>> report.n_windows, report.warm.windows_per_s > 0, report.stored_bytes_per_window
    (5, True, 1600.0)
    """
    if not seconds > 0:
        raise InputError(f"Nothing is measured in {seconds} seconds. Give a number above zero.")
    bench = _Bench.of(
        windows,
        batch_size,
        round_s=seconds / _ROUNDS,
        memory=memory,
        threads=threads,
        progress=progress or _tell_nobody,
    )
    warm, memcpy_gb_per_s = bench.measure_warm()
    capped, reads = bench.measure_capped(warm) if can_forget() else (None, [])
    rates = [gb_per_s for read in reads if (gb_per_s := read.gb_per_s) is not None]
    return SpeedReport(
        n_windows=len(windows),
        batch_size=bench.batch_size,
        stored_bytes_per_window=bench.stored_bytes,
        data_bytes=min(round(len(windows) * bench.stored_bytes), sum(f.stat().st_size for f in bench.files)),
        is_direct=bench.is_direct,
        cache_bytes=bench.cache_bytes,
        n_cores=len(_usable_cores()),
        n_threads=bench.n_threads,
        warm=warm,
        capped=capped,
        memcpy_gb_per_s=memcpy_gb_per_s,
        memcpy_bytes=bench.memcpy_bytes,
        medium_gb_per_s=median(rates) if rates and len(rates) == len(reads) else None,
        medium_read_bytes=reads[0].read_bytes if reads else None,
        is_medium_direct=reads[0].is_direct if reads else None,
        read_ahead_kb=read_ahead_kb(windows.store.path),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What is measured, and the sizes that fit into memory here."""

    windows: Windows
    files: Sequence[Path]
    """The files that the windows lie in."""
    batch_size: int
    round_s: float
    loader_bytes: int | str
    n_threads: int
    is_direct: bool
    progress: Callable[[int, int], None]
    stored_bytes: float
    """Mean bytes of a window in the store."""
    piece_bytes: float
    """Mean bytes of it that lie together."""
    cache_bytes: int
    memcpy_bytes: int
    warm_bytes: int

    @classmethod
    def of(
        cls,
        windows: Windows,
        batch_size: int,
        *,
        round_s: float,
        memory: int | str | None,
        threads: int | None,
        progress: Callable[[int, int], None],
    ) -> Self:
        budget = Budget.of(None).spend("this process", read_usage().unreclaimable_bytes)
        loader_bytes = min(_LOADER_BYTES, budget.left_bytes // 2) if memory is None else memory
        while True:
            try:
                loader = windows.loader(batch_size, mode="shuffled", memory=loader_bytes, threads=threads)
                break
            except DoesNotFit:
                if batch_size == 1:
                    raise
                batch_size //= 2
        left_bytes = budget.spend("the loader", loader.budget.spent_bytes).left_bytes
        stored = _Stored(windows.store)
        stored_bytes, piece_bytes = stored.sizes(windows)
        return cls(
            windows=windows,
            files=stored.files(windows),
            batch_size=batch_size,
            round_s=round_s,
            loader_bytes=loader_bytes,
            n_threads=loader.sizes.n_threads,
            is_direct=loader.is_direct,
            progress=progress,
            stored_bytes=stored_bytes,
            piece_bytes=piece_bytes,
            cache_bytes=max(0, binding_limit().free_bytes - loader.budget.spent_bytes),
            # Both arrays take half of what is left at most, and the page cache a quarter.
            memcpy_bytes=max(1 << 20, min(_MEMCPY_BYTES, left_bytes // 4)),
            warm_bytes=min(_WARM_BYTES, left_bytes // 4),
        )

    def loader(self, windows: Windows, mode: Mode, *, is_direct: bool = False) -> Loader:
        """Make a loader of some of the windows, all of them in every pass."""
        order = windows.order(self.batch_size, mode=mode, drop_last=False)
        budget = Budget.of(self.loader_bytes)
        return Loader(windows, order, budget=budget, threads=self.n_threads, is_direct=is_direct)

    def measure_warm(self) -> tuple[Speed, float]:
        """Measure windows that the page cache holds, and 1e9 bytes copied per second."""
        windows = self._warmed()
        loader = self.loader(windows, "shuffled")
        # The first batches are read into fresh memory, the others into the same again, as in a long epoch.
        n_skipped = loader.sizes.n_slots if len(loader) >= 4 * loader.sizes.n_slots else 0
        source, target = (np.ones(self.memcpy_bytes // 4, np.float32) for _ in range(2))
        readings, copied = [], []
        for number in range(_ROUNDS):
            for _ in range(_N_COPIES):
                start_s = time.perf_counter()
                np.copyto(target, source)
                copied.append(source.nbytes / (time.perf_counter() - start_s) / 1e9)
            start_s = time.perf_counter()
            while time.perf_counter() - start_s < self.round_s:
                readings.append(_read(loader, self.round_s, n_skipped))
            self.progress(number + 1, 2 * _ROUNDS)
        return _summary(readings, len(windows)), median(copied)

    def _warmed(self) -> Windows:
        """Bring the first windows into the page cache, as many as fit and as come in time."""
        n_fitting = max(self.batch_size, int(self.warm_bytes / self.stored_bytes))
        windows = _first(self.windows, n_fitting)
        loader = self.loader(windows, "sequential")
        return _first(windows, _read(loader, _ROUNDS * self.round_s).n_windows)

    def measure_capped(self, warm: Speed) -> tuple[Speed, list[RandomReads]]:
        """Measure windows that come from the medium, and the medium itself."""
        readings, reads, windows_per_s = [], [], warm.windows_per_s
        for number in range(_ROUNDS):
            forget(self.files)
            reads.append(read_at_random(self.files, math.ceil(self.piece_bytes), self.round_s, seed=number))
            medium_per_s = reads[-1].n_bytes / reads[-1].duration_s / self.stored_bytes
            n_windows = max(self.batch_size, int(min(windows_per_s, medium_per_s) * self.round_s))
            # A pass to its end: nothing is read ahead that is not handed out, so bytes and windows agree.
            loader = self.loader(_some(self.windows, n_windows, number), "shuffled", is_direct=self.is_direct)
            if not reads[-1].is_direct:
                forget(self.files)
            readings.append(_read(loader))
            windows_per_s = readings[-1].windows_per_s
            self.progress(_ROUNDS + number + 1, 2 * _ROUNDS)
        return _summary(readings, len(loader.windows)), reads


@dataclass(frozen=True, slots=True)
class _Reading:
    """What reading windows for a while came to."""

    n_windows: int
    n_bytes: int
    disk_bytes: int | None
    cpu_s: float
    other_cpu_s: float
    duration_s: float

    @property
    def windows_per_s(self) -> float:
        return self.n_windows / self.duration_s


def _read(loader: Loader, seconds: float = math.inf, n_skipped: int = 0) -> _Reading:
    """Take batches until there are no more, or for some seconds; the first ones do not count."""
    batches, n_windows, n_bytes = iter(loader), 0, 0
    for _ in islice(batches, n_skipped):
        pass
    disk_before, busy_before_s = total_disk_bytes(), _busy_s()
    cpu_start_s, start_s = time.process_time(), time.perf_counter()
    for batch in batches:
        n_windows, n_bytes = n_windows + len(batch), n_bytes + batch.n_bytes
        if time.perf_counter() - start_s >= seconds:
            break
    duration_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_start_s
    other_cpu_s = max(0.0, _busy_s() - busy_before_s - cpu_s)
    disk_after = total_disk_bytes()
    disk_bytes = None if disk_before is None or disk_after is None else disk_after - disk_before
    return _Reading(n_windows, n_bytes, disk_bytes, cpu_s, other_cpu_s, duration_s)


def _busy_s() -> float:
    """Give the seconds that the cores of this process were busy, with whatever, since the machine began."""
    usable = _usable_cores()
    return sum(
        sum(core[:8]) - core.idle - getattr(core, "iowait", 0.0)  # the first eight count guests already
        for number, core in enumerate(psutil.cpu_times(percpu=True))
        if number in usable
    )


def _summary(readings: Sequence[_Reading], n_windows: int) -> Speed:
    disk = [(r.disk_bytes / r.duration_s / 1e9, r.disk_bytes / r.n_windows)
            for r in readings if r.disk_bytes is not None]  # fmt: skip
    return Speed(
        windows_per_s=median(reading.windows_per_s for reading in readings),
        gb_per_s=median(reading.n_bytes / reading.duration_s / 1e9 for reading in readings),
        disk_gb_per_s=median(rate for rate, _ in disk) if disk else None,
        disk_bytes_per_window=median(per_window for _, per_window in disk) if disk else None,
        n_cores=median(reading.cpu_s / reading.duration_s for reading in readings),
        n_other_cores=median(reading.other_cpu_s / reading.duration_s for reading in readings),
        n_windows=n_windows,
    )


def _first(windows: Windows, n: int) -> Windows:
    return windows.take(np.arange(len(windows)) < n)


def _some(windows: Windows, n: int, seed: int) -> Windows:
    """Draw windows at random."""
    keep = np.zeros(len(windows), np.bool_)
    keep[np.random.default_rng(seed).choice(len(windows), min(n, len(windows)), replace=False)] = True
    return windows.take(keep)


class _Stored:
    """Where the bytes of windows lie in a store, those of banks that their signals number among them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        recordings = store.recordings.filter(store.recordings["is_bank"])
        self._bank_ids = set(recordings["recording"].to_pylist())
        rows = store.signals.select(["recording", "signal", "bank"]).to_pylist()
        self._banks = {(row["recording"], row["signal"]): row["bank"] for row in rows if row["bank"]}

    def extents(self, signal: str) -> list[Extent]:
        """List a signal's extents, without a bank's."""
        return [extent for extent in self._store.extents(signal) if extent.recording not in self._bank_ids]

    def largest(self) -> str:
        """Name the signal whose samples are most bytes."""
        names = sorted(set(self._store.signals["signal"].to_pylist()) - self._bank_ids)
        return max(  # type: ignore[no-any-return]  # pyarrow gives Any
            names, key=lambda name: sum(e.n_samples * self._sample_bytes(e) for e in self.extents(name))
        )

    def sizes(self, windows: Windows) -> tuple[float, float]:
        """Give the mean bytes of a window, and how many of them lie together: a range, or a bank's row."""
        located = windows.index.place(np.arange(0, len(windows), max(1, len(windows) // _N_SIZED)))
        numbers, codes = np.unique(located.recording, return_inverse=True)
        ids = [windows.index.tables.ids[number] for number in numbers.tolist()]
        n_bytes = piece_bytes = 0.0
        for signal, lengths in located.lengths.items():
            extents = [self._store.extent(recording, signal) for recording in ids]
            n_samples = np.bincount(codes, lengths)
            of_signal = sum(
                n * self._sample_bytes(e) for n, e in zip(n_samples.tolist(), extents, strict=True)
            )
            bank = self._bank(extents[0])
            of_piece = of_signal / len(codes) if bank is None else bank.part.grid.sample_bytes
            n_bytes, piece_bytes = n_bytes + of_signal / len(codes), max(piece_bytes, of_piece)
        return n_bytes, piece_bytes

    def files(self, windows: Windows) -> list[Path]:
        """List the files that windows lie in, and all others of their signals."""
        extents = [extent for signal in windows.index.spec.signals for extent in self.extents(signal)]
        banks = [bank for extent in extents if (bank := self._bank(extent)) is not None]
        return [self._store.path / file for file in sorted({each.part.file for each in (*extents, *banks)})]

    def _sample_bytes(self, extent: Extent) -> int:
        """Give the bytes that are read for one sample."""
        n_bytes = extent.part.grid.sample_bytes
        bank = self._bank(extent)
        if bank is None:
            return n_bytes
        return n_bytes + math.prod(extent.part.grid.sample_shape) * bank.part.grid.sample_bytes

    def _bank(self, extent: Extent) -> Extent | None:
        name = self._banks.get((extent.recording, extent.part.signal))
        return None if name is None else self._store.extent(name, name)


def _usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # what SLURM and containers leave of the machine's
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _tell_nobody(done: int, whole: int) -> None:
    """Show no progress."""
