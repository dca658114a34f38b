"""How much longer a training step takes when its batches come from a store, and not from memory.

The store is six times as large as the memory that the process may have, and windows come in global
shuffle. Two arms take turns: ``ram`` hands the same few batches to the step again and again,
``engram`` those of a loader. Steps:

- ``waiting``: copies the batch, as if to a GPU, and waits 20 ms for it. Two cores.
- ``long``: copies the batch, and multiplies two large matrices on one core for 20 ms. Two cores.
- ``short``: the same with a hundred small products. The worst case: after each of them it wants the
  interpreter's lock back, which the loader's threads hold for some tenths of a millisecond per batch.
- ``training``: forward, backward and optimizer of a small network on all cores. Here the loader
  takes its time from the step, so its share of the processor is the figure to look at.

Each kind of step is a process of its own in a memory cgroup. What the disk delivered is counted:
where that is not what was read, batches came from memory after all.

Usage: python benchmarks/training_step.py [--folder FOLDER] [--pairs N] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

import engram
from engram.store.medium import forget, total_disk_bytes
from engram.testing.cgroup import cgroup_unavailable, limited

if TYPE_CHECKING:
    from torch import Tensor

    from engram.batches.windows import Windows

Step: TypeAlias = "Callable[[Tensor], object]"

CAP_BYTES = 640 * 10**6
"""Python, PyTorch and braindecode hold 450 MB of it; what is left is for batches and page cache."""
STORE_BYTES = 6 * CAP_BYTES
LOADER_MEMORY = "60 MB"
N_CHANNELS, WINDOW_SAMPLES, RATE_HZ = 129, 200, 100.0
WINDOW_BYTES = N_CHANNELS * WINDOW_SAMPLES * 2
"""A window as it is stored, in float16."""
WINDOWS_PER_RECORDING = 500
BATCH_WINDOWS = 64
N_IN_RAM = 4
"""Batches of the arm ``ram``: 26 MB, more than the processor's own caches hold for one core."""
STEP_S = 0.02
N_WARM_UP = 8
"""Steps of a turn before the clock starts: they use up what was read while the other arm had its turn."""
N_STEPS = 20
"""Steps of a turn on the clock."""
N_TURNS = {"waiting": 5, "long": 5, "short": 5, "training": 2}
"""Turns of each arm in a pair; short ones, so that what disturbs the machine disturbs both arms. All
pairs together stay below one epoch, so that no window is read twice."""


def write_store(folder: Path) -> None:
    """Write recordings of noise; the same in each, since what counts is where they lie."""
    shape = (WINDOWS_PER_RECORDING * WINDOW_SAMPLES, N_CHANNELS)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(30)
    n_recordings = -(-STORE_BYTES // (WINDOWS_PER_RECORDING * WINDOW_BYTES))
    recording = engram.ArrayRecording({"eeg": engram.ArraySignal(noise, RATE_HZ)})
    source = engram.ArraySource({f"{number:03d}": recording for number in range(n_recordings)})
    engram.prepare(source, folder, precision={"eeg": "float16"}).store.close()


# ---------------------------------------------------------------- steps


def make_waiting(_: Windows) -> Step:
    """Wait as for a GPU: the interpreter's lock is free meanwhile, and so is the core."""
    import torch

    torch.set_num_threads(1)
    device = torch.empty(BATCH_WINDOWS, N_CHANNELS, WINDOW_SAMPLES)

    def step(X: Tensor) -> None:  # noqa: N803 - a batch's word
        device.copy_(X)
        time.sleep(STEP_S)

    return step


def make_busy(size: int) -> Step:
    """Multiply matrices on one core."""
    import torch

    torch.set_num_threads(1)
    device = torch.empty(BATCH_WINDOWS, N_CHANNELS, WINDOW_SAMPLES)
    matrix, product = torch.randn(size, size), torch.empty(size, size)

    def multiply(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            torch.mm(matrix, matrix, out=product)
        return time.perf_counter() - begin

    multiply(3)  # the first ones choose how
    n_products = math.ceil(STEP_S / statistics.median(multiply(1) for _ in range(100)))

    def step(X: Tensor) -> None:  # noqa: N803 - a batch's word
        device.copy_(X)
        multiply(n_products)

    return step


def make_training(windows: Windows) -> Step:
    """Train SCCNet: the cheapest of braindecode's networks, so the one that asks most of a loader."""
    import torch

    from engram.training.models import build_model

    network = build_model("SCCNet", windows.with_targets(np.zeros(len(windows))))
    optimizer = torch.optim.AdamW(network.parameters())
    y = torch.randn(BATCH_WINDOWS, 1)

    def step(X: Tensor) -> None:  # noqa: N803 - a batch's word
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.mse_loss(network(X), y))
        optimizer.step()

    return step


STEPS: dict[str, Callable[[Windows], Step]] = {
    "waiting": make_waiting,
    "long": lambda _: make_busy(1000),
    "short": lambda _: make_busy(256),
    "training": make_training,
}


# ---------------------------------------------------------------- arms


def run_pairs(store: Path, kind: str, n_pairs: int) -> None:
    """Run both arms here, and print for each pair what its steps took, as JSON."""
    if kind != "training":  # one core for the step, and one for the loader
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    windows = engram.open(store).windows(
        engram.FixedWindows(signal="eeg", window_size_samples=WINDOW_SAMPLES)
    )
    loader = windows.loader(BATCH_WINDOWS, mode="shuffled", memory=LOADER_MEMORY)
    step = STEPS[kind](windows)
    batches: dict[str, Iterator[Tensor]] = {
        "ram": cycle([batch.signals["eeg"].clone() for batch in islice(loader, N_IN_RAM)]),
        "engram": (batch.signals["eeg"] for batch in loader),
    }
    print(json.dumps([run_pair(batches, step, N_TURNS[kind]) for _ in range(n_pairs)]))


def run_pair(batches: Mapping[str, Iterator[Tensor]], step: Step, n_turns: int) -> dict[str, Any]:
    """Give for each arm what a step took, on average over its turns."""
    turns: dict[str, list[dict[str, float]]] = {arm: [] for arm in batches}
    for _ in range(n_turns):
        for arm, of_arm in batches.items():
            turns[arm].append(run_turn(of_arm, step))
    return {
        arm: {name: statistics.mean(turn[name] for turn in each) for name in each[0]}
        for arm, each in turns.items()
    }


def run_turn(batches: Iterator[Tensor], step: Step) -> dict[str, float]:
    """Time some steps."""
    for X in islice(batches, N_WARM_UP):  # noqa: N806 - a batch's word
        step(X)
    before, waited_s, handed_cpu_s = clocks(), 0.0, 0.0
    for _ in range(N_STEPS):
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        X = next(batches)  # noqa: N806 - a batch's word
        waited_s += time.perf_counter() - begin_s
        handed_cpu_s += time.thread_time() - begin_cpu_s
        step(X)
    wall_s, process_s, readers_s, disk_bytes = (
        now - then for now, then in zip(clocks(), before, strict=True)
    )
    return {
        "step_ms": wall_s / N_STEPS * 1e3,
        "waited_ms": waited_s / N_STEPS * 1e3,
        "cpu_ms": process_s / N_STEPS * 1e3,
        "loader_cpu_ms": (readers_s + handed_cpu_s) / N_STEPS * 1e3,
        "disk_bytes_per_window": disk_bytes / N_STEPS / BATCH_WINDOWS,
    }


def clocks() -> tuple[float, float, float, int]:
    """Give wall time, processor time of the process and of the loader's threads, and bytes from disk."""
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("engram-read")]
    each = (time.pthread_getcpuclockid(thread.ident) for thread in readers if thread.ident is not None)
    disk_bytes = total_disk_bytes()
    assert disk_bytes is not None, "where memory can be limited, the disk is counted"
    return time.perf_counter(), time.process_time(), sum(map(time.clock_gettime, each)), disk_bytes


# ---------------------------------------------------------------- figures


def measure(store: Path, kind: str, n_pairs: int) -> dict[str, Any]:
    """Run one kind of step under the memory limit, and take medians over the pairs."""
    # What wrote the store left much of it in the page cache, where it counts as that process's memory.
    forget(path for path in store.rglob("*") if path.is_file())
    command = [sys.executable, __file__, "--pairs", str(n_pairs), "--store", str(store), "--step", kind]
    run = limited(command, CAP_BYTES)
    if run.returncode:
        sys.exit(f"{kind}: ended with {run.returncode}, killed for memory: {run.oom_killed}\n{run.stderr}")
    pairs = json.loads(run.stdout.splitlines()[-1])
    ratios = [pair["engram"]["step_ms"] / pair["ram"]["step_ms"] for pair in pairs]
    shares = [pair["engram"]["loader_cpu_ms"] / pair["engram"]["cpu_ms"] for pair in pairs]
    medians = {
        f"{arm}_{name}": statistics.median(pair[arm][name] for pair in pairs)
        for arm in ("ram", "engram")
        for name in pairs[0][arm]
    }
    return {
        "step": kind,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loader_share_of_cpu": statistics.median(shares),
        "peak_unreclaimable_mb": run.peak_unreclaimable_bytes / 1e6,
        "peak_usage_mb": run.peak_usage_bytes / 1e6,
        **medians,
    }


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print a line of each kind of step."""
    print("step      from RAM  from store   ratio (of pairs)        loader's processor time   from disk")
    for each in found:
        spread = f"{each['ratio']:.3f} ({min(each['ratios']):.3f} to {max(each['ratios']):.3f})"
        loader = f"{each['engram_loader_cpu_ms']:.1f} ms, {each['loader_share_of_cpu']:.1%} of all"
        from_disk = each["engram_disk_bytes_per_window"] / WINDOW_BYTES
        print(
            f"{each['step']:9} {each['ram_step_ms']:5.1f} ms   {each['engram_step_ms']:6.1f} ms   {spread:22}"
            f"  {loader:23}  {from_disk:8.0%}"
        )
    print("promised: a ratio of at most 1.02 for waiting")


def main() -> None:
    """Write the store, measure every kind of step, and remove the store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the store is written, on the disk to measure")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_pairs(options.store, options.step, options.pairs)
        return
    if (reason := cgroup_unavailable()) is not None:
        print(f"Not measured: {reason}")
        return
    folder = Path(tempfile.mkdtemp(prefix="engram-bench-", dir=options.folder))
    try:
        write_store(folder / "store")
        found = [measure(folder / "store", kind, options.pairs) for kind in STEPS]
    finally:
        shutil.rmtree(folder)
    machine = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("engram", "torch", "numpy", "braindecode")},
        "cap_mb": CAP_BYTES / 1e6,
        "store_mb": STORE_BYTES / 1e6,
        "pairs": options.pairs,
    }
    if options.json:
        print(json.dumps({**machine, "steps": found}, indent=1))
        return
    print(json.dumps(machine))
    show(found)


if __name__ == "__main__":
    main()
