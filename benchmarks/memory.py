"""What a loader's memory grows by, and how soon the first batch of a very large store is there.

The stores are holes in files: they read as zeros, which the kernel caches and drops like what it
has read from a disk. What a process holds is the same.

- ``first batch``: stores of 100 GB, each in a fresh process per round, medians. Seconds from the
  call of ``store.windows(...)``, and from that of ``windows.loader(...)``, to the first batch;
  what the index holds, and what working it out took at most, by Python's own count.
- ``memory``: every case in a process of its own, under a real limit far below its store's size,
  iterates over a loader for ``--seconds``. All that its memory which the kernel cannot reclaim
  grows by after the imports counts: tables, index, order, ring and threads. It stays within the
  ``memory`` that the loader was given, by its own meter and by the kernel's, and does not creep:
  the median of the last third of the samples is that of the second. ``tests/promises`` runs the
  same for seconds.

Usage: python benchmarks/memory.py [--seconds N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engram.testing.cgroup import cgroup_unavailable, limited
from engram.testing.sparse import SparseCorpus, write_sparse
from engram.units import parse_bytes

MB = 1_000_000
LIBRARIES_BYTES = 500 * MB
"""What the limit leaves beside the budget: imports are 170 MB here, and page cache needs room."""
FEWEST_SAMPLES = 12
"""However slow the machine: three thirds of four batches, which is the whole ring."""

CORPORA = {
    "10 GB": SparseCorpus(n_recordings=200),
    "10 GB, int16": SparseCorpus(n_recordings=200, precision="int16"),
    "15 GB of volumes": SparseCorpus(
        n_recordings=30,
        n_samples=110,
        sample_shape=(150, 150, 100),
        rate_hz=1.0,
        n_events=5,
        precision="exact",
    ),
    "100 GB, 2,000 recordings": SparseCorpus(),
    "100 GB, 27,000 recordings": SparseCorpus(n_recordings=27_000, n_samples=14_400, n_events=40),
    "100 GB, 27,000 of int16": SparseCorpus(
        n_recordings=27_000, n_samples=14_400, n_events=40, precision="int16"
    ),
}

WINDOWS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {"window_size_s": 2.0},
    "sliding": {"window_size_s": 2.0, "window_stride_samples": 38},
    "trials": {"anchor": ("square", "circle"), "trial_duration_s": 2.0},
    "sentences": {"anchor": ("square", "circle")},
    "volumes": {"window_size_samples": 1},
}


@dataclass(frozen=True, slots=True)
class Case:
    """A loader to watch, with two threads wherever it runs: four batches, three of which are being read."""

    memory: str
    """What it may hold."""
    corpus: str
    """What it reads, by its name in ``CORPORA``."""
    windows: str
    """By their name in ``WINDOWS``."""
    batch_size: int
    """As large as four batches allow, so that the budget is used."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the loader."""


CASES = {
    "fixed": Case("200 MB", "10 GB", "fixed", 414),
    "sentences": Case("200 MB", "10 GB", "sentences", 235),
    "int16, checked": Case("200 MB", "10 GB, int16", "fixed", 420, {"check": "crc"}),
    "trials": Case("500 MB", "10 GB", "trials", 1100),
    "sliding, bfloat16": Case("500 MB", "10 GB", "sliding", 2200, {"dtype": "bfloat16"}),
    "volumes": Case("2 GB", "15 GB of volumes", "volumes", 50, {"dtype": "float32"}),
}
"""Of every budget, kind of window, precision, and with a check."""

FIRST_BATCHES = (
    ("100 GB, 2,000 recordings", "fixed"),
    ("100 GB, 2,000 recordings", "sliding"),
    ("100 GB, 2,000 recordings", "trials"),
    ("100 GB, 27,000 recordings", "fixed"),
    ("100 GB, 27,000 recordings", "sliding"),
    ("100 GB, 27,000 recordings", "trials"),
    ("100 GB, 27,000 of int16", "fixed"),
)


def spec_of(name: str) -> Any:
    """Give the windows of a name."""
    from engram.windows.spec import EventWindows, FixedWindows

    arguments = WINDOWS[name]
    return (EventWindows if "anchor" in arguments else FixedWindows)(signal="eeg", **arguments)


def watch(path: Path, case: Case, seconds: float) -> dict[str, Any]:
    """Iterate over a loader, epoch after epoch, and give what this process held."""
    import engram
    from engram.batches import windows as _  # noqa: F401 - torch too: what a user has imported before
    from engram.memory.usage import bound_usage, watch_peak

    imported_bytes = bound_usage().unreclaimable_bytes
    samples, n_bytes = array("q"), 0
    with watch_peak(0.01) as peak, engram.open(path) as store:
        windows = store.windows(spec_of(case.windows))
        options: dict[str, Any] = {"mode": "shuffled", "threads": 2, **case.options}
        loader = windows.loader(case.batch_size, memory=case.memory, **options)
        opened_bytes = peak.now().unreclaimable_bytes
        end = time.monotonic() + seconds
        while not _is_over(end, samples):
            for batch in loader:
                n_bytes += batch.X.nbytes
                if not samples:
                    _wait_for_ring()
                samples.append(bound_usage().unreclaimable_bytes)
                if _is_over(end, samples):
                    break
    third = len(samples) // 3
    return {
        "budget_bytes": loader.budget.allowed_bytes,
        "planned_bytes": loader.budget.spent_bytes,
        "tables_bytes": windows.tables_bytes,
        "imported_bytes": imported_bytes,
        "opened_bytes": opened_bytes,
        "peak_bytes": peak.peak_bytes,
        "creep_bytes": int(statistics.median(samples[-third:]) - statistics.median(samples[third:-third])),
        "n_batches": len(samples),
        "delivered_bytes": n_bytes,
    }


def _wait_for_ring() -> None:
    """Wait until the threads have filled all that they may, as they do before a long step."""
    from engram.memory.usage import bound_usage

    held = [bound_usage().unreclaimable_bytes]
    while len(held) < 5 or held[-1] - held[-5] > MB / 10:
        time.sleep(0.25)
        held.append(bound_usage().unreclaimable_bytes)


def _is_over(end: float, samples: array[int]) -> bool:
    return time.monotonic() >= end and len(samples) >= FEWEST_SAMPLES


def first_batch(path: Path, windows_name: str) -> dict[str, Any]:
    """Open a store, and give how long it takes from there to a batch."""
    import engram
    from engram.batches import windows as _  # noqa: F401 - torch too: what a user has imported before

    spec, begin = spec_of(windows_name), time.perf_counter()
    with engram.open(path) as store:
        opened = time.perf_counter()
        windows = store.windows(spec)
        made = time.perf_counter()
        batch = next(iter(windows.loader(64, mode="shuffled", memory="500 MB")))
        end = time.perf_counter()
        return {
            "n_windows": len(windows),
            "batch_bytes": batch.X.nbytes,
            "open_s": opened - begin,
            "from_windows_s": end - opened,
            "from_loader_s": end - made,
        }


def index_sizes(path: Path, windows_name: str) -> dict[str, Any]:
    """Work an index out, and give what it holds and what it took at most, by Python's own count."""
    import tracemalloc

    import engram
    from engram.batches.reading import tables_of
    from engram.windows.index import build_index

    with engram.open(path) as store:
        tables = tables_of(store)
        tracemalloc.start()
        index = build_index(tables, spec_of(windows_name))
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    return {"index_bytes": index.n_bytes, "index_held_bytes": held_bytes, "index_peak_bytes": peak_bytes}


def watch_limited(folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Watch a case in a process of its own, under a limit of its budget and what libraries take."""
    case = CASES[name]
    limit_bytes = LIBRARIES_BYTES + parse_bytes(case.memory)
    command = _command("watch", folder / case.corpus, name, str(seconds))
    run = limited(command, limit_bytes, timeout_s=seconds + 300)
    if run.returncode:
        raise RuntimeError(f"{name}: {'killed for its memory' if run.oom_killed else run.stderr}")
    told: dict[str, Any] = json.loads(run.stdout)
    peak_bytes = max(told["peak_bytes"], run.peak_unreclaimable_bytes)
    return {
        "case": name,
        "corpus": case.corpus,
        "batch_size": case.batch_size,
        **told,
        "kernel_peak_bytes": run.peak_unreclaimable_bytes,
        "growth_bytes": peak_bytes - told["imported_bytes"],
    }


def measure_first_batch(folder: Path, corpus: str, windows_name: str, n_rounds: int) -> dict[str, Any]:
    """Take medians of fresh processes."""
    rounds = [_told("first", folder / corpus, windows_name) for _ in range(n_rounds)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "corpus": corpus,
        "windows": windows_name,
        **medians,
        **_told("index", folder / corpus, windows_name),
    }


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, __file__, "--child", *map(str, arguments)]


def _told(*arguments: str | Path) -> dict[str, Any]:
    run = subprocess.run(_command(*arguments), check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(run.stdout)
    return told


def child(what: str, path: str, name: str, seconds: str = "0") -> dict[str, Any]:
    """Do one measurement in this process."""
    if what == "watch":
        return watch(Path(path), CASES[name], float(seconds))
    return first_batch(Path(path), name) if what == "first" else index_sizes(Path(path), name)


def show_first_batch(found: Mapping[str, Any]) -> str:
    """Write one line of the first table."""
    return (
        f"{found['corpus']:26} {found['windows']:8} {found['n_windows']:11,} {found['open_s']:7.3f} s "
        f"{found['from_windows_s']:9.2f} s {found['from_loader_s']:8.2f} s "
        f"{found['index_held_bytes'] / MB:8.2f} MB {found['index_peak_bytes'] / MB:9.1f} MB"
    )


def show_memory(found: Mapping[str, Any]) -> str:
    """Write one line of the second table."""
    opened_bytes = found["opened_bytes"] - found["imported_bytes"]
    return (
        f"{found['case']:18} {found['budget_bytes'] / MB:6.0f} MB {found['planned_bytes'] / MB:8.1f} MB "
        f"{opened_bytes / MB:6.1f} MB {found['growth_bytes'] / MB:8.1f} MB "
        f"{found['creep_bytes'] / MB:8.3f} MB {found['n_batches']:7,} "
        f"{found['delivered_bytes'] / 1e9:6.0f} GB"
    )


def main() -> None:
    """Measure both, print both tables, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of every case of memory")
    parser.add_argument("--rounds", type=int, default=5, help="of every first batch")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("engram", "numpy", "pyarrow", "torch"))
    print(f"{os.cpu_count()} cores, {platform.machine()}, {versions}\n")
    found: dict[str, list[dict[str, Any]]] = {"first_batch": [], "memory": []}
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as temporary:
        folder = Path(temporary)
        for name, corpus in CORPORA.items():
            write_sparse(folder / name, corpus)
        print("store, windows, their number; open; first batch from windows(), loader(); index; making it")
        for name, windows_name in FIRST_BATCHES:
            found["first_batch"].append(measure_first_batch(folder, name, windows_name, options.rounds))
            print(show_first_batch(found["first_batch"][-1]), flush=True)
        if (reason := cgroup_unavailable()) is not None:
            print(f"\nNo memory limit can be set here: {reason}")
        else:
            print("\ncase; memory=; planned; growth after imports: when opened, at most; creep; batches")
            # All at once: what they hold does not depend on how fast they are.
            with ThreadPoolExecutor(len(CASES)) as pool:
                for each in pool.map(lambda case: watch_limited(folder, case, options.seconds), CASES):
                    found["memory"].append(each)
                    print(show_memory(each), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
