"""The medium under a store: how fast it reads at random, and what the kernel keeps and adds.

This module decides how the medium is asked: past the page cache, in reads of one size at random
places of the store's own files, many at once. What the figures mean for windows is left to
``engram.batches.speed``.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram.errors import StoreDamaged

__all__ = [
    "RandomReads",
    "can_forget",
    "forget",
    "read_ahead_kb",
    "read_at_random",
    "total_disk_bytes",
]

_DEPTH = 32
"""Reads at once: a virtual disk and an NVMe disk give all they have, and no queue overflows."""

_MAX_READ_BYTES = 1 << 20
"""Longest read: a disk that gets 32 of these at once is limited by its bytes, not by their number."""

_ALIGNMENT = 4096
"""Direct reads begin and end at multiples of the disk's logical block: 512 or 4,096 bytes."""

_MAX_FILES = 64
"""Files that are open at once, drawn from all: far below the usual limit of 1,024."""

_MAX_READS = 1 << 16
"""Reads drawn beforehand: half a second of the fastest disks, and 3 GB in windows of 52 KB."""


@dataclass(frozen=True, slots=True)
class RandomReads:
    """What some seconds of random reads came to."""

    read_bytes: int
    """Bytes of one read."""
    n_bytes: int
    """Bytes of all reads together."""
    disk_bytes: int | None
    """Bytes that the disk delivered meanwhile; None where the system does not count them."""
    duration_s: float
    """How long they took."""
    is_direct: bool
    """True: past the page cache (``O_DIRECT``). False where the file system refuses that."""

    @property
    def gb_per_s(self) -> float | None:
        """1e9 bytes per second; None where they are not known to have come from the disk."""
        if self.disk_bytes is None or self.disk_bytes < 0.9 * self.n_bytes:
            return None
        return self.n_bytes / self.duration_s / 1e9


def read_at_random(files: Sequence[Path], window_bytes: int, seconds: float, *, seed: int = 0) -> RandomReads:
    """Read pieces of some files at random, no piece twice, 32 at once.

    Parameters
    ----------
    files
        Files to read; none is changed. Not empty.
    window_bytes
        Size of a read: rounded up to whole blocks, and at most 1 MiB.
    seconds
        When to stop, if not all is read before.
    seed
        Which pieces, in which order.

    Raises
    ------
    StoreDamaged
        If a file is missing.

    Notes
    -----
    Where direct reads are refused, only what was forgotten before (`forget`) comes from the disk.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "part")
    ...     _ = file.write_bytes(bytes(1 << 20))
    ...     reads = read_at_random([file], 50_000, seconds=60)
    >>> reads.read_bytes, reads.n_bytes == reads.read_bytes * ((1 << 20) // reads.read_bytes)
    (53248, True)
    """
    rng = np.random.default_rng(seed)
    chosen = [files[number] for number in rng.permutation(len(files))[:_MAX_FILES].tolist()]
    is_direct = _takes_direct_reads(chosen[0])
    read_bytes = min(-(-window_bytes // _ALIGNMENT) * _ALIGNMENT, _MAX_READ_BYTES)
    with ExitStack() as stack:
        descriptors = [stack.enter_context(_opened(path, is_direct=is_direct)) for path in chosen]
        places = _places(descriptors, read_bytes, rng)
        pool = stack.enter_context(ThreadPoolExecutor(_DEPTH, thread_name_prefix="engram-medium"))
        stack.callback(places.clear)  # an interrupt does not wait until time is up
        before, start_s = total_disk_bytes(), time.perf_counter()
        readers = [pool.submit(_read_until, start_s + seconds, places, read_bytes) for _ in range(_DEPTH)]
        n_bytes = sum(reader.result() for reader in readers)
        duration_s, after = time.perf_counter() - start_s, total_disk_bytes()
    disk_bytes = None if before is None or after is None else after - before
    return RandomReads(read_bytes, n_bytes, disk_bytes, duration_s, is_direct)


def _takes_direct_reads(path: Path) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        with _opened(path, is_direct=True) as descriptor, mmap.mmap(-1, _ALIGNMENT) as buffer:
            os.preadv(descriptor, [buffer], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:  # how file systems say that they have no direct reads
            raise
        return False
    return True


@contextmanager
def _opened(path: Path, *, is_direct: bool = False) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0))
    except FileNotFoundError as error:
        raise StoreDamaged(f"{path} is missing. Run engram verify.") from error
    try:
        if not is_direct and can_forget():
            # Else the kernel reads 128 KiB and more around every piece.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def _places(descriptors: Sequence[int], read_bytes: int, rng: np.random.Generator) -> deque[tuple[int, int]]:
    """Draw pieces without replacement: descriptor and first byte; a file shorter than one is one."""
    n_pieces = [max(1, os.fstat(descriptor).st_size // read_bytes) for descriptor in descriptors]
    stops = np.cumsum(n_pieces)
    drawn = rng.choice(int(stops[-1]), min(int(stops[-1]), _MAX_READS), replace=False)
    numbers = np.searchsorted(stops, drawn, side="right")
    firsts = (drawn - (stops - n_pieces)[numbers]) * read_bytes
    pairs = zip(numbers.tolist(), firsts.tolist(), strict=True)
    return deque((descriptors[number], first) for number, first in pairs)


def _read_until(deadline_s: float, places: deque[tuple[int, int]], read_bytes: int) -> int:
    """Read the next place, among other threads, until there is none or time is up."""
    n_bytes = 0
    with mmap.mmap(-1, read_bytes) as buffer:  # memory of its own pages: aligned as direct reads want it
        while time.perf_counter() < deadline_s:
            try:
                descriptor, first = places.popleft()
            except IndexError:
                break
            n_bytes += os.preadv(descriptor, [buffer], first)
    return n_bytes


def can_forget() -> bool:
    """Tell whether this system can be asked to drop the page cache of a file."""
    return hasattr(os, "posix_fadvise")


def forget(files: Iterable[Path]) -> None:
    """Ask the kernel to drop what its page cache holds of some files.

    Bytes that were written and are not on the disk yet go there first. What another process maps
    stays, and a file system that lies in memory keeps all: `total_disk_bytes` tells.

    Parameters
    ----------
    files
        Files to forget; their contents stay as they are.

    Raises
    ------
    StoreDamaged
        If a file is missing.
    """
    for path in files:
        with _opened(path) as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                # A file system that is only read has nothing to write.
                if error.errno not in (errno.EINVAL, errno.EROFS):
                    raise
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def total_disk_bytes(root: Path = Path("/")) -> int | None:
    """Give the bytes that this process has made the disk deliver since it began.

    Parameters
    ----------
    root
        Where ``proc`` lies.

    Returns
    -------
    int or None
        None where the system does not count them. What a file system in memory, or one that does
        not count, delivers is not in it.

    References
    ----------
    The Linux kernel's ``Documentation/filesystems/proc.rst``, on ``/proc/PID/io``: ``read_bytes``.
    """
    try:
        text = (root / "proc/self/io").read_text()
    except (FileNotFoundError, PermissionError):
        return None
    found = re.search(r"^read_bytes: (\d+)$", text, re.MULTILINE)
    return None if found is None else int(found[1])


def read_ahead_kb(path: Path, root: Path = Path("/")) -> int | None:
    """Give how much the kernel reads ahead on the disk of a path, in KiB.

    Parameters
    ----------
    path
        A file or folder that exists.
    root
        Where ``sys`` lies.

    Returns
    -------
    int or None
        None where the system does not say.

    References
    ----------
    The Linux kernel's ``Documentation/ABI/testing/sysfs-class-bdi`` and ``sysfs-block``.
    """
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    disk = root / "sys/dev/block" / number
    # Network file systems have the first; of a partition, its disk has it: the folder above.
    for file in (root / "sys/class/bdi" / number / "read_ahead_kb",
                 disk / "queue/read_ahead_kb", disk.resolve().parent / "queue/read_ahead_kb"):  # fmt: skip
        if number and file.is_file():
            return int(file.read_text())
    return None
