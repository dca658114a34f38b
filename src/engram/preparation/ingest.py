"""prepare: from a source and steps to a store, once, within a memory budget, resumably.

The order of work is: list the source, compare with what the store holds, plan groups,
check memory and disk, build the groups (one job each), commit. Reading, steps and encoding
of a group are in ``group``; how bytes reach the disk is in ``engram.store.writer``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engram.errors import InputError, MemoryExceeded, SourceError, StoreDamaged, WorkerLost
from engram.memory.budget import Budget, Spending
from engram.memory.usage import PeakWatch, Usage, read_usage, watch_peak
from engram.preparation.fingerprint import FileNotes, Fingerprint, fingerprint, steps_hash
from engram.preparation.group import (
    GroupTask,
    Recipe,
    build_group,
    group_entries,
    group_progress,
    predict_signal,
)
from engram.preparation.raw_steps import split_steps
from engram.recordings import as_source
from engram.recordings.recording import Entry, Recording, Refusal, Source
from engram.store.format import MANIFEST, Call
from engram.store.precision import check_precision
from engram.store.reader import Store
from engram.store.tables import TABLES, read_table
from engram.store.writer import (
    check_free_space,
    commit,
    disk_errors,
    finished_group,
    group_table,
    locked,
    read_manifest,
    sweep,
)
from engram.units import format_bytes, parse_bytes

__all__ = ["MAIN_SIGNALS", "PART_BYTES", "Prepared", "Progress", "StageNote", "prepare"]

logger = logging.getLogger("engram")

MAIN_SIGNALS = ("eeg", "seeg", "ecog", "mag", "grad")
"""Signals that a plain list of steps is for: the measured ones, not stim, misc or EOG."""

PART_BYTES = 512 << 20
"""Source files per group: large enough that 26,672 HBN recordings are some 600 files, small
enough that a kill costs little."""

WORKER_BYTES = 200 << 20
"""What the libraries of one more process hold (NumPy, SciPy, MNE, PyArrow; measured 175 MiB)."""

_N_PROBES = 16


@dataclass(frozen=True, slots=True)
class StageNote:
    """What one stage of a ``prepare`` call took."""

    name: str
    """``"list"``, ``"compare"``, ``"plan"``, ``"build"``, ``"commit"``."""
    duration_s: float
    """Seconds."""
    usage: Usage
    """Memory of the process tree when the stage ended."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a ``prepare`` call is."""

    n_done: int
    """Recordings dealt with."""
    n_total: int
    """Recordings to deal with."""
    done_bytes: int
    """Bytes of their source files dealt with."""
    total_bytes: int
    """Bytes of all their source files."""
    usage: Usage
    """Memory of the process tree now."""
    elapsed_s: float
    """Seconds since the build began."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a ``prepare`` call did."""

    store: Store
    """The store, open."""
    n_prepared: int
    """Recordings stored by this call."""
    n_unchanged: int
    """Recordings that were in the store already, as they are now."""
    changed: Mapping[str, str]
    """Id -> reason, of the recordings that replaced an earlier state of themselves."""
    refusals: tuple[Refusal, ...]
    """Recordings of this listing that were left out, with the reason."""
    peak: Usage
    """Largest memory of the process tree, sampled 20 times a second."""
    budget: Budget
    """The memory that was allowed, and what it was planned for."""
    stages: tuple[StageNote, ...]
    """Duration and memory of every stage."""

    @property
    def duration_s(self) -> float:
        """Seconds in all."""
        return sum(stage.duration_s for stage in self.stages)

    def refused(self) -> dict[str, int]:
        """Count the refusals by reason."""
        return dict(Counter(refusal.reason for refusal in self.refusals))


class _Stages:
    """Notes duration and memory of every stage, and logs them."""

    def __init__(self) -> None:
        self.notes: list[StageNote] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        note = StageNote(name, time.perf_counter() - begin, read_usage())
        self.notes.append(note)
        used = format_bytes(note.usage.unreclaimable_bytes)
        logger.info("%s: %.2f s, %s of memory", name, note.duration_s, used)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What is to be done, from the listing and the store."""

    todo: tuple[Entry, ...]
    n_unchanged: int
    changed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How it is to be done."""

    tasks: tuple[GroupTask, ...]
    waiting: tuple[GroupTask, ...]
    """Those that no unfinished build has finished."""
    budget: Budget


def prepare(
    source: Any,
    store: str | Path,
    *,
    steps: Sequence[Any] | Mapping[str, Sequence[Any]] = (),
    precision: str | Mapping[str, str] = "default",
    memory: int | str | None = None,
    n_jobs: int | None = None,
    part_bytes: int | str = PART_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Prepare recordings into a store, once; called again, do only what is new or changed.

    Parameters
    ----------
    source
        A ``Source``, or anything that ``engram.as_source`` takes: the path of a BIDS root,
        paths of files, MNE ``Raw`` objects, a braindecode ``BaseConcatDataset``.
    store
        Folder of the store; made if it is not there, added to if it is.
    steps
        Steps for the measured signals (``MAIN_SIGNALS``), or steps per signal name. Engram's
        own steps run block by block; braindecode ``Preprocessor`` objects and
        ``RawStep(function, name, version)`` need the whole recording in memory.
    precision
        ``"default"`` (EEG float16 in microvolts, other floats float32, integers as they
        come), another precision for all signals, or one per signal name.
    memory
        Budget in bytes or as text ("700 MB") for this process and its workers, libraries
        included; None for 80 % of what this machine, container or SLURM job leaves.
    n_jobs
        Jobs at once, as joblib understands it; None takes ``joblib.parallel_config``'s, or 1.
    part_bytes
        Source bytes per part.
    progress
        Called three times a second while recordings are built.

    Returns
    -------
    Prepared
        Counts, refusals with reasons, measured memory, and the open store.

    Raises
    ------
    InputError
        If an argument breaks a rule, or other recordings of the store were prepared with
        other steps.
    SourceError
        If no recording at all can be stored.
    DoesNotFit
        If memory or disk cannot hold the work: before anything is written where that can be
        known, else with what is finished kept.
    MemoryExceeded
        If measured memory passed the budget; what is finished stays.
    WorkerLost
        If a worker process was killed; what is finished stays.
    StoreLocked
        If another process builds this store.
    StoreNotWritable
        If the disk refuses to be written.
    """
    # Absolute, since a job may run in a process that was started in another folder.
    root, stages, size = Path(store).absolute(), _Stages(), _part_size(part_bytes)
    recipe, budget = make_recipe(steps, precision), Budget.of(memory)
    with watch_peak() as watch:
        with stages.stage("list"):
            source = as_source(source)
            entries, refusals = tuple(source.entries()), tuple(source.refusals())
            _check_ids(entries)
        if not entries:
            raise SourceError(
                f"The source lists no recording ({_count(refusals)}). Check its path and filters."
            )
        with locked(root):
            build = _Build(root, source, recipe)
            with stages.stage("compare"):
                changes = build.compare(entries)
            if changes.todo:
                with stages.stage("plan"):
                    plan = build.plan(changes.todo, refusals, budget, n_jobs, size)
                    budget = plan.budget
                with stages.stage("build"):
                    build.run(plan, n_jobs, watch, progress)
                with stages.stage("commit"), disk_errors(root):
                    n_prepared, refusals = build.commit(plan.tasks)
            else:
                n_prepared = 0
                with disk_errors(root):
                    sweep(root, build.manifest)
    if not (root / MANIFEST).exists():
        first = {refusal.reason: refusal for refusal in reversed(refusals)}
        examples = " ".join(f"{refusal.id}: {refusal.detail}" for _, refusal in sorted(first.items()))
        raise SourceError(f"No recording can be stored ({_count(refusals)}). {examples}")
    prepared = {entry.id for entry in changes.todo} - {refusal.id for refusal in refusals}
    changed = {key: reason for key, reason in changes.changed.items() if key in prepared}
    notes = tuple(stages.notes)
    return Prepared(
        Store(root), n_prepared, changes.n_unchanged, changed, refusals, watch.peak, budget, notes
    )


def _part_size(part_bytes: int | str) -> int:
    try:
        return parse_bytes(part_bytes)
    except ValueError as error:
        raise InputError(f"part_bytes: {error}") from error


def make_recipe(
    steps: Sequence[Any] | Mapping[str, Sequence[Any]], precision: str | Mapping[str, str]
) -> Recipe:
    """Check steps and precision, and spread a plain list over the measured signals.

    Raises
    ------
    InputError
        If a step is not one, callables on whole recordings do not come first, or a precision
        is unknown.
    """
    precisions = dict(precision) if isinstance(precision, Mapping) else {"*": precision}
    for signal, name in precisions.items():
        check_precision(name, signal)
    named = {*(precisions.keys() - {"*"}), *(steps if isinstance(steps, Mapping) else ())}
    if not isinstance(steps, Mapping):
        steps = dict.fromkeys(MAIN_SIGNALS, _listed(steps)) if steps else {}
    chosen = {name: split_steps(_listed(of_signal)) for name, of_signal in steps.items()}
    return Recipe(chosen, precisions, frozenset(named))


def _listed(steps: Sequence[Any]) -> tuple[Any, ...]:
    try:
        return tuple(steps)
    except TypeError as error:
        raise InputError(f"steps={steps!r} is no list. Write steps=[...].") from error


def stored_fingerprints(root: Path) -> dict[str, Fingerprint]:
    """Give the recordings that a store holds, with what each was made of; none of an unfinished store."""
    if not read_manifest(root).calls:
        return {}
    table = Store(root).recordings
    pairs = zip(table["recording"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
    return {key: Fingerprint.parse(text) for key, text in pairs}


def refuse_mixture(root: Path, others: Mapping[str, Fingerprint], steps: str) -> None:
    """Refuse to prepare into a store that holds other recordings, prepared otherwise.

    Raises
    ------
    InputError
        If one of the others has other steps or precision.
    """
    for key, old in others.items():
        if old.steps != steps:
            raise InputError(
                f"{root.name} holds {len(others)} recordings outside this listing, such as {key}, "
                "that were prepared with other steps or precision. Use the same steps (engram inspect "
                "shows them), or another store."
            )


class _Build:
    """One ``prepare`` call on a locked store."""

    def __init__(self, root: Path, source: Source, recipe: Recipe) -> None:
        self.root, self.source, self.recipe = root, source, recipe
        self.manifest, self.notes = read_manifest(root), FileNotes.load(root)
        self.call = 1 + max((call.number for call in self.manifest.calls), default=-1)
        self.steps_hash = steps_hash(recipe.settings(), recipe.precision)

    def compare(self, entries: Sequence[Entry]) -> _Changes:
        """Find what is new or changed; refuse to mix recordings of different steps."""
        stored = stored_fingerprints(self.root)
        todo, changed = [], {}
        for entry in entries:
            old = stored.pop(entry.id, None)
            if old is not None:
                try:
                    now = fingerprint(self.source, entry, self.steps_hash, self.notes)
                except (SourceError, OSError):
                    # No longer readable: its job refuses it by name, and the store keeps what it has.
                    changed[entry.id] = "its files changed"
                else:
                    if not (reason := now.difference(old)):
                        continue
                    changed[entry.id] = reason
            todo.append(entry)
        refuse_mixture(self.root, stored, self.steps_hash)
        for key, reason in sorted(changed.items()):
            logger.info("prepared again: %s, %s", key, reason)
        return _Changes(tuple(todo), len(entries) - len(todo), changed)

    def plan(
        self,
        todo: Sequence[Entry],
        refusals: tuple[Refusal, ...],
        budget: Budget,
        n_jobs: int | None,
        part_bytes: int,
    ) -> _Plan:
        """Decide groups, memory and disk before anything is written."""
        groups = group_entries(todo, part_bytes)
        jobs = min(_count_jobs(n_jobs), len(groups))
        stored_share, peak_bytes = self._probe(todo)
        spendings = [Spending("this process", read_usage().unreclaimable_bytes)]
        if jobs > 1:
            spendings.append(Spending(f"libraries of {jobs} workers", jobs * WORKER_BYTES))
        spendings.append(Spending(f"samples of {jobs} jobs" if jobs > 1 else "samples", jobs * peak_bytes))
        # All at once, so that a budget that does not hold them is told of the whole need.
        budget = replace(budget, spendings=tuple(spendings))
        blocks_bytes = peak_bytes + budget.left_bytes // jobs
        allowed_bytes = WORKER_BYTES + blocks_bytes if jobs > 1 else budget.allowed_bytes
        tasks = tuple(
            GroupTask(
                self.root, self.call, number, self.source, group, refusals if number == 0 else (),
                self.recipe, self.steps_hash, blocks_bytes, allowed_bytes, os.getpid(),
            )
            for number, group in enumerate(groups)
        )  # fmt: skip
        with disk_errors(self.root):
            sweep(self.root, self.manifest, keep_call=self.call)
        waiting = tuple(task for task in tasks if not self._is_finished(task))
        check_free_space(self.root, int(sum(map(_size, waiting)) * stored_share))
        return _Plan(tasks, waiting, budget)

    def _probe(self, todo: Sequence[Entry]) -> tuple[float, int]:
        """Open a few headers: stored bytes per source byte, and the peak of one job's samples."""
        source_bytes, stored_bytes, peak_bytes = 0, 0, 0
        every = max(1, len(todo) // _N_PROBES)
        for entry in todo[::every]:
            if entry.resident_bytes:
                continue  # opening it is reading it; its own job checks its size first
            try:
                with self.source.open(entry) as recording:
                    self._check_signals(recording)
                    sizes = [predict_signal(recording, signal, self.recipe) for signal in recording.signals]
            except (SourceError, OSError):
                continue  # its own job refuses it, by name
            source_bytes += entry.size_bytes
            stored_bytes += sum(stored for stored, _ in sizes)
            peak_bytes = max(peak_bytes, *(peak for _, peak in sizes))
        return stored_bytes / source_bytes if source_bytes else 1.0, peak_bytes

    def _check_signals(self, recording: Recording) -> None:
        """Refuse steps that would touch no signal: a mistake, not a wish."""
        names = {signal.name for signal in recording.signals}
        if self.recipe.steps and not names & self.recipe.steps.keys():
            raise InputError(
                f"The steps are for {', '.join(sorted(self.recipe.steps))}, this recording has "
                f"{', '.join(sorted(names))}. Give steps={{'{min(names)}': [...]}}."
            )

    def _is_finished(self, task: GroupTask) -> bool:
        """Say whether an unfinished build left this group, and its files are still as they were."""
        notes = finished_group(self.root, task.call, task.group, task.key)
        if notes is None:
            return False
        self.notes.notes.update(notes)
        try:
            for name in TABLES:  # each has to be readable, page checksums and all
                read_table(group_table(self.root, task.call, task.group, name))
            done = {row["recording"]: row["fingerprint"] for row in self._rows(task, "recordings")}
            for row in self._rows(task, "refusals"):
                # More memory is what such a refusal advises, and no file shows whether there is more.
                done[row["recording"]] = row["fingerprint"] if row["reason"] != "memory" else ""
            return all(
                str(fingerprint(self.source, entry, self.steps_hash, self.notes)) == done[entry.id]
                for entry in task.entries
            )
        except (StoreDamaged, SourceError, OSError):
            return False  # cut short by a kill, or no longer to be read: built again

    def run(
        self, plan: _Plan, n_jobs: int | None, watch: PeakWatch, progress: Callable[[Progress], None] | None
    ) -> None:
        """Build the groups that are not finished yet, one job each."""
        logger.info("building %d of %d groups", len(plan.waiting), len(plan.tasks))
        allowed_bytes = plan.budget.allowed_bytes
        with _reporting(plan.tasks, watch, progress) if progress else nullcontext():
            for _ in _results(plan.waiting, n_jobs):
                used = watch.now().unreclaimable_bytes
                if used > allowed_bytes:
                    message = "Memory passed the budget. Finished parts are kept: give more, or fewer jobs"
                    raise MemoryExceeded(message, used_bytes=used, allowed_bytes=allowed_bytes)

    def commit(self, tasks: Sequence[GroupTask]) -> tuple[int, tuple[Refusal, ...]]:
        """Add the finished groups to the store, unless they hold nothing new."""
        stored: set[str] = set()
        refusals: list[Refusal] = []
        for task in tasks:
            self.notes.notes.update(finished_group(self.root, task.call, task.group, task.key) or {})
            stored.update(row["recording"] for row in self._rows(task, "recordings"))
            rows = self._rows(task, "refusals")
            refusals += [Refusal(row["recording"], row["reason"], row["detail"]) for row in rows]
        self._refuse_loss(refusals)
        names = {row["signal"] for task in tasks for row in self._rows(task, "signals")}
        self._tell_untouched(names)
        if stored or (self.manifest.calls and set(refusals) - self._known_refusals()):
            call = Call(
                self.call, len(stored), len(refusals), self._settings(names), self.recipe.precision,
                self._errors(tasks), _software(),
            )  # fmt: skip
            commit(self.root, self.manifest, call, len(tasks), self._replaced(stored))
        else:
            sweep(self.root, self.manifest)
        self.notes.save(self.root)
        return len(stored), tuple(refusals)

    def _rows(self, task: GroupTask, name: str) -> list[dict[str, Any]]:
        table = read_table(group_table(self.root, task.call, task.group, name))
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def _refuse_loss(self, refusals: Sequence[Refusal]) -> None:
        """Refuse to trade recordings that the store has for refusals by other steps."""
        stored = stored_fingerprints(self.root)
        lost = [r for r in refusals if r.id in stored and stored[r.id].steps != self.steps_hash]
        if lost:
            raise InputError(
                f"{self.root.name} holds {len(lost)} recordings that these steps or this precision would "
                f"refuse, such as {lost[0].id}: {lost[0].detail} The store stays as it is: use the steps it "
                "has, or another store."
            )

    def _tell_untouched(self, names: set[str]) -> None:
        for name in sorted(self.recipe.named - names):
            found = ", ".join(sorted(names))
            logger.warning("steps or precision for signal %r touched no recording: there are %s", name, found)

    def _known_refusals(self) -> set[Refusal]:
        table = Store(self.root).table("refusals")
        return {Refusal(r["recording"], r["reason"], r["detail"]) for r in table.to_pylist()}

    def _replaced(self, stored: set[str]) -> list[int]:
        """Find the calls that hold no recording in force any more.

        A call that stored nothing stays: its refusals are told as long as they are true.
        """
        later, replaced = set(stored), []
        for call in reversed(self.manifest.calls):
            own = Store(self.root).fingerprints_of(call.number).keys()
            if own and own <= later:
                replaced.append(call.number)
            later |= own
        return replaced

    def _settings(self, names: set[str]) -> dict[str, list[dict[str, Any]]]:
        """Give the steps of the signals that there are."""
        return {name: steps for name, steps in self.recipe.settings().items() if name in names}

    def _errors(self, tasks: Sequence[GroupTask]) -> dict[str, dict[str, Any]]:
        """Find, per signal, the channel that storing cost most."""
        worst: dict[str, dict[str, Any]] = {}
        for task in tasks:
            for row in self._rows(task, "scales"):
                if row["snr_db"] < worst.get(row["signal"], {"min_snr_db": float("inf")})["min_snr_db"]:
                    keys = ("recording", "channel", "unit", "max_error")
                    worst[row["signal"]] = {"min_snr_db": row["snr_db"], **{key: row[key] for key in keys}}
        return worst


def _check_ids(entries: Sequence[Entry]) -> None:
    twice = [key for key, n in Counter(entry.id for entry in entries).items() if n > 1]
    if twice:
        raise InputError(f"The source lists {twice[0]!r} more than once. Give every recording its own id.")


def _size(task: GroupTask) -> int:
    return sum(entry.size_bytes for entry in task.entries)


def _count_jobs(n_jobs: int | None) -> int:
    """Ask joblib how many jobs it would run at once."""
    from joblib import effective_n_jobs

    try:
        return int(effective_n_jobs(n_jobs))
    except ValueError as error:
        raise InputError(f"n_jobs={n_jobs}: {error}. Use 1 or more, or -1 for all cores.") from error


def _results(tasks: Sequence[GroupTask], n_jobs: int | None) -> Iterator[int]:
    """Run the jobs here, or where joblib's backend puts them, and give each one's number."""
    from joblib import Parallel, delayed

    if min(_count_jobs(n_jobs), len(tasks)) <= 1:
        yield from map(build_group, tasks)
    else:
        # One job per dispatch: a group is minutes of work, and results tell of memory.
        parallel = Parallel(
            n_jobs=n_jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
        )
        try:
            yield from parallel(delayed(build_group)(task) for task in tasks)
        except BrokenProcessPool as error:
            raise WorkerLost(
                "A worker process was killed from outside, most often by the kernel for memory. "
                "Finished parts are kept: run the same again, with fewer jobs."
            ) from error


@contextmanager
def _reporting(
    tasks: Sequence[GroupTask], watch: PeakWatch, progress: Callable[[Progress], None]
) -> Iterator[None]:
    """Call ``progress`` from a thread, three times a second and once at the end."""
    begin = time.perf_counter()
    n_total, total_bytes = sum(len(task.entries) for task in tasks), sum(map(_size, tasks))
    stopping = threading.Event()

    def report() -> None:
        sizes = list(group_progress(tasks))
        elapsed = time.perf_counter() - begin
        progress(Progress(len(sizes), n_total, sum(sizes), total_bytes, watch.now(), elapsed))

    def repeat() -> None:
        while not stopping.wait(1 / 3):
            report()

    thread = threading.Thread(target=repeat, name="engram-prepare-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        report()


def _count(refusals: Sequence[Refusal]) -> str:
    counts = Counter(refusal.reason for refusal in refusals)
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none refused"


def _software() -> dict[str, str]:
    """List the versions of what decides samples."""
    versions = {}
    for name in ("engram", "mne", "numpy", "scipy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # not installed, so it decided nothing
    return versions
