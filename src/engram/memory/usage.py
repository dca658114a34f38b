"""Usage: what a tree of processes holds that the kernel cannot take back.

This module decides what counts: anonymous memory, shared memory and page tables, of this
process and all its descendants. Page cache, memory-mapped files among it, does not count:
the kernel drops it when memory is short, and counting it has made monitors stop healthy
jobs for years. What is allowed is left to ``engram.memory.limits``, what is promised to
``engram.memory.budget``.

There are two readings, because one cannot be both right and cheap:

`read_usage`
    splits memory that forked processes share among them (``Pss_Anon`` and ``Pss_Shmem`` of
    ``smaps_rollup``). The kernel walks every page table for it: 10 ms per GiB in 4-KiB pages.
`bound_usage`
    adds up ``RssAnon`` and ``RssShmem`` of ``status``: 50 microseconds per process, whatever
    its size, but a page shared by five forked processes counts five times.

A descendant whose parent has died belongs to init, not to the tree. Shared memory counts
where it is mapped: a file in ``/dev/shm`` that no process of the tree maps is not seen.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["PeakWatch", "Usage", "bound_usage", "read_usage", "watch_peak"]

_PSS = "PSS"
_RSS = "RSS"
_USS = "USS"
_RSS_WITH_FILES = "RSS with files"
_FIELD = re.compile(rb"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory that a process tree holds at one moment.

    Examples
    --------
    >>> Usage(unreclaimable_bytes=180 << 20, n_processes=3, meter="PSS").n_processes
    3
    """

    unreclaimable_bytes: int
    """Bytes that the kernel cannot drop: anonymous, shared memory, page tables."""
    n_processes: int
    """Processes that were counted, the first one included."""
    meter: str
    """How it was measured: ``"PSS"`` (shared pages split), ``"RSS"`` (shared pages counted
    once per process), ``"USS"`` (private pages only), ``"RSS with files"`` (mapped files
    included), joined by ``" + "`` where processes differ; ``""`` if there was no process."""


def read_usage(pid: int | None = None, *, root: Path = Path("/")) -> Usage:
    """Measure what a process and its descendants hold: the one function that tests replace.

    On Linux, PSS of anonymous and shared memory plus page tables. A process whose
    ``smaps_rollup`` cannot be read (another user's, or a kernel before 5.4) is counted by
    RSS of the same two kinds. Elsewhere ``psutil`` gives USS, or plain RSS where the system
    shows no more; ``meter`` says which. Processes that end meanwhile are skipped.

    Parameters
    ----------
    pid
        The first process; ``None`` for the calling one.
    root
        Where ``proc`` lies.

    Returns
    -------
    Usage
        ``n_processes`` is 0 if the first process no longer exists.

    Notes
    -----
    A page shared with a process outside the tree counts in part only: to measure a loader
    with forked workers, read from the process that forked them.

    References
    ----------
    The Linux kernel's ``Documentation/filesystems/proc.rst``, on ``smaps_rollup`` and ``status``.

    Examples
    --------
    >>> usage = read_usage()
    >>> usage.n_processes >= 1 and usage.unreclaimable_bytes > 1 << 20
    True
    """
    return _read_tree(pid, root, _measure_pss)


def bound_usage(pid: int | None = None, *, root: Path = Path("/")) -> Usage:
    """Bound from above what a process and its descendants hold, cheaply enough to sample.

    The same as `read_usage` where no process has forked without exec (subprocess, spawn,
    loky); above it where forked processes share pages.

    Parameters
    ----------
    pid
        The first process; ``None`` for the calling one.
    root
        Where ``proc`` lies.

    Examples
    --------
    >>> bound_usage().unreclaimable_bytes > 1 << 20
    True
    """
    return _read_tree(pid, root, _measure_rss)


_Reading = tuple[int, str]
"""Bytes, and the meter that gave them."""


def _read_tree(
    pid: int | None, root: Path, measure: Callable[[Path, dict[str, int]], _Reading | None]
) -> Usage:
    first = os.getpid() if pid is None else pid
    if not psutil.LINUX:
        pids = [first, *_descendants_by_psutil(first)]
        return _total([_measure_portably(each) for each in pids])
    proc = root / "proc"
    readings = []
    for each in _tree(proc, first):
        status = _kilobyte_fields(proc / str(each) / "status")
        # A process that has ended, reaped or not, has no memory lines any more.
        if "VmRSS" in status:
            readings.append(measure(proc / str(each), status) or _measure_portably(each))
    return _total(readings)


def _total(readings: list[_Reading | None]) -> Usage:
    counted = [reading for reading in readings if reading is not None]
    meters = sorted({meter for _, meter in counted})
    return Usage(sum(n_bytes for n_bytes, _ in counted), len(counted), " + ".join(meters))


def _measure_pss(process: Path, status: dict[str, int]) -> _Reading | None:
    try:
        rollup = _kilobyte_fields(process / "smaps_rollup")
    except PermissionError:
        rollup = {}
    if "Pss_Anon" not in rollup:
        return _measure_rss(process, status)
    # smaps_rollup knows no page tables, yet 1 TiB mapped by 16 processes has 32 GiB of them.
    return rollup["Pss_Anon"] + rollup["Pss_Shmem"] + status.get("VmPTE", 0), _PSS


def _measure_rss(_process: Path, status: dict[str, int]) -> _Reading | None:
    if "RssAnon" not in status:  # a kernel before 4.5
        return None
    return status["RssAnon"] + status["RssShmem"] + status.get("VmPTE", 0), _RSS


def _measure_portably(pid: int) -> _Reading | None:
    try:
        process = psutil.Process(pid)
        try:
            # psutil 8 renames memory_full_info and deprecates the old name.
            detailed = getattr(process, "memory_footprint", process.memory_full_info)()
        except psutil.AccessDenied:  # macOS shows the detail of other processes to root only
            return process.memory_info().rss, _RSS_WITH_FILES
    except psutil.NoSuchProcess:
        return None
    return detailed.uss, _USS


def _tree(proc: Path, first: int) -> Iterator[int]:
    if not (proc / str(first) / "task" / str(first) / "children").exists():
        # A kernel built without CONFIG_PROC_CHILDREN (or the process has ended).
        yield first
        yield from _descendants_by_psutil(first)
        return
    pending = [first]
    while pending:
        pid = pending.pop()
        yield pid
        pending += _children(proc / str(pid) / "task")


def _children(tasks: Path) -> list[int]:
    # psutil's children(recursive=True) scans every process of the machine: ten times dearer.
    try:
        threads = list(tasks.iterdir())
    except FileNotFoundError:
        return []
    return [int(pid) for thread in threads for pid in _read(thread / "children").split()]


def _descendants_by_psutil(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kilobyte_fields(path: Path) -> dict[str, int]:
    return {name.decode(): int(value) * 1024 for name, value in _FIELD.findall(_read(path))}


def _read(path: Path) -> bytes:
    """Content of a file of ``/proc``; empty if its process has ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # ended before opening, before reading
        return b""


class PeakWatch:
    """The highest of a series of readings. Made by `watch_peak`.

    Safe to use from several threads.

    Parameters
    ----------
    read
        Gives the usage now. Called once at once, so that there is always a peak.

    Examples
    --------
    >>> readings = (Usage(n_bytes, 1, "RSS") for n_bytes in (2, 5, 3, 4))
    >>> watch = PeakWatch(lambda: next(readings))
    >>> watch.now().unreclaimable_bytes, watch.now().unreclaimable_bytes, watch.peak_bytes
    (5, 3, 5)
    >>> watch.restart().unreclaimable_bytes, watch.peak_bytes
    (5, 4)
    """

    def __init__(self, read: Callable[[], Usage]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._peak = read()

    def now(self) -> Usage:
        """Take a reading; it counts for the peak."""
        usage = self._read()
        with self._lock:
            self._peak = max(self._peak, usage, key=lambda each: each.unreclaimable_bytes)
        return usage

    def restart(self) -> Usage:
        """Take a reading, give the peak until now, and let a new peak begin with the reading."""
        usage = self.now()
        with self._lock:
            peak, self._peak = self._peak, usage
        return peak

    @property
    def peak(self) -> Usage:
        """The highest reading since the beginning, or since `restart`."""
        return self._peak

    @property
    def peak_bytes(self) -> int:
        """Unreclaimable bytes of the highest reading."""
        return self._peak.unreclaimable_bytes


@contextmanager
def watch_peak(interval_s: float = 0.05, *, read: Callable[[], Usage] = bound_usage) -> Iterator[PeakWatch]:
    """Sample usage from a thread and keep the highest reading.

    The first reading is taken before the body, the last one after it, also if it raises.

    Parameters
    ----------
    interval_s
        Seconds between readings. What comes and goes in between is not seen, and neither is
        what a native call does while it holds Python's global lock.
    read
        What to sample. The default bounds usage from above and costs the same for any amount
        of memory; twenty `read_usage` a second would keep a core busy from 5 GiB on, and stall
        the page faults of the process it reads.

    Raises
    ------
    Exception
        What ``read`` raised in the thread, when the body ends. If the body raises, its error
        comes through, with a note that the watch had failed.

    Examples
    --------
    >>> with watch_peak() as watch:
    ...     block = bytearray(32 << 20)
    >>> watch.peak_bytes > 32 << 20
    True
    """
    watch = PeakWatch(read)
    stopping = threading.Event()
    failures: list[Exception] = []

    def sample() -> None:
        try:
            while not stopping.wait(interval_s):
                watch.now()
            watch.now()
        except Exception as error:  # noqa: BLE001 - raised again where the watch ends
            failures.append(error)

    thread = threading.Thread(target=sample, name="engram-watch-peak", daemon=True)
    thread.start()
    try:
        yield watch
    except BaseException as error:
        stopping.set()
        thread.join()
        for failure in failures:
            error.add_note(f"The memory watch had failed: {failure!r}")
        raise
    stopping.set()
    thread.join()
    for failure in failures:
        raise failure
