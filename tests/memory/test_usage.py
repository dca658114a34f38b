import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engram.memory.usage import PeakWatch, Usage, bound_usage, read_usage, watch_peak

MIB = 1 << 20
linux_only = pytest.mark.skipif(not psutil.LINUX, reason="reads /proc, which only Linux has")


def plant(root: Path, pid: int, *, status: str, rollup: str | None = None, children: str = "") -> None:
    """Write the files of one process into a made-up ``/proc``."""
    task = root / f"proc/{pid}/task/{pid}"
    task.mkdir(parents=True)
    (task / "children").write_text(children)
    (root / f"proc/{pid}/status").write_text(status)
    if rollup is not None:
        (root / f"proc/{pid}/smaps_rollup").write_text(rollup)


def measured(code: str) -> int:
    """Run code in a fresh interpreter and return the MiB that it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@linux_only
def test_pss_and_page_tables_of_every_process_are_added(tmp_path: Path) -> None:
    """Anonymous and shared memory by PSS plus page tables, over the tree; files never."""
    status = "Name:\tpython\nVmRSS:\t 999983 kB\nRssAnon:\t 997 kB\nRssShmem:\t 991 kB\nVmPTE:\t 2 kB\n"
    rollup = "1-2 ---p 0 0:0 0 [rollup]\nPss_Anon:  {} kB\nPss_File:  99991 kB\nPss_Shmem:  {} kB\n"
    plant(tmp_path, 11, status=status, rollup=rollup.format(101, 211), children="12 13 ")
    plant(tmp_path, 12, status=status, rollup=rollup.format(307, 401), children="14 ")
    plant(tmp_path, 13, status=status, rollup=rollup.format(503, 601))
    plant(tmp_path, 14, status=status, rollup=rollup.format(701, 809))
    total_kib = 101 + 211 + 307 + 401 + 503 + 601 + 701 + 809 + 4 * 2
    assert read_usage(11, root=tmp_path) == Usage(total_kib * 1024, 4, "PSS")
    assert bound_usage(11, root=tmp_path) == Usage(4 * (997 + 991 + 2) * 1024, 4, "RSS")


@linux_only
def test_a_kernel_without_pss_by_kind_is_counted_by_rss_and_says_so(tmp_path: Path) -> None:
    """Where smaps_rollup is absent or older than Pss_Anon, status counts instead."""
    status = "VmRSS:\t 997 kB\nRssAnon:\t 101 kB\nRssShmem:\t 211 kB\n"
    full = "Pss_Anon:  307 kB\nPss_Shmem:  401 kB\n"
    plant(tmp_path, 11, status=status, rollup="Pss:  503 kB\n", children="12 13")
    plant(tmp_path, 12, status=status)
    plant(tmp_path, 13, status=status, rollup=full)
    assert read_usage(11, root=tmp_path) == Usage((2 * (101 + 211) + 307 + 401) * 1024, 3, "PSS + RSS")


@linux_only
def test_a_process_of_another_user_is_counted_by_rss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaps_rollup that may not be read is no reason to leave the process out."""
    plant(tmp_path, 11, status="VmRSS:\t 997 kB\nRssAnon:\t 101 kB\nRssShmem:\t 211 kB\n", rollup="")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "smaps_rollup":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert read_usage(11, root=tmp_path) == Usage((101 + 211) * 1024, 1, "RSS")


@linux_only
def test_a_process_that_has_ended_is_skipped(tmp_path: Path) -> None:
    """A listed child without files, a zombie, and a first process that is gone count as nothing."""
    alive = "VmRSS:\t 997 kB\nRssAnon:\t 101 kB\nRssShmem:\t 211 kB\n"
    plant(tmp_path, 11, status=alive, children="12 13")
    plant(tmp_path, 13, status="Name:\tpython\nState:\tZ (zombie)\n")
    assert bound_usage(11, root=tmp_path) == Usage((101 + 211) * 1024, 1, "RSS")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert read_usage(ended.pid) == Usage(0, 0, "")


@linux_only
def test_a_process_that_ends_while_its_file_is_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel answers ESRCH for an opened file of a process that is gone."""
    plant(tmp_path, 11, status="")

    def refuse(path: Path) -> bytes:
        raise ProcessLookupError(3, "No such process", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert read_usage(11, root=tmp_path) == Usage(0, 0, "")


@linux_only
def test_memory_shared_by_fork_counts_once() -> None:
    """64 MiB seen by a parent and two forked children are 64 MiB, and 192 in the cheap bound."""
    code = """
import os
from engram.memory.usage import bound_usage, read_usage
before = {read}().unreclaimable_bytes
block = b"1" * (64 << 20)
hold, release = os.pipe()
for _ in range(2):
    if os.fork() == 0:
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
usage = {read}()
assert usage.n_processes == 3, usage
print((usage.unreclaimable_bytes - before) >> 20)
"""
    assert 64 <= measured(code.format(read="read_usage")) < 80
    assert 192 <= measured(code.format(read="bound_usage")) < 240


@linux_only
@pytest.mark.parametrize("read", ["read_usage", "bound_usage"])
def test_page_cache_and_mapped_files_do_not_count(tmp_path: Path, read: str) -> None:
    """A file read through a map takes nothing but its page tables; shared memory counts in full."""
    file = tmp_path / "recording"
    file.write_bytes(bytes(64 * MIB))
    code = f"""
import mmap
from engram.memory.usage import {read}
before = {read}().unreclaimable_bytes
with open({str(file)!r}, "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
seen = sum(pages[::4096])
mapped = {read}().unreclaimable_bytes
shared = mmap.mmap(-1, 64 << 20)
shared.write(b"1" * (64 << 20))
assert mapped - before < 8 << 20, mapped - before
print(({read}().unreclaimable_bytes - mapped) >> 20)
"""
    assert 64 <= measured(code) < 72


@linux_only
def test_descendants_of_every_thread_and_generation_count() -> None:
    """A grandchild started from a thread of a child is part of the tree."""
    grandchild = "import sys; print('up', flush=True); sys.stdin.read()"
    child = f"""
import subprocess, sys, threading
def start():
    subprocess.run([sys.executable, "-c", {grandchild!r}])
thread = threading.Thread(target=start)
thread.start()
thread.join()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", child], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert read_usage(process.pid).n_processes == 2
        assert read_usage().n_processes >= 3


@linux_only
def test_without_the_kernel_s_list_of_children_psutil_finds_them(tmp_path: Path) -> None:
    """A kernel built without /proc/PID/task/TID/children loses no process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        plant(tmp_path, os.getpid(), status="VmRSS:\t 997 kB\nRssAnon:\t 101 kB\nRssShmem:\t 211 kB\n")
        (tmp_path / f"proc/{os.getpid()}/task/{os.getpid()}/children").unlink()
        plant(tmp_path, child.pid, status="VmRSS:\t 997 kB\nRssAnon:\t 307 kB\nRssShmem:\t 401 kB\n")
        assert bound_usage(root=tmp_path) == Usage((101 + 211 + 307 + 401) * 1024, 2, "RSS")
        child.communicate(b"\n")


def test_outside_linux_psutil_measures_private_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the tree is counted by USS: private memory, files left out where the system can."""
    monkeypatch.setattr(psutil, "LINUX", False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        tree = read_usage()
        assert tree.meter == "USS"
        assert tree.n_processes >= 2
        assert tree.unreclaimable_bytes > read_usage(child.pid).unreclaimable_bytes > MIB
        child.communicate(b"\n")
    assert read_usage(child.pid) == Usage(0, 0, "")


def test_where_detail_is_denied_rss_counts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root sees USS of other processes on macOS: RSS is too high, never absent."""

    def deny(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil, "LINUX", False)
    monkeypatch.setattr(psutil.Process, "memory_full_info", deny)
    monkeypatch.setattr(psutil.Process, "memory_footprint", deny, raising=False)
    assert read_usage().meter == "RSS with files"


def scripted(*sizes: int) -> tuple[Callable[[], Usage], threading.Event]:
    """Give these sizes in turn, the last one for ever, and an event for when it was reached."""
    remaining, reached = list(sizes), threading.Event()

    def read() -> Usage:
        size = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if len(remaining) == 1:
            reached.set()
        return Usage(size, 1, "scripted")

    return read, reached


def test_the_watch_keeps_the_highest_of_its_samples() -> None:
    """A peak between entry and exit is kept, and the thread is gone afterwards."""
    read, reached = scripted(2, 3, 11, 5, 7)
    with watch_peak(1e-4, read=read) as watch:
        assert reached.wait(60)
    assert watch.peak == Usage(11, 1, "scripted")
    assert watch.peak_bytes == 11
    assert not [thread for thread in threading.enumerate() if thread.name == "engram-watch-peak"]


def test_the_watch_reads_on_entry_and_on_exit() -> None:
    """A body shorter than the interval is still measured before and after."""
    read, _ = scripted(2, 3)
    with watch_peak(3600, read=read) as watch:
        assert watch.peak_bytes == 2
    assert watch.peak_bytes == 3


def test_the_watch_reads_when_asked() -> None:
    """`now` is a reading of its own and counts for the peak."""
    read, _ = scripted(2, 7, 3)
    watch = PeakWatch(read)
    assert [watch.now().unreclaimable_bytes, watch.now().unreclaimable_bytes] == [7, 3]
    assert watch.peak_bytes == 7


def failing() -> Callable[[], Usage]:
    """Give one reading, then fail."""
    readings = [Usage(2, 1, "scripted")]

    def read() -> Usage:
        if not readings:
            raise OSError("no more")
        return readings.pop()

    return read


def test_a_failing_watch_fails_where_it_ends() -> None:
    """An error in the thread is raised at exit, not lost."""
    with pytest.raises(OSError, match="no more"), watch_peak(3600, read=failing()):
        pass


def test_the_body_s_error_comes_through_a_failing_watch() -> None:
    """The body's own error wins; the watch's is noted on it; the last sample is taken all the same."""
    with pytest.raises(KeyError) as raised, watch_peak(3600, read=failing()):
        raise KeyError
    assert raised.value.__notes__ == ["The memory watch had failed: OSError('no more')"]
    read, _ = scripted(2, 3)
    with pytest.raises(KeyError), watch_peak(3600, read=read) as watch:
        raise KeyError
    assert watch.peak_bytes == 3


def test_the_watch_sees_this_process_grow() -> None:
    """With its own reading, a block that is gone at the end is in the peak."""
    with watch_peak() as watch:
        start_bytes = watch.now().unreclaimable_bytes
        block = b"1" * (64 * MIB)
        watch.now()
        del block
    assert watch.peak_bytes - start_bytes >= 60 * MIB
