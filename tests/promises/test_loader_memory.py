"""The budget of a loader, under a real limit, with two meters: ``benchmarks/memory.py`` for some seconds.

Budgets are compared with growth since the imports. Opening the store, its tables and the index
count, though who gives ``memory`` to a loader has them already: so nobody has to ask which of them
the figure covers.

Whether it creeps, the benchmark says after minutes: within seconds, what allocators keep of the threads'
work comes and goes by megabytes. What Python, NumPy and Arrow hold is counted exactly instead.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import engram
from engram.testing.cgroup import cgroup_unavailable
from engram.testing.sparse import SparseCorpus, write_sparse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cgroup_unavailable() is not None, reason=f"no memory limit: {cgroup_unavailable()}"),
]

SECONDS = 2.0
MEMORY = "200 MB"
ARRAY_BYTES = sys.getsizeof(np.empty(0))
MB = 1_000_000
THREADS_BYTES = 2 * MB
"""Stacks of threads, and what the C library's allocator keeps for each: in the line of the tables."""


def load_benchmark() -> Any:
    """Import the script, which is in no package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


@pytest.mark.parametrize("name", benchmark.CASES)
def test_a_loader_grows_by_no_more_than_its_budget(tmp_path: Path, name: str) -> None:
    """Over budgets, windows, precisions and checks, of stores 7 to 50 times as large."""
    case = benchmark.CASES[name]
    write_sparse(tmp_path / case.corpus, benchmark.CORPORA[case.corpus])
    found = benchmark.watch_limited(tmp_path, name, SECONDS)

    # The budget is used: with room for any number of batches, this would show nothing.
    assert found["planned_bytes"] > 0.8 * found["budget_bytes"]
    assert found["growth_bytes"] <= found["budget_bytes"]
    since_opened_bytes = found["peak_bytes"] - found["opened_bytes"]
    # What was planned is what is held, to 1 %.
    planned_bytes = found["planned_bytes"] - found["tables_bytes"]
    assert 0.95 * planned_bytes <= since_opened_bytes <= planned_bytes + THREADS_BYTES
    # Both meters saw the same; page tables are in one of them.
    assert found["kernel_peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.05)


@pytest.mark.parametrize("name", benchmark.CASES)
def test_a_batch_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    """A thousand of them: less than an array's head of each, of which most is what NumPy keeps for later."""
    case = benchmark.CASES[name]
    write_sparse(tmp_path, replace(benchmark.CORPORA[case.corpus], n_recordings=2))
    with engram.open(tmp_path) as store:
        windows = store.windows(benchmark.spec_of(case.windows))
        loader = windows.loader(
            len(windows) // 200, mode="shuffled", threads=2, memory=MEMORY, **case.options
        )
        tracemalloc.start()
        try:
            n_batches, first_bytes = _after_epochs(loader, 1)
            n_more, then_bytes = _after_epochs(loader, 5)
        finally:
            tracemalloc.stop()
    assert n_batches >= 200
    assert then_bytes - first_bytes < ARRAY_BYTES * n_more


def _after_epochs(loader: Any, n_epochs: int) -> tuple[int, int]:
    """Count batches, and what is held after them."""
    n_batches = sum(1 for _ in range(n_epochs) for _ in loader)
    gc.collect()
    return n_batches, tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()


PANDAS = """
import sys
import engram
from engram.windows.spec import EventWindows

with engram.open(sys.argv[1]) as store:
    windows = store.windows(EventWindows(signal="eeg", anchor=("square",), trial_duration_s=1.0))
    batch = next(iter(windows.loader(4, mode="shuffled", memory="20 MB")))
assert "pandas" not in sys.modules
"""


def test_a_first_batch_needs_no_pandas(tmp_path: Path) -> None:
    """Arrow imports it where it can, to give an array to NumPy: 29 MB and a tenth of a second for nothing."""
    write_sparse(tmp_path / "store", SparseCorpus(n_recordings=2))
    subprocess.run([sys.executable, "-c", PANDAS, str(tmp_path / "store")], check=True)
