"""The medium: read past the page cache, forgotten, and asked for its settings."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engram.errors import StoreDamaged
from engram.store.medium import (
    RandomReads,
    can_forget,
    forget,
    read_ahead_kb,
    read_at_random,
    total_disk_bytes,
)

pytestmark = pytest.mark.skipif(not can_forget(), reason="this system cannot be asked to forget files")

LONG_S = 3600.0
"""A time that no test waits for."""

O_DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files, of 20 and 3 pieces of 8 KiB and a bit, and of less than one."""
    paths = []
    for name, n_bytes in (("a", 20 * 8192), ("b", 3 * 8192 + 100), ("c", 5000)):
        path = tmp_path / name
        path.write_bytes(os.urandom(n_bytes))
        paths.append(path)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note descriptor and first byte of every read."""
    noted: list[tuple[int, int]] = []
    plain = os.preadv

    def note(descriptor: int, buffers: Sequence[mmap.mmap], offset: int) -> int:
        noted.append((descriptor, offset))
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    return noted


def from_disk(path: Path) -> int:
    """Count the bytes that the disk delivers while a file is read."""
    before = total_disk_bytes()
    path.read_bytes()
    after = total_disk_bytes()
    if before is None or after is None:
        pytest.skip("this system does not count what the disk delivers")
    return after - before


def test_every_piece_is_read_once(files: list[Path], reads: list[tuple[int, int]]) -> None:
    """Given time, all whole pieces of all files are read, none twice; a file shorter than one is one."""
    found = read_at_random(files, 8000, LONG_S)
    pieces = reads[-24:]  # the first read tried whether direct ones are taken

    assert found.read_bytes == 8192
    assert found.n_bytes == 23 * 8192 + 5000
    assert len(set(pieces)) == len(pieces) == 24
    assert all(first % 8192 == 0 for _, first in pieces)


def test_another_seed_is_another_order(files: list[Path], reads: list[tuple[int, int]]) -> None:
    """The pieces are drawn at random by the seed: rounds do not read the same again in the same order."""
    orders = []
    for seed in (0, 1):
        reads.clear()
        read_at_random(files[:1], 8000, LONG_S, seed=seed)
        orders.append([first for _, first in reads])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("window_bytes", "read_bytes"), [(1, 4096), (51_600, 53_248), (9_000_000, 1 << 20)])
def test_reads_are_whole_blocks_of_a_mebibyte_at_most(
    tmp_path: Path, window_bytes: int, read_bytes: int
) -> None:
    """Direct reads are of whole blocks, and 32 of them must fit into memory."""
    path = tmp_path / "part"
    path.write_bytes(bytes(1 << 20))
    assert read_at_random([path], window_bytes, LONG_S).read_bytes == read_bytes


def test_no_more_files_are_opened_than_any_process_may(tmp_path: Path) -> None:
    """Of many files some are drawn: a store may have more parts than a process has descriptors."""
    paths = [tmp_path / str(number) for number in range(80)]
    for path in paths:
        path.write_bytes(bytes(4096))
    assert read_at_random(paths, 4096, LONG_S).n_bytes == 64 * 4096


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct reads")
@pytest.mark.parametrize("is_refused_by", ["open", "preadv"])
def test_plain_reads_where_direct_ones_are_refused(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, is_refused_by: str
) -> None:
    """A file system without direct reads says EINVAL when opening or when reading: it is read plainly."""
    plain_open, plain_read, refusing = os.open, os.preadv, set()

    def refuse_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & O_DIRECT and is_refused_by == "open":
            raise OSError(errno.EINVAL, "no direct reads")
        descriptor = plain_open(path, flags & ~O_DIRECT, *more, **named)
        if flags & O_DIRECT:
            refusing.add(descriptor)
        return descriptor

    def refuse_read(descriptor: int, *arguments: Any) -> int:
        if descriptor in refusing:
            refusing.discard(descriptor)  # its number is given to another file
            raise OSError(errno.EINVAL, "no direct reads")
        return plain_read(descriptor, *arguments)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    found = read_at_random(files, 8192, LONG_S)

    assert not found.is_direct
    assert found.n_bytes == 23 * 8192 + 5000


def test_an_error_of_the_disk_is_told_at_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread meets is raised, and no thread reads on until time is up."""

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="broken"):
        read_at_random(files, 8192, LONG_S)


def test_an_interrupt_ends_all_threads_at_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, which meets the main thread while it waits for the others, does not wait until time is up."""

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engram.store.medium._places", lambda descriptors, *_: Endless(descriptors[0]))
    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_at_random(files, 8192, LONG_S)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engram")]


class Endless:
    """Places to read without end, until they are cleared."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor

    def popleft(self) -> tuple[int, int]:
        """Give the first place again."""
        if self.descriptor is None:
            raise IndexError
        return self.descriptor, 0

    def clear(self) -> None:
        """Have no more."""
        self.descriptor = None


def test_reading_changes_no_file(files: list[Path]) -> None:
    """Neither reading nor forgetting writes: contents and times of change stay."""
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    forget(files)
    read_at_random(files, 4096, LONG_S)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_what_is_forgotten_comes_from_the_disk_again(tmp_path: Path) -> None:
    """Read twice, a file comes from memory; forgotten, even just after it was written, from the disk."""
    path = tmp_path / "part"
    path.write_bytes(os.urandom(1 << 20))
    forget([path])
    if not (first := from_disk(path)):
        pytest.skip("files here lie in memory, or on a file system whose bytes are not counted")
    assert first >= 1 << 20
    assert from_disk(path) == 0


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    """A part that is gone is told as damage to the store, in both."""
    with pytest.raises(StoreDamaged, match="missing"):
        forget([tmp_path / "gone"])
    with pytest.raises(StoreDamaged, match="missing"):
        read_at_random([tmp_path / "gone"], 4096, LONG_S)


@pytest.mark.parametrize(
    ("disk_bytes", "gb_per_s"), [(None, None), (0, None), (899, None), (900, 1e-6), (1100, 1e-6)]
)
def test_a_rate_is_the_disks_or_none(disk_bytes: int | None, gb_per_s: float | None) -> None:
    """What did not come from the disk, or is not known to, has no rate."""
    assert RandomReads(4096, 1000, disk_bytes, 1.0, is_direct=True).gb_per_s == gb_per_s


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("rchar: 5\nread_bytes: 4096\nwrite_bytes: 7\n", 4096), ("rchar: 5\n", None)]
)
def test_the_kernels_count_is_read(tmp_path: Path, text: str, n_bytes: int | None) -> None:
    """``/proc/self/io`` counts what the disk delivered; None where it does not say."""
    assert total_disk_bytes(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/io").write_text(text)
    assert total_disk_bytes(tmp_path) == n_bytes


@pytest.mark.parametrize("where", ["bdi", "disk", "partition"])
def test_read_ahead_is_that_of_the_disk(tmp_path: Path, where: str) -> None:
    """It stands with the file system's device, with the disk, or for a partition with its disk."""
    assert read_ahead_kb(tmp_path, tmp_path) is None
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    disk = tmp_path / "sys/devices/sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "sda1").mkdir()
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    setting = disk / "queue/read_ahead_kb"
    if where == "bdi":
        setting = tmp_path / f"sys/class/bdi/{number}/read_ahead_kb"
        setting.parent.mkdir(parents=True)
    else:
        (tmp_path / "sys/dev/block" / number).symlink_to(disk if where == "disk" else disk / "sda1")
    setting.write_text("128\n")
    assert read_ahead_kb(tmp_path, tmp_path) == 128
