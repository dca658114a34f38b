"""Run: the cells of a plan in order, each in a process of its own under a memory limit.

This module decides what happens between two measurements. Every round visits every cell once, in a
new order, so that a machine that is slow for a minute is slow for all alike; the cells of one form
come one after another, warm before capped, so that its files are read into the page cache once. Two
processes at a time import their libraries; then one after the other measures. Before that its files are read
in whole for a warm cell, and dropped for a capped one; the first one's while both import. A warm cell that
made the disk read is measured again, and then has nothing in this round; without any round it has no row.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.loading.cell import GATE_S, SLOW_WINDOWS_PER_S, Measured, Task, imported_mark
from benchmarks.loading.corpus import WINDOW_BYTES, WINDOW_SAMPLES, Corpus, write_corpus
from benchmarks.loading.machine import copy_gb_per_s, disk_gb_per_s
from benchmarks.loading.reader import Reader, Regime

from engram.store.medium import forget
from engram.testing.cgroup import LimitedRun, limited
from engram.units import format_bytes

ROOT = Path(__file__).resolve().parents[2]
UNLIMITED_BYTES = 1 << 42
"""A limit that limits nothing: the cgroup is then only a meter."""
CELL_TIMEOUT_S = 240.0
PREPARATION_TIMEOUT_S = 1800.0
FREE_SPACE_MARGIN = 1.1
READ_BYTES, SMALL_FILES_AT_ONCE = 8 << 20, 8
"""How files are read in whole: two readers have 60,000 and 120,000 small ones, half a minute one after
another. Large ones are, so that the page cache holds each in large pieces."""
FORMS_AT_ONCE = 2
"""Are written: most take one core."""
IMPORTING_AT_ONCE = 2
"""Processes, before the first of them measures: to import takes as long as to measure, and one core."""
WARM_DISK_SHARE, WARM_DISK_BYTES_PER_S = 0.01, 50 * 10**6
"""What a warm cell may have from the disk: a share of what it delivers, and what takes a disk some
hundredths of the time, for libraries, and where the system takes pages back that were idle for seconds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    readers: tuple[Reader, ...]
    """Whom."""
    regimes: tuple[Regime, ...]
    """In which regimes."""
    n_recordings: int
    """Size of the corpus."""
    cap_bytes: int
    """Memory of all processes of a capped cell, page cache included."""
    rounds: int
    """How often each cell is measured."""
    seconds: float
    """For how long."""
    folder: Path
    """Where the corpus and its forms are written."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be."""

    reader: Reader
    workers: int
    regime: Regime

    @property
    def stride_samples(self) -> int:
        """From window to window."""
        return WINDOW_SAMPLES // 2 if self.regime == "overlap" else WINDOW_SAMPLES

    def __str__(self) -> str:
        return f"{self.regime:8} {self.reader.name}, {self.workers} workers"


@dataclass(slots=True)
class Runs:
    """What came of a cell so far."""

    measured: list[Measured] = field(default_factory=list)
    limits_gb_per_s: list[float] = field(default_factory=list)
    """What the machine could do meanwhile, one per measurement: of Engram's cells, warm and capped."""
    peak_bytes: int = 0
    outcome: str = "measured"
    """``measured``, ``killed`` (out of memory) or ``timed out``."""
    error: str = ""
    """The reader failed, or delivered something else."""
    cold: str = ""
    """Why the last round does not count: what a warm cell had from the disk."""

    @property
    def failure(self) -> str:
        """Why there is no row; empty where there is one."""
        return self.error or ("" if self.measured else self.cold)

    @property
    def is_over(self) -> bool:
        """Whether the cell is not measured again."""
        is_slow = any(each.windows_per_s < SLOW_WINDOWS_PER_S for each in self.measured)
        return is_slow or self.outcome != "measured" or bool(self.error)


@dataclass(slots=True)
class Outcome:
    """Everything that a run found out."""

    runs: dict[Cell, Runs]
    form_bytes: dict[str, int]
    """Bytes on disk by form."""
    missing: dict[str, str]
    """Readers that could not be measured, and why."""


def cells_of(plan: Plan) -> list[Cell]:
    """List the cells; overlap is measured with the most workers only."""
    return [
        Cell(reader, workers, regime)
        for regime in plan.regimes
        for reader in plan.readers
        if regime in reader.regimes
        for workers in (reader.workers[-1:] if regime == "overlap" else reader.workers)
    ]


def missing_library(reader: Reader) -> str | None:
    """Name a library that a reader needs and that is not installed."""
    roots = (library.partition(".")[0] for library in reader.libraries)
    return next((root for root in roots if find_spec(root) is None), None)


def run(plan: Plan, tell: Callable[[str], None] = print) -> Iterator[Outcome]:
    """Write the forms, then measure all cells; after every round, give what was found out so far.

    Raises
    ------
    OSError
        If the disk cannot hold the forms.
    CgroupUnavailable
        If this user may set no memory limit here.
    """
    missing = {
        reader.name: f"{library} is not installed"
        for reader in plan.readers
        if (library := missing_library(reader)) is not None
    }
    plan = replace(plan, readers=tuple(each for each in plan.readers if each.name not in missing))
    corpus = Corpus(plan.folder / "corpus.f16", plan.n_recordings)
    _check_space(plan, corpus)
    write_corpus(corpus)
    outcome = Outcome({}, {}, missing)
    with _home(plan.folder) as environment:
        bench = _Bench(plan, corpus, environment)
        _prepare(bench, outcome, tell)
        cells = [cell for cell in cells_of(plan) if cell.reader.name not in outcome.missing]
        outcome.runs = {cell: Runs() for cell in cells}
        for number in range(plan.rounds):
            tell(f"round {number + 1} of {plan.rounds}")
            due = [cell for cell in _in_order(cells, number) if not outcome.runs[cell].is_over]
            for first in range(0, len(due), IMPORTING_AT_ONCE):
                some = due[first : first + IMPORTING_AT_ONCE]
                _measure(bench, some, outcome.runs, number)
                for cell in some:
                    if outcome.runs[cell].cold:
                        _measure(bench, [cell], outcome.runs, number)
                    tell(_line(cell, outcome.runs[cell]))
            yield outcome


def _check_space(plan: Plan, corpus: Corpus) -> None:
    """Refuse what the disk cannot hold: braindecode's form is twice as large."""
    forms = {reader.form for reader in plan.readers} - {"recordings"}
    needed = int((len(forms) + ("fif" in forms) + 1) * corpus.n_bytes * FREE_SPACE_MARGIN)
    free = shutil.disk_usage(plan.folder).free
    if free < needed:
        raise OSError(
            f"The readers' forms take {format_bytes(needed)}, and {format_bytes(free)} are free. "
            "Use --quick, fewer --readers, or --folder on another disk."
        )


@dataclass(frozen=True, slots=True)
class _Bench:
    """A plan, and where it is carried out."""

    plan: Plan
    corpus: Corpus
    environment: dict[str, str]
    files: dict[str, list[Path]] = field(default_factory=dict)
    """What each form consists of; nothing is written any more once it is."""

    def task(self, reader: Reader) -> Task:
        """Say what a process of this reader begins with."""
        return Task(
            reader=reader.name,
            folder=str(self.plan.folder / reader.form),
            corpus=str(self.corpus.path),
            n_recordings=self.corpus.n_recordings,
            seconds=self.plan.seconds,
        )

    def limit_of(self, cell: Cell) -> Callable[[], float] | None:
        """Say how to measure what the machine can do, where Engram promises a fraction of it."""
        if cell.reader.name != "engram":
            return None
        capped = partial(disk_gb_per_s, self.corpus.path, self.plan.seconds)
        return {"warm": copy_gb_per_s, "capped": capped, "overlap": None}[cell.regime]

    def run(self, task: Task, limit_bytes: int, timeout_s: float) -> LimitedRun:
        """Run a task in a process of its own."""
        command = [sys.executable, "-m", "benchmarks.loading.cell", json.dumps(asdict(task))]
        return limited(command, limit_bytes, env=self.environment, cwd=ROOT, timeout_s=timeout_s)


@contextmanager
def _home(folder: Path) -> Iterator[dict[str, str]]:
    """Give the cells a home of their own: several libraries write caches and settings there."""
    home = folder / "home"
    home.mkdir()
    yield {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(home)


def _prepare(bench: _Bench, outcome: Outcome, tell: Callable[[str], None]) -> None:
    """Write each form once, by the first reader that reads it."""
    wanted = {cell.reader.form: cell.reader for cell in reversed(cells_of(bench.plan))}

    def write(form: str) -> LimitedRun:
        (bench.plan.folder / form).mkdir()
        task = replace(bench.task(wanted[form]), is_preparation=True)
        return bench.run(task, UNLIMITED_BYTES, PREPARATION_TIMEOUT_S)

    with ThreadPoolExecutor(FORMS_AT_ONCE) as pool:
        for form, done in zip(wanted, pool.map(write, wanted), strict=True):
            if done.returncode:
                readers = [each for each in bench.plan.readers if each.form == form]
                outcome.missing |= {each.name: f"could not be prepared: {_reason(done)}" for each in readers}
            bench.files[form] = _files(bench.plan.folder / form)
            outcome.form_bytes[form] = sum(path.stat().st_blocks * 512 for path in bench.files[form])
            tell(f"prepared {form} in {done.duration_s:.0f} s")
    # What is still on its way to the disk would disturb the first cells.
    subprocess.run(["sync", "-f", str(bench.plan.folder)], check=True)


def _in_order(cells: list[Cell], number: int) -> list[Cell]:
    """Shuffle forms, and the cells of a form within their regimes."""
    rng = random.Random(number)  # noqa: S311 - an order, no secret
    forms = sorted({cell.reader.form for cell in cells})
    rng.shuffle(forms)
    regimes = {regime: place for place, regime in enumerate(("warm", "capped", "overlap"))}
    return sorted(cells, key=lambda cell: (forms.index(cell.reader.form), regimes[cell.regime], rng.random()))


def _measure(bench: _Bench, cells: list[Cell], runs: Mapping[Cell, Runs], number: int) -> None:
    """Measure cells, one after another; their processes import what they need side by side before."""
    with ThreadPoolExecutor(len(cells)) as pool:
        processes = [_Process(bench, cell, number, place, pool) for place, cell in enumerate(cells)]
        try:
            # Meanwhile; the others' files after the cell before them.
            _make_ready(bench.files[cells[0].reader.form], cells[0].regime)
            for process in processes:
                process.wait_until_imported()
            for place, (cell, process) in enumerate(zip(cells, processes, strict=True)):
                if place:
                    _make_ready(bench.files[cell.reader.form], cell.regime)
                _measure_one(bench, cell, process, runs[cell])
        finally:
            for process in processes:
                process.open_gate()  # or they would wait for a failure that is ours to tell


class _Process:
    """A cell's process, which has been started."""

    def __init__(self, bench: _Bench, cell: Cell, number: int, place: int, pool: ThreadPoolExecutor) -> None:
        self._gate = bench.plan.folder / f"gate {place}"
        self._imported = imported_mark(self._gate)
        for path in (self._gate, self._imported):
            path.unlink(missing_ok=True)
        task = replace(
            bench.task(cell.reader),
            workers=cell.workers,
            stride_samples=cell.stride_samples,
            seed=number,
            gate=str(self._gate),
        )
        limit_bytes = UNLIMITED_BYTES if cell.regime == "warm" else bench.plan.cap_bytes
        self.done = pool.submit(bench.run, task, limit_bytes, (1 + place) * CELL_TIMEOUT_S)

    def wait_until_imported(self) -> None:
        """Wait until it has imported its libraries, or has failed to."""
        while not (self._imported.exists() or self.done.done()):
            time.sleep(GATE_S)

    def open_gate(self) -> None:
        """Let it begin to measure."""
        self._gate.touch()


def _measure_one(bench: _Bench, cell: Cell, process: _Process, runs: Runs) -> None:
    """Let a process measure, and note what it found out; unless its pages were taken away meanwhile."""
    limit = bench.limit_of(cell)
    before_gb_per_s = limit and limit()
    process.open_gate()
    runs.cold = ""
    try:
        done = process.done.result()
    except subprocess.TimeoutExpired:
        runs.outcome = "timed out"
        return
    runs.peak_bytes = max(runs.peak_bytes, done.peak_unreclaimable_bytes)
    if done.oom_killed:
        runs.outcome = "killed"
        return
    if done.returncode:
        runs.error = _reason(done)
        return
    measured = Measured(**json.loads(done.stdout.splitlines()[-1]))
    if cell.regime == "warm" and not _was_warm(measured):
        n_bytes = measured.disk_bytes_per_window
        runs.cold = f"{n_bytes:,.0f} bytes a window came from the disk in the warm regime"
        return
    runs.measured.append(measured)
    if limit and before_gb_per_s:
        runs.limits_gb_per_s.append((before_gb_per_s + limit()) / 2)


def _was_warm(measured: Measured) -> bool:
    allowed = WARM_DISK_SHARE * WINDOW_BYTES + WARM_DISK_BYTES_PER_S / measured.windows_per_s
    return measured.disk_bytes_per_window < allowed


def _reason(done: LimitedRun) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with {done.returncode}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _make_ready(files: list[Path], regime: Regime) -> None:
    """Have the page cache hold all of some files, or nothing."""
    is_small = statistics.fmean(path.stat().st_size for path in files[:100]) < READ_BYTES
    with ThreadPoolExecutor(SMALL_FILES_AT_ONCE if is_small else 1) as pool:
        list(pool.map(read_whole if regime == "warm" else lambda path: forget([path]), files))


def read_whole(path: Path) -> None:
    """Read a file from front to back, so that the page cache holds it in large pieces."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        buffer = bytearray(READ_BYTES)
        while file.readinto(buffer):
            pass


def _line(cell: Cell, runs: Runs) -> str:
    if runs.error:
        return f"{cell}: ERROR {runs.error}"
    if runs.cold:
        return f"{cell}: not counted, {runs.cold}"
    if not runs.measured:
        return f"{cell}: {runs.outcome}"
    last = runs.measured[-1]
    peak_mb = runs.peak_bytes / 1e6
    limit = f", limit {runs.limits_gb_per_s[-1]:.2f} GB/s" if runs.limits_gb_per_s else ""
    rate = f"{last.windows_per_s:,.0f} windows/s"
    return f"{cell}: {rate}, {peak_mb:.0f} MB, first {last.first_batch_s:.2f} s{limit}"
