"""Run a command under a real memory limit, and read two meters.

A promise such as "prepares within 1 GB" is kept or broken by the kernel, not by a mock: this
module puts a command into a memory cgroup of its own before its first instruction, lets the
kernel enforce the limit, and reports what the group held. Three ways are tried:

1. a group below this process's own, or below one of those that contain it, whichever is
   writable (root in most containers and CI machines; a desktop session under systemd);
2. a scope of the user's systemd;
3. none: `CgroupUnavailable` says why, and `cgroup_unavailable` gives the reason to skip with.

The two meters differ on purpose. Unreclaimable memory is what a promise is about; it has no
high-water mark in the kernel, so it is sampled, and a spike shorter than 20 ms may be missed.
Usage has an exact high-water mark, but page cache is in it, and fills any limit.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from engram.errors import EngramError, InputError
from engram.memory.limits import find_memory_cgroup

__all__ = ["CgroupUnavailable", "LimitedRun", "cgroup_unavailable", "limited"]

_SAMPLE_S = 0.02
_PATIENCE_S = 10.0
# Waits for a line before it becomes the program, so that the program starts inside the group.
_GATE = ("sh", "-c", 'read -r _ && exec "$@" </dev/null', "sh")
# What the kernel cannot drop. v1 does not tell droppable kernel memory (inodes) from the rest
# (page tables), so kernel memory is left out there: 0.2 % of what a program maps.
_UNRECLAIMABLE = {
    1: ("total_rss", "total_shmem"),
    2: ("anon", "shmem", "kernel_stack", "pagetables", "percpu", "sock", "slab_unreclaimable"),
}


class CgroupUnavailable(EngramError):
    """No memory limit can be set on this machine by this user."""


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """How a command fared under a memory limit."""

    returncode: int
    """As in `subprocess`: -9 if it was killed."""
    stdout: str
    """What it wrote to standard output."""
    stderr: str
    """What it wrote to standard error."""
    peak_unreclaimable_bytes: int
    """Highest sample of anonymous and shared memory of all its processes together; under
    cgroup v2 with page tables, stacks and other kernel memory that cannot be dropped."""
    peak_usage_bytes: int
    """The kernel's high-water mark of everything charged to the group, page cache included."""
    oom_killed: bool
    """Whether the kernel killed one of its processes for want of memory."""
    duration_s: float
    """Wall time from the start of the program to its end."""
    meter: str
    """``"cgroup v1"`` or ``"cgroup v2"``."""


def limited(
    argv: Sequence[str],
    limit_bytes: int,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 600.0,
) -> LimitedRun:
    """Run a command and all that it starts under one memory limit, without swap.

    Parameters
    ----------
    argv
        Program and arguments. Its standard input is empty. A program that does not exist
        ends with 127, as in a shell.
    limit_bytes
        Limit on all its processes together. The kernel rounds it down to whole pages.
    env
        Its environment; ``None`` for this process's own.
    cwd
        Its working folder; ``None`` for this process's own.
    timeout_s
        Kill it after so many seconds.

    Returns
    -------
    LimitedRun
        Also if the command failed or was killed: look at ``returncode`` and ``oom_killed``.

    Raises
    ------
    InputError
        If the limit is not above zero.
    CgroupUnavailable
        If this machine lets this user set no memory limit.
    subprocess.TimeoutExpired
        If it took longer; its output so far is attached.

    Notes
    -----
    Processes that the command leaves behind are killed when it ends. Memory that others had
    already paged in (a shared library, a file in the page cache) is charged to them.

    Examples
    --------
    >>> import sys
    >>> if cgroup_unavailable() is None:
    ...     run = limited([sys.executable, "-c", "print('hello')"], 200_000_000)
    ...     assert run.stdout.strip() == "hello" and not run.oom_killed
    """
    if limit_bytes <= 0:  # the kernel takes -1 for no limit
        raise InputError(f"A memory limit of {limit_bytes} bytes holds nothing. Use one above zero.")
    own = find_memory_cgroup()
    if own is None:
        raise CgroupUnavailable("This machine shows no cgroup that carries the memory controller.")
    command = [*_GATE, *argv]
    parent = next((folder for folder in own.levels if _takes_groups(folder, own.version)), None)
    if parent is not None:
        with _new_group(parent, own.version, limit_bytes) as group, _popen(command, env, cwd) as process:
            _move(process, group)
            return _watch(process, group, argv, timeout_s)
    if own.version == 1 or shutil.which("systemd-run") is None:
        raise CgroupUnavailable(f"This user may not write to {own.leaf}, nor to any group above it.")
    scope = f"engram-{os.getpid()}-{uuid4().hex}.scope"
    with _popen([*_scope_command(scope, limit_bytes), *command], env, cwd) as process:
        return _watch(process, _scope_group(process, scope), argv, timeout_s)


def cgroup_unavailable() -> str | None:
    """Say why no memory limit can be set here, or ``None`` if it can. Tries it with ``true``.

    Examples
    --------
    >>> import pytest
    >>> reason = cgroup_unavailable()
    >>> needs_cgroup = pytest.mark.skipif(reason is not None, reason=str(reason))
    """
    try:
        limited(["true"], 64 << 20)
    except CgroupUnavailable as unavailable:
        return str(unavailable)
    return None


@dataclass(frozen=True, slots=True)
class _Meters:
    unreclaimable_bytes: int = 0
    usage_bytes: int = 0
    n_oom_kills: int = 0

    def raised_to(self, later: _Meters) -> _Meters:
        return _Meters(*map(max, astuple(self), astuple(later)))


@dataclass(frozen=True, slots=True)
class _Group:
    folder: Path
    version: Literal[1, 2]

    def meters(self) -> _Meters:
        """Read all meters; zeros once systemd has removed the group with its last process."""
        try:
            stat = self._fields("memory.stat")
            unreclaimable_bytes = sum(stat.get(name, 0) for name in _UNRECLAIMABLE[self.version])
            return _Meters(unreclaimable_bytes, *(self._v1() if self.version == 1 else self._v2()))
        except OSError:
            if self.folder.exists():
                raise
            return _Meters()

    def _v1(self) -> tuple[int, int]:
        n_oom_kills = self._fields("memory.oom_control").get("oom_kill", 0)  # since Linux 4.13
        return self._number("memory.max_usage_in_bytes"), n_oom_kills

    def _v2(self) -> tuple[int, int]:
        # memory.peak came with Linux 5.19; before, usage is as good as its samples.
        has_peak = (self.folder / "memory.peak").exists()
        usage_bytes = self._number("memory.peak" if has_peak else "memory.current")
        return usage_bytes, self._fields("memory.events")["oom_kill"]

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def _fields(self, name: str) -> dict[str, int]:
        pairs = (line.split() for line in (self.folder / name).read_text().splitlines())
        return {key: int(value) for key, value in pairs}

    def kill_all(self) -> None:
        """Kill every process that is in the group now."""
        for pid in self._pids():
            _kill(pid)

    def remove(self) -> None:
        """Kill what is in the group, and remove it once that has ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self.kill_all()
            try:
                return self.folder.rmdir()
            except OSError as error:
                # Busy while a killed process is on its way out, listed or not.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_SAMPLE_S / 4)

    def _pids(self) -> list[int]:
        try:
            return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]
        except OSError:
            if self.folder.exists():
                raise
            return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself


def _takes_groups(folder: Path, version: int) -> bool:
    """Say whether this user may make a group here and move a process from below into it."""
    if not os.access(folder, os.W_OK):
        return False
    if version == 1:
        return True
    # v2 hands a controller down only where told to, and wants the common ancestor writable.
    controllers = (folder / "cgroup.subtree_control").read_text().split()
    return "memory" in controllers and os.access(folder / "cgroup.procs", os.W_OK)


@contextmanager
def _new_group(parent: Path, version: Literal[1, 2], limit_bytes: int) -> Iterator[_Group]:
    """Make a limited group; at the end, kill what is in it and remove it."""
    folder = parent / f"engram-{os.getpid()}-{uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        raise CgroupUnavailable(f"No group can be made in {parent}: {error.strerror}.") from error
    try:
        _limit(folder, version, limit_bytes)
    except CgroupUnavailable:
        folder.rmdir()
        raise
    group = _Group(folder, version)
    try:
        yield group
    finally:
        group.remove()


def _limit(folder: Path, version: int, limit_bytes: int) -> None:
    """Set the limit, and keep swap out: swapped memory would be missing from the meters."""
    names = {
        1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        2: ("memory.max", "memory.swap.max"),
    }
    memory, swap = names[version]
    try:
        (folder / memory).write_text(str(limit_bytes))
        if (folder / swap).exists():
            # v1 limits memory and swap together, v2 swap alone.
            (folder / swap).write_text(str(limit_bytes if version == 1 else 0))
        elif version == 1:  # booted without swap accounting
            (folder / "memory.swappiness").write_text("0")
    except OSError as error:
        raise CgroupUnavailable(f"No limit can be set in {folder}: {error.strerror}.") from error


@contextmanager
def _popen(
    command: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None
) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=cwd, encoding="utf-8", errors="replace"
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _move(process: subprocess.Popen[str], group: _Group) -> None:
    try:
        (group.folder / "cgroup.procs").write_text(str(process.pid))
    except OSError as error:
        raise CgroupUnavailable(f"No process can be moved to {group.folder}: {error.strerror}.") from error


def _scope_command(scope: str, limit_bytes: int) -> list[str]:
    properties = ("-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0")
    return ["systemd-run", "--user", "--scope", "--quiet", "--collect", f"--unit={scope}", *properties, "--"]


def _scope_group(process: subprocess.Popen[str], scope: str) -> _Group:
    """Wait until systemd has put the process into its scope, which it does before it becomes it."""
    deadline = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        own = find_memory_cgroup(pid=process.pid)
        if own is not None and own.leaf.name == scope:
            if not (own.leaf / "memory.max").exists():
                raise CgroupUnavailable(
                    "The user's systemd may not limit memory: the controller is not its own."
                )
            return _Group(own.leaf, 2)
        time.sleep(_SAMPLE_S / 4)
    process.kill()
    reason = process.communicate()[1].strip() or f"no scope after {_PATIENCE_S:.0f} s"
    raise CgroupUnavailable(f"No group here is writable, and systemd-run --user failed: {reason}")


def _watch(
    process: subprocess.Popen[str], group: _Group, argv: Sequence[str], timeout_s: float
) -> LimitedRun:
    """Open the gate, sample the meters until the program has ended, and report."""
    started = time.monotonic()
    opening: str | None = "\n"
    meters = _Meters()
    timed_out = False
    while True:
        try:
            stdout, stderr = process.communicate(opening, timeout=_SAMPLE_S)
            break
        except subprocess.TimeoutExpired:
            opening = None
        meters = meters.raised_to(group.meters())
        timed_out = timed_out or time.monotonic() - started > timeout_s
        if timed_out or process.poll() is not None:
            # Ended, but what it left behind holds its pipes open.
            group.kill_all()
    duration_s = time.monotonic() - started
    if timed_out:
        raise subprocess.TimeoutExpired(list(argv), timeout_s, stdout, stderr)
    meters = meters.raised_to(group.meters())
    # A scope goes with its last process and takes its counters along; who else would kill it?
    killed_unseen = process.returncode == -signal.SIGKILL and not group.folder.exists()
    return LimitedRun(
        returncode=process.returncode,
        stdout=stdout,
        stderr=stderr,
        peak_unreclaimable_bytes=meters.unreclaimable_bytes,
        peak_usage_bytes=meters.usage_bytes,
        oom_killed=meters.n_oom_kills > 0 or killed_unseen,
        duration_s=duration_s,
        meter=f"cgroup v{group.version}",
    )
