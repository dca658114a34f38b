"""One job: read a group of recordings, run the steps, write the group's parts.

Groups are decided from the listing alone, before anything is read, and a group's bytes
depend on nothing but its recordings and the steps: not on the budget, the number of jobs,
or which groups were finished before a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import DoesNotFit, MemoryExceeded, SourceError, StoreNotWritable
from engram.memory.usage import read_usage
from engram.preparation.chain import Chain, bind, predict_bytes
from engram.preparation.fingerprint import FileNotes, fingerprint
from engram.preparation.raw_steps import RawStep, apply_raw_steps, whole_bytes
from engram.preparation.steps import ScanningStep, Step
from engram.recordings.recording import Channel, Entry, Recording, Refusal, Signal, Source
from engram.store.precision import (
    ErrorMeter,
    Precision,
    Scaling,
    decode,
    encode,
    parse_precision,
    stored_dtype,
)
from engram.store.writer import GroupWriter, PartForm, progress_file

__all__ = ["BLOCK_BYTES", "GroupTask", "Recipe", "build_group", "group_entries", "predict_signal"]

BLOCK_BYTES = 16 << 20
"""Samples that are worked on at once, before halo and temporaries.

A constant, and not a share of the budget: FFT filters round differently for other block
borders, and a store's bytes may not depend on the memory of the machine. At 129 channels
it is 163 s of 100 Hz data; larger blocks were not faster.
"""

MAX_RECORDINGS = 256
"""Recordings per group. Their table rows stay in memory until the group is finished: about
1 KB a channel, 33 MB at 129 channels."""

ROWS_BYTES = 48 << 20
"""What the rows of one group may take in memory, table and Parquet writer together."""

ENCODE_FACTOR = 2.5
"""Peak bytes of encoding, decoding and metering per byte of a float64 block: the float32
copy (0.5), the stored copy (0.5 at most), the copy read back (0.5), and the chain's own
last block (1). Measured 2.1."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to every recording: steps and precision per signal."""

    steps: Mapping[str, tuple[tuple[RawStep, ...], tuple[Step, ...]]]
    """By signal name: callables on the whole recording, then steps that run block by block."""
    precision: Mapping[str, str]
    """Precision by signal name; the key ``"*"`` is for every other signal of floats."""
    named: frozenset[str] = frozenset()
    """Signals that the user named, who is told if there is none of that name."""

    def settings(self) -> dict[str, list[dict[str, Any]]]:
        """Write every step as JSON, for the manifest and the fingerprint."""
        named: dict[str, list[dict[str, Any]]] = {}
        for name, (raw_steps, steps) in self.steps.items():
            every: tuple[RawStep | Step, ...] = (*raw_steps, *steps)
            named[name] = [{"step": step.name, **step.settings()} for step in every]
        return named

    @property
    def raw_steps(self) -> tuple[RawStep, ...]:
        """The callables on the whole recording: they change all of its signals at once."""
        return next((raw_steps for raw_steps, _ in self.steps.values() if raw_steps), ())

    def block_steps(self, signal: str) -> tuple[Step, ...]:
        """Give the steps of a signal that run block by block."""
        return self.steps[signal][1] if signal in self.steps else ()

    def precision_of(self, signal: str, array: ArraySpec) -> Precision:
        """Choose and check the precision of one signal; that of ``"*"`` is for floats."""
        is_float = np.dtype(array.dtype).kind == "f"
        others = self.precision.get("*", "default") if is_float else "default"
        return parse_precision(self.precision.get(signal, others), signal, array)


@dataclass(frozen=True, slots=True)
class GroupTask:
    """Everything that a job needs to build one group; pickled to where it runs."""

    root: Path
    """The store's folder."""
    call: int
    """Number of the ``prepare`` call."""
    group: int
    """Number of the group."""
    source: Source
    """Where the recordings come from."""
    entries: tuple[Entry, ...]
    """The group's recordings, sorted."""
    refusals: tuple[Refusal, ...]
    """What the listing refused; only the first group has any."""
    recipe: Recipe
    """What is done to them."""
    steps_hash: str
    """Hash of the recipe, the third part of every fingerprint."""
    blocks_bytes: int
    """Memory that this job may take for samples."""
    allowed_bytes: int
    """Memory that this job's process may hold in all."""
    builder: int
    """Process that asked for the job."""

    @property
    def key(self) -> str:
        """What this group is made of, so that a resumed build knows it again."""
        listing = [[e.id, e.size_bytes, [f.path.name for f in e.files]] for e in self.entries]
        refused = [[r.id, r.reason, r.detail] for r in self.refusals]
        return hashlib.sha256(json.dumps([listing, refused, self.steps_hash]).encode()).hexdigest()


def group_entries(entries: Sequence[Entry], part_bytes: int) -> list[tuple[Entry, ...]]:
    """Cut a sorted listing into groups of about ``part_bytes`` of source files.

    A recording is never cut; one that is larger than ``part_bytes`` is a group of its own.
    No group has more than ``MAX_RECORDINGS``.

    Examples
    --------
    >>> [[e.id for e in g] for g in group_entries([Entry(i, size_bytes=4) for i in "abcde"], 8)]
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    groups: list[list[Entry]] = []
    size_bytes = 0
    for entry in entries:
        if not groups or size_bytes + entry.size_bytes > part_bytes or len(groups[-1]) == MAX_RECORDINGS:
            groups.append([])
            size_bytes = 0
        groups[-1].append(entry)
        size_bytes += entry.size_bytes
    return [tuple(group) for group in groups]


def build_group(task: GroupTask) -> int:
    """Build one group and leave its result in the store's ``building`` folder.

    Returns
    -------
    int
        The group's number.

    Raises
    ------
    InputError
        If steps or precision do not fit the signals.
    DoesNotFit, StoreNotWritable
        If the disk is full or refuses.
    MemoryExceeded
        If the process holds more than it may.
    """
    if task.builder != os.getpid():
        _end_with(task.builder)
    notes = FileNotes()
    with GroupWriter(task.root, task.call, task.group, task.key) as writer:
        for refusal in task.refusals:
            writer.add_row(
                "refusals", recording=refusal.id, fingerprint="", reason=refusal.reason, detail=refusal.detail
            )
        for entry in task.entries:
            writer.begin_recording()
            try:
                _store_recording(writer, task, entry, notes)
            except _Refused as refused:
                writer.refuse_recording()
                mark = fingerprint_or_empty(task, entry, notes)
                writer.add_row(
                    "refusals",
                    recording=entry.id,
                    fingerprint=mark,
                    reason=refused.reason,
                    detail=refused.detail,
                )
            _tell_progress(task, entry)
            _check_memory(task, entry)
        writer.finish(notes.notes)
    return task.group


_parents: set[int] = set()


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone.

    joblib's workers outlive a parent that was killed: they finish their job and then wait
    for five minutes, holding some 200 MB each, on a machine that may have just run out.
    """
    if os.getppid() != parent or parent in _parents:
        return  # a worker of a cluster, which looks after its own; or watched already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    _parents.add(parent)
    threading.Thread(target=watch, name="engram-parent-watch", daemon=True).start()


def fingerprint_or_empty(task: GroupTask, entry: Entry, notes: FileNotes) -> str:
    """Take the fingerprint of a refused recording; empty where its files cannot even be read."""
    try:
        return str(fingerprint(task.source, entry, task.steps_hash, notes))
    except (SourceError, OSError):
        return ""


class _Refused(Exception):
    """A recording is left out; carries the reason to count by and the detail to read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def _store_recording(writer: GroupWriter, task: GroupTask, entry: Entry, notes: FileNotes) -> None:
    mark = None
    try:
        mark = str(fingerprint(task.source, entry, task.steps_hash, notes))
        _check_fits(task, entry, entry.resident_bytes, "its reader holds it whole")
        with task.source.open(entry) as opened:
            recording = _with_raw_steps(task, opened)
            for signal in recording.signals:
                _store_signal(writer, task, entry, recording, signal)
            _add_events(writer, entry, recording)
    except SourceError as error:
        raise _Refused("unreadable", str(error)) from error
    except StoreNotWritable:
        raise  # an OSError too, but of the store
    except OSError as error:
        detail = f"Its files cannot be read ({error.strerror}). Mend that, and run the same again."
        raise _Refused("unreadable", detail) from error
    except DoesNotFit as error:
        if error.resource != "memory":
            raise
        raise _Refused("memory", f"{error}. Give a larger memory budget, or fewer jobs.") from error
    fields = {
        (key if key not in _OWN_COLUMNS else f"field_{key}"): str(value)
        for key, value in entry.fields.items()
    }
    row = {
        **fields,
        "recording": entry.id,
        "is_bank": entry.is_bank,
        "fingerprint": mark,
        "source_bytes": entry.size_bytes,
    }
    writer.add_row("recordings", **row)


_OWN_COLUMNS = ("recording", "is_bank", "fingerprint", "source_bytes")


def _check_fits(task: GroupTask, entry: Entry, n_bytes: int, why: str) -> None:
    if n_bytes > task.blocks_bytes:
        message = f"{entry.id} needs more memory than a job has for samples: {why}"
        raise DoesNotFit(message, resource="memory", needed_bytes=n_bytes, allowed_bytes=task.blocks_bytes)


def _with_raw_steps(task: GroupTask, recording: Recording) -> Recording:
    """Run the callables on the whole recording, if there are any."""
    raw_steps = task.recipe.raw_steps
    return apply_raw_steps(recording, raw_steps, task.blocks_bytes) if raw_steps else recording


def _block_bytes(signal: Signal) -> int:
    return max(BLOCK_BYTES, signal.array.sample_bytes)


def predict_signal(recording: Recording, signal: Signal, recipe: Recipe) -> tuple[int, int]:
    """Predict what a signal takes on disk, and at its peak in memory, without reading it."""
    steps = recipe.block_steps(signal.name)
    # A step that has to look at the samples first leaves channels out, so without it is the most.
    chain = bind(
        recording, signal.name, [s for s in steps if not isinstance(s, ScanningStep)], _block_bytes(signal)
    )
    out = chain.signal.array
    dtype = stored_dtype(recipe.precision_of(signal.name, out), out.dtype)
    stored_bytes = out.n_bytes // np.dtype(out.dtype).itemsize * np.dtype(dtype).itemsize
    peak_bytes = _peak_bytes(signal, steps)
    if recipe.raw_steps:
        peak_bytes += whole_bytes(recording)
    return stored_bytes, peak_bytes


def _peak_bytes(signal: Signal, steps: Sequence[Step]) -> int:
    block_bytes = _block_bytes(signal)
    return predict_bytes(signal, steps, block_bytes) + int(ENCODE_FACTOR * block_bytes) + ROWS_BYTES


def _store_signal(
    writer: GroupWriter, task: GroupTask, entry: Entry, recording: Recording, signal: Signal
) -> None:
    steps = task.recipe.block_steps(signal.name)
    peak_bytes = entry.resident_bytes + _peak_bytes(signal, steps)
    _check_fits(task, entry, peak_bytes, "one block and its temporaries")
    try:
        chain = bind(recording, signal.name, steps, _block_bytes(signal))
    except SourceError as error:
        raise _Refused("steps", str(error)) from error
    out = chain.signal
    if out.n_samples == 0 or out.array.sample_bytes == 0:
        raise _Refused(
            "empty", f"Signal {out.name!r} has shape {out.array.shape}: nothing to store. Exclude it."
        )
    precision = task.recipe.precision_of(out.name, out.array)
    scaling = Scaling.of_range(*_range(chain)) if precision == "int16" else None
    dtype = stored_dtype(precision, out.array.dtype)
    form = PartForm(out.name, out.array.sample_shape, out.array.axes, dtype, precision, out.rate_hz)
    number = writer.part(form)
    start = writer.n_samples(number)
    meter = ErrorMeter(_n_columns(out))
    for _, x in chain.blocks():
        if precision != "exact":
            # Once, for the encoder and the meter: MNE's data come channel by channel in memory.
            x = _to_float32(x)  # noqa: PLW2901 - the float64 block is let go
        stored = encode(x, precision, scaling)
        writer.append(number, stored)
        if precision != "exact":
            meter.add(x, decode(stored, precision, scaling))
    layout = _add_layout(writer, out.channels)
    writer.add_row(
        "signals", recording=entry.id, signal=out.name, part=writer.path_of(number), start=start,
        stop=writer.n_samples(number), rate_hz=out.rate_hz, start_s=out.start_s, layout=layout,
        gaps=[edge for gap in out.gaps for edge in (gap.start, gap.stop)], bank=out.bank,
    )  # fmt: skip
    if precision != "exact":
        _add_scales(writer, entry, out, meter, precision=precision, scaling=scaling)


def _to_float32(x: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="raise"):
        try:
            return np.ascontiguousarray(x, np.float32)
        except FloatingPointError as error:
            detail = "A sample is above 3.4e38, which float32 cannot hold. Scale the signal down."
            raise _Refused("precision", detail) from error


def _range(chain: Chain) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find every channel's range, in a pass of its own: int16 must know it before it encodes."""
    n_channels = _n_columns(chain.signal)
    low, high = np.full(n_channels, np.inf), np.full(n_channels, -np.inf)
    for _, x in chain.blocks():
        rows = np.where(np.isfinite(x), x, np.nan).reshape(-1, n_channels)
        # fmin and fmax skip NaN, which the meter reports by channel later.
        low = np.fmin(low, np.fmin.reduce(rows, axis=0))
        high = np.fmax(high, np.fmax.reduce(rows, axis=0))
    has_range = np.isfinite(low) & np.isfinite(high)
    return np.where(has_range, low, 0.0), np.where(has_range, high, 0.0)


def _n_columns(signal: Signal) -> int:
    """Count what is measured and scaled apart: channels, or the columns of any (time, column)."""
    return len(signal.channels) or (signal.array.shape[1] if len(signal.array.shape) == 2 else 1)


def _add_scales(
    writer: GroupWriter,
    entry: Entry,
    signal: Signal,
    meter: ErrorMeter,
    *,
    precision: Precision,
    scaling: Scaling | None,
) -> None:
    channels = signal.channels or tuple(
        Channel(str(column), type="", unit="") for column in range(_n_columns(signal))
    )
    if reason := meter.refusal(precision, [channel.name for channel in channels], channels[0].unit):
        raise _Refused("precision", reason)
    for index, (channel, error) in enumerate(zip(channels, meter.channels(), strict=True)):
        writer.add_row(
            "scales", recording=entry.id, signal=signal.name, index=index, channel=channel.name,
            unit=channel.unit, scale=None if scaling is None else float(scaling.scale[index]),
            offset=None if scaling is None else float(scaling.offset[index]),
            mean=error.mean, std=error.std, minimum=error.minimum, maximum=error.maximum,
            max_error=error.max_error, snr_db=error.snr_db, n_nan=error.n_nan,
        )  # fmt: skip


@lru_cache(maxsize=16)
def _layout_id(channels: tuple[Channel, ...]) -> str:
    """Name a layout by its content; recordings of a corpus have few, and hashing takes milliseconds."""
    text = json.dumps([asdict(channel) for channel in channels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _add_layout(writer: GroupWriter, channels: tuple[Channel, ...]) -> str | None:
    """Add the channel layout, so that equal layouts are one."""
    if not channels:
        return None
    layout = _layout_id(channels)
    if not writer.has_layout(layout):
        for index, channel in enumerate(channels):
            x, y, z = channel.position_m or (None, None, None)
            writer.add_row(
                "layouts", layout=layout, index=index, channel=channel.name, type=channel.type,
                unit=channel.unit, bad=channel.bad, x_m=x, y_m=y, z_m=z,
            )  # fmt: skip
    return layout


def _add_events(writer: GroupWriter, entry: Entry, recording: Recording) -> None:
    events = recording.events
    own = ("recording", "onset_s", "duration_s", "description")
    extras = {(key if key not in own else f"event_{key}"): column for key, column in events.extras.items()}
    for row in range(len(events)):
        writer.add_row(
            "events", **{key: column[row] for key, column in extras.items()}, recording=entry.id,
            onset_s=events.onset_s[row], duration_s=events.duration_s[row],
            description=events.description[row],
        )  # fmt: skip


def _tell_progress(task: GroupTask, entry: Entry) -> None:
    """Append to the group's progress file, which the parent reads wherever this job runs."""
    with progress_file(task.root, task.call, task.group).open("a") as file:
        file.write(f"{entry.size_bytes}\n")


def _check_memory(task: GroupTask, entry: Entry) -> None:
    used = read_usage(os.getpid()).unreclaimable_bytes
    if used > task.allowed_bytes:
        message = (
            f"Memory passed the budget after {entry.id}. Finished parts are kept: "
            "give more memory, or fewer jobs"
        )
        raise MemoryExceeded(message, used_bytes=used, allowed_bytes=task.allowed_bytes)


def group_progress(tasks: Sequence[GroupTask]) -> Iterator[int]:
    """Give the source bytes of every recording that running jobs have dealt with."""
    for task in tasks:
        try:
            text = progress_file(task.root, task.call, task.group).read_text()
        except FileNotFoundError:
            continue
        yield from (int(line) for line in text.split("\n")[:-1])
