"""Machine: what it is, and what it can do without any reader.

Two limits: ``np.copyto`` between two arrays, which is what delivering a batch takes at the least, and random
reads of the disk past the page cache, by fio where it is installed. A machine that is shared changes from
minute to minute: a limit is measured right before and right after each cell that is compared with it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
from benchmarks.loading.corpus import WINDOW_BYTES

from engram.store.medium import read_ahead_kb, read_at_random

COPY_BYTES = 256 << 20
BLOCK_BYTES = 4096
READ_BYTES = -(-WINDOW_BYTES // BLOCK_BYTES) * BLOCK_BYTES
"""A window in whole blocks, as direct reads want it: 53,248 bytes."""
DEPTH = 32


def copy_gb_per_s() -> float:
    """Measure ``np.copyto`` between two float32 arrays of 256 MiB, one thread: bytes copied."""
    source, target = np.ones(COPY_BYTES // 4, np.float32), np.zeros(COPY_BYTES // 4, np.float32)
    durations_s = []
    for _ in range(7):
        begin = time.perf_counter()
        np.copyto(target, source)
        durations_s.append(time.perf_counter() - begin)
    return COPY_BYTES / statistics.median(durations_s) / 1e9


def disk_meter() -> str:
    """Name what measures the disk."""
    return "fio" if shutil.which("fio") else "Engram's own threads with O_DIRECT, as fio is not installed"


def disk_gb_per_s(path: Path, seconds: float) -> float:
    """Measure random reads of a window's size in a file, 32 at once, past the page cache."""
    if shutil.which("fio") is None:
        measured = read_at_random([path], READ_BYTES, seconds).gb_per_s
        if measured is None:
            raise OSError(f"{path} is not read from a disk: its file system keeps it in memory.")
        return measured
    options = {
        "name": "windows", "filename": str(path), "rw": "randread", "bs": READ_BYTES, "direct": 1,
        "ioengine": "libaio", "iodepth": DEPTH, "runtime": seconds, "time_based": 1, "readonly": 1,
        # Else the same places every time, which the host of a virtual machine has in its own memory by then.
        "randrepeat": 0,
        "output-format": "json",
    }  # fmt: skip
    words = [f"--{name}" if name == "readonly" else f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(["fio", *words], capture_output=True, text=True, check=True)
    bytes_per_s = json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]
    return float(bytes_per_s) / 1e9


def describe_machine(folder: Path) -> dict[str, str]:
    """Describe the machine in words: no names, no paths."""
    memory_gb = psutil.virtual_memory().total / 1e9
    read_ahead = read_ahead_kb(folder)
    release = re.match(r"[\d.]*\d", platform.release())
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory_gb:.0f} GB",
        "disk": f"{_file_system(folder)}, read-ahead "
        + ("unknown" if read_ahead is None else f"{read_ahead:,} KiB"),
        "system": f"{platform.system()} {release[0] if release else ''}, Python {platform.python_version()}",
    }


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    mounts = [each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype


def version_of(distribution: str) -> str:
    """Give an installed version, or say that there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
