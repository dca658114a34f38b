"""Limits: what bounds this process's memory, shared memory and disk here.

This module decides which limits exist and how much of each is taken, by reading only: the
memory cgroup from leaf to root, SLURM's variables, the host, ``/dev/shm``, disks. How much
of what is left a job may plan with is left to ``engram.memory.budget``.

A limit's use never includes page cache, as the kernel drops that before it refuses memory.
Files that are absent mean that a limit is absent; files that cannot be understood are an
error, as a limit misread is a job killed later.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from engram.errors import InputError
from engram.memory import usage

__all__ = [
    "Limit",
    "MemoryCgroup",
    "binding_limit",
    "disk_limit",
    "find_memory_cgroup",
    "memory_limits",
    "shm_limit",
]

# cgroup v1 writes "no limit" as the largest multiple of a page in a signed 64-bit integer.
_UNLIMITED_BYTES = 2**62
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit on a resource, and what is taken of it.

    Examples
    --------
    >>> Limit("cgroup v2", allowed_bytes=1000, used_bytes=300, where="memory.max").free_bytes
    700
    """

    kind: str
    """``"cgroup v1"``, ``"cgroup v2"``, ``"cgroup v2 high"`` (above it the kernel slows
    the job down instead of killing it), ``"SLURM"``, ``"host"``, ``"/dev/shm"`` or ``"disk"``."""
    allowed_bytes: int
    """Where the limit lies."""
    used_bytes: int
    """What counts against it now and cannot be reclaimed."""
    where: str
    """The file, folder or variables that the limit was read from."""

    @property
    def free_bytes(self) -> int:
        """What is left, never below zero."""
        return max(0, self.allowed_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """Where the memory cgroup of a process lies."""

    version: Literal[1, 2]
    """Version of the hierarchy that carries the memory controller."""
    leaf: Path
    """Folder of the process's own group, or the mount where that is not visible."""
    mount: Path
    """Folder of the highest group that is visible."""

    @property
    def levels(self) -> tuple[Path, ...]:
        """Every group that binds the process, from leaf to mount."""
        depth = len(self.leaf.relative_to(self.mount).parts)
        return (self.leaf, *self.leaf.parents)[: depth + 1]


def memory_limits(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> tuple[Limit, ...]:
    """List every limit on this process's memory: cgroups from leaf to root, SLURM, the host.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` lie.
    env
        Environment variables.

    Returns
    -------
    tuple of Limit
        The host's is always there and is the last one.

    Raises
    ------
    InputError
        If a file or variable does not read as the kernel or SLURM writes it.

    Notes
    -----
    Against SLURM's and the host's limit counts what this process tree holds. SLURM's variables
    are heeded even where the cluster does not enforce them: others rely on them.

    References
    ----------
    The Linux kernel's ``Documentation/admin-guide/cgroup-v2.rst`` and
    ``cgroup-v1/memory.rst``; ``man sbatch``, output environment variables.

    Examples
    --------
    >>> memory_limits()[-1].kind
    'host'
    """
    own_bytes = usage.read_usage(root=root).unreclaimable_bytes
    group = find_memory_cgroup(root)
    in_cgroups = () if group is None else tuple(_cgroup_limits(group))
    return (*in_cgroups, *_slurm_limits(env, own_bytes), _host_limit(root, own_bytes))


def binding_limit(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> Limit:
    """Find the memory limit that leaves least.

    Parameters
    ----------
    root, env
        As for `memory_limits`.

    Examples
    --------
    >>> binding_limit().free_bytes > 0
    True
    """
    return min(memory_limits(root, env), key=lambda limit: limit.free_bytes)


def shm_limit(root: Path = Path("/")) -> Limit | None:
    """Read the size of ``/dev/shm``, which batches from loader workers pass through.

    Containers often give it 64 MB, and a worker that writes beyond dies of a bus error.

    Parameters
    ----------
    root
        Where ``dev`` lies.

    Returns
    -------
    Limit or None
        None if there is no ``/dev/shm``, or it has no size of its own.
    """
    folder = root / "dev/shm"
    if not folder.is_dir():
        return None
    limit = _file_system_limit("/dev/shm", folder)  # noqa: S108 - its size is read, nothing written
    # A tmpfs mounted with size=0 has no limit and shows zero blocks.
    return limit if limit.allowed_bytes else None


def disk_limit(path: Path) -> Limit:
    """Read how much the file system of a path still takes from this user.

    Quotas that the file system does not show in its own figures are not seen.

    Parameters
    ----------
    path
        A file or folder, which need not exist yet.

    Examples
    --------
    >>> disk_limit(Path("a/store/that/comes")).kind
    'disk'
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return _file_system_limit("disk", existing)


def _file_system_limit(kind: str, folder: Path) -> Limit:
    # "free" is what an unprivileged user may take; what is reserved for root is not in it.
    figures = shutil.disk_usage(folder)
    return Limit(kind, figures.used + figures.free, figures.used, str(folder))


def find_memory_cgroup(root: Path = Path("/"), pid: int | None = None) -> MemoryCgroup | None:
    """Find the group that a process's memory is charged to.

    Where both hierarchies are mounted, the memory controller is in v1 if ``/proc/PID/cgroup``
    lists it there.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` lie.
    pid
        The process; ``None`` for the calling one.

    Returns
    -------
    MemoryCgroup or None
        None if there are no cgroups, none carries the memory controller, or none is mounted.

    Raises
    ------
    InputError
        If a file of ``/proc`` does not read as the kernel writes it.
    """
    process = root / "proc" / ("self" if pid is None else str(pid))
    own = _own_group(process / "cgroup")
    if own is None:
        return None
    version, path = own
    mounts = list(_mounts(process / "mountinfo", version))
    for mounted, point in mounts:
        mount = root / point.relative_to("/")
        # A container may show its own group as the mount, or a path from outside ("/../job").
        if path.is_relative_to(mounted) and ".." not in path.parts:
            leaf = mount / path.relative_to(mounted)
            if leaf.is_dir():
                return MemoryCgroup(version, leaf, mount)
    if not mounts:
        return None
    mount = root / mounts[0][1].relative_to("/")
    return MemoryCgroup(version, mount, mount)


def _own_group(file: Path) -> tuple[Literal[1, 2], PurePosixPath] | None:
    unified = None
    for line in _lines(file):
        parts = line.split(":", 2)
        if len(parts) != 3:
            raise _unreadable(file, line, "HIERARCHY:CONTROLLERS:PATH")
        hierarchy, controllers, path = parts
        if "memory" in controllers.split(","):
            return 1, PurePosixPath(path)
        if hierarchy == "0":
            unified = PurePosixPath(path)
    return None if unified is None else (2, unified)


def _mounts(file: Path, version: int) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Pairs of the group that is mounted and the folder it is mounted on."""
    for line in _lines(file):
        fields, _, rest = line.partition(" - ")
        numbered, details = fields.split(), rest.split()
        if len(numbered) < 6 or len(details) < 3:
            raise _unreadable(file, line, "proc_pid_mountinfo(5)")
        kind, options = details[0], details[2].split(",")
        if kind == "cgroup2" if version == 2 else kind == "cgroup" and "memory" in options:
            yield _unescaped(numbered[3]), _unescaped(numbered[4])


def _unescaped(path: str) -> PurePosixPath:
    return PurePosixPath(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path))


def _cgroup_limits(group: MemoryCgroup) -> Iterator[Limit]:
    read = _v1_limits if group.version == 1 else _v2_limits
    for folder in group.levels:
        yield from read(folder)


def _v2_limits(folder: Path) -> Iterator[Limit]:
    for kind, name in (("cgroup v2", "memory.max"), ("cgroup v2 high", "memory.high")):
        allowed_bytes = _number(folder / name, besides="max")
        if allowed_bytes is not None:
            stat = _stat(folder / "memory.stat")
            cache_bytes = stat.get("active_file", 0) + stat.get("inactive_file", 0)
            used_bytes = max(0, _required(folder / "memory.current") - cache_bytes)
            yield Limit(kind, allowed_bytes, used_bytes, str(folder / name))


def _v1_limits(folder: Path) -> Iterator[Limit]:
    file = folder / "memory.limit_in_bytes"
    allowed_bytes = _number(file)
    if allowed_bytes is not None and allowed_bytes < _UNLIMITED_BYTES:
        stat = _stat(folder / "memory.stat")
        cache_bytes = stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
        used_bytes = max(0, _required(folder / "memory.usage_in_bytes") - cache_bytes)
        yield Limit("cgroup v1", allowed_bytes, used_bytes, str(file))


def _slurm_limits(env: Mapping[str, str], own_bytes: int) -> Iterator[Limit]:
    per_node_mib = _variable(env, "SLURM_MEM_PER_NODE")
    if per_node_mib:  # 0 is the whole node: no limit beside the host's
        yield Limit("SLURM", per_node_mib * _MIB, own_bytes, "SLURM_MEM_PER_NODE")
    per_cpu_mib = _variable(env, "SLURM_MEM_PER_CPU")
    # salloc's own shell on the login node has no such count, and no limit applies to it.
    n_cpus = _variable(env, "SLURM_CPUS_ON_NODE")
    if per_cpu_mib and n_cpus:
        where = "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE"
        yield Limit("SLURM", per_cpu_mib * n_cpus * _MIB, own_bytes, where)


def _variable(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "0")
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, where SLURM writes a whole number. Unset or mend it.")
    return int(text)


def _host_limit(root: Path, own_bytes: int) -> Limit:
    file = root / "proc/meminfo"
    for line in _lines(file):
        if match := re.fullmatch(r"MemAvailable:\s+(\d+) kB", line):
            return Limit("host", int(match[1]) * 1024 + own_bytes, own_bytes, str(file))
    import psutil  # only where there is no such line: macOS, Windows, Linux before 3.14

    available_bytes = psutil.virtual_memory().available
    return Limit("host", available_bytes + own_bytes, own_bytes, "psutil.virtual_memory")


def _lines(file: Path) -> list[str]:
    """Read the lines of a file; none if it is absent."""
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []


def _number(file: Path, besides: str | None = None) -> int | None:
    """Read the number in a file; None if it is absent or says ``besides``."""
    lines = _lines(file)
    if not lines or lines == [besides]:
        return None
    if len(lines) != 1 or not lines[0].isdecimal():
        raise _unreadable(file, lines[0], "one whole number of bytes")
    return int(lines[0])


def _required(file: Path) -> int:
    number = _number(file)
    if number is None:
        raise _unreadable(file, "", "one whole number of bytes")
    return number


def _stat(file: Path) -> dict[str, int]:
    """Fields of a ``memory.stat``; none if it is absent, as in some sandboxes.

    What is then not subtracted makes the use look higher, never lower.
    """
    fields = {}
    for line in _lines(file):
        name, _, value = line.partition(" ")
        if not value.isdecimal():
            raise _unreadable(file, line, "lines of NAME BYTES")
        fields[name] = int(value)
    return fields


def _unreadable(file: Path, found: str, rule: str) -> InputError:
    return InputError(f"{file} says {found!r}, not {rule}. State the memory budget, such as '2 GB'.")
