"""WindowIndex: every admissible window as compact integers.

`build_index` lays out every window that a spec has room for and keeps those that
``engram.windows.admission`` admits. Windows are numbered by sorted recording id, then time of their
trial. An index holds 16 bytes per stretch of consecutive windows of one trial, and the targets;
where a window lies, and what a column says of it, is computed when it is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from engram.errors import InputError
from engram.windows.admission import (
    REASONS,
    Rules,
    WindowRefusal,
    check_request,
    choose,
    judge,
    no_trial,
    too_short,
)
from engram.windows.cutting import Cutting, Located, Stretches
from engram.windows.order import drawn_below
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.tables import Tables, Texts
from engram.windows.targets import (
    EventColumn,
    RecordingColumn,
    SignalTarget,
    Target,
    TargetTask,
    TimeTo,
    anchor_events,
    look_up,
    named_events,
)

__all__ = ["Column", "Located", "WindowIndex", "WindowRefusal", "build_index"]

_AT_ONCE = 1 << 16
"""Stretches whose trials are placed at once where all are walked through: some megabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A column of text over windows, each distinct value once."""

    codes: NDArray[np.int32]
    """(window,) number of each window's value."""
    values: tuple[str | None, ...]
    """The values that these windows have, sorted, None last."""


@final
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WindowIndex:
    """Every window of some recordings, by number.

    Made by `build_index`, `take` and `with_targets`; never changed. May be read by several threads,
    after ``fork``, and in another process after pickling.

    Examples
    --------
    >>> import numpy as np, pyarrow as pa
    >>> from engram.windows import RecordingColumn, SignalTable
    >>> one, zero = np.ones(1), np.zeros(1)
    >>> eeg = SignalTable(
    ...     present=one > 0,
    ...     n_samples=np.array([1000]),
    ...     rate_hz=one * 100,
    ...     start_s=zero,
    ...     form=np.zeros(1, np.int32),
    ...     forms=("2 channels (C3, C4), float16",),
    ... )
    >>> events = pa.table({name: [] for name in ("recording", "onset_s", "duration_s", "description")})
    >>> tables = Tables(("a",), ("f",), {"age": ("9.5",)}, {"eeg": eeg}, events)
    >>> spec = FixedWindows(signal="eeg", window_size_s=2.0, window_stride_s=1.0)
    >>> index = build_index(tables, spec, RecordingColumn("age"))
    >>> len(index), index.locate(np.array([0, 8])).starts["eeg"], index.targets(np.array([8]))
    (9, array([  0, 800]), array([9.5], dtype=float32))
    """

    tables: Tables
    """What is known of the recordings."""
    spec: FixedWindows | EventWindows
    """What the windows are."""
    target: Target | None
    """What is predicted; None where there is no target, or it was computed by the user."""
    classes: tuple[str, ...]
    """Names of the classes by their numbers; () where targets are numbers."""
    stretches: Stretches
    """The windows."""
    computed: NDArray[np.float32] | NDArray[np.int32] | None
    """(window,) targets that the user has computed, or None."""
    refusals: tuple[WindowRefusal, ...]
    """What was refused when the index was built, by recording and reason."""

    def __post_init__(self) -> None:
        held = self.stretches
        for array in (held.origin, held.i_first, held.bounds, held.targets, self.computed):
            if array is not None:
                array.flags.writeable = False

    def __getstate__(self) -> dict[str, Any]:
        # Without what is cached: pickling would spell out per recording what the cutting holds once.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _cutting(self) -> Cutting:
        return Cutting.of(self.tables, self.spec)

    def __len__(self) -> int:
        return int(self.stretches.bounds[-1])

    def __repr__(self) -> str:
        return f"WindowIndex({len(self)} windows of {len(self.recordings)} recordings)"

    @property
    def recordings(self) -> NDArray[np.int64]:
        """(recording,) numbers of the recordings that have windows, ascending."""
        n_stretches = np.bincount(self._cutting.recordings(self.stretches.origin), minlength=1)
        return np.flatnonzero(n_stretches)

    def lengths(self) -> Iterator[tuple[NDArray[np.int64], Mapping[str, NDArray[np.int64]]]]:
        """Walk through the stretches of consecutive windows of one trial, which are equally long.

        Yields
        ------
        n_windows, lengths
            Of some stretches: (stretch,) how many windows each has, and signal -> (stretch,) samples of
            each of them.
        """
        for first in range(0, len(self.stretches.origin), _AT_ONCE):
            origin = self.stretches.origin[first : first + _AT_ONCE]
            n_windows = np.diff(self.stretches.bounds[first : first + len(origin) + 1])
            yield n_windows, self._cutting.lengths(origin)

    @property
    def task(self) -> TargetTask | None:
        """Whether targets are numbers or classes; None without a target."""
        if self.classes:
            return "classification"
        has_target = self.target is not None or self.computed is not None
        return "regression" if has_target else None

    @property
    def n_bytes(self) -> int:
        """Bytes that the index holds, without the tables, which all indices of a store share."""
        computed = 0 if self.computed is None else self.computed.nbytes
        return self.stretches.n_bytes + self._cutting.n_bytes + computed

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the recordings' ids and content, the spec, every window's place, and the targets."""
        return _digest(self._fingerprinted())

    def _fingerprinted(self) -> Iterable[bytes | memoryview]:
        stretches, tables = self.stretches, self.tables
        trials = self._cutting.trials(stretches.origin)
        recordings = self.recordings
        ordinal = np.searchsorted(recordings, trials.recording)
        yield b"engram windows 1"
        for value in (self.spec, self.target):
            yield _text([type(value).__name__, None if value is None else _spelled(value)])
        yield _text(self.classes)
        yield _text([[tables.ids[i], tables.fingerprints[i]] for i in recordings.tolist()])
        for name in self.spec.signals:
            signal = tables.signals[name]
            yield _text([name, [signal.forms[form] for form in signal.form[recordings].tolist()]])
            yield from _numbers(signal.rate_hz[recordings], signal.start_s[recordings])
        # Rows of events and numbers of recordings shift when others come; places and order do not.
        yield from _numbers(ordinal, trials.anchor_s, trials.start, trials.stop)
        yield from _numbers(stretches.i_first, stretches.bounds)
        for targets in (stretches.targets, self.computed):
            if targets is not None:
                yield from _numbers(targets)

    def locate(self, numbers: ArrayLike) -> Located:
        """Give where windows lie.

        Parameters
        ----------
        numbers
            (window,) whole numbers below ``len``.

        Raises
        ------
        InputError
            If a number is not of this index.
        """
        stretch, i_window = self.stretches.find(self._checked(numbers))
        return self._cutting.lay(self.stretches.origin[stretch], i_window)

    def place(self, numbers: ArrayLike, offset: NDArray[np.int64] | None = None) -> Located:
        """Give what is read of windows: all of each, or the crop that the spec asks for.

        Parameters
        ----------
        numbers
            (window,) whole numbers below ``len``.
        offset
            (window,) samples from a window's first one to the first that is read, as ``draw`` gives them;
            None: the crop is the middle.

        Raises
        ------
        InputError
            If a number is not of this index, or an offset leads out of its recording.
        """
        whole = self.locate(numbers)
        if offset is None:
            return self._cutting.place(whole)
        n_samples = self.tables.signals[self.spec.signal].n_samples[whole.recording]
        if offset.shape != whole.recording.shape or len(self.spec.signals) > 1:
            raise InputError(
                f"Offsets are one for each of {len(whole.recording)} windows of one signal, not "
                f"{offset.shape} for {len(self.spec.signals)} signals. Leave them out."
            )
        placed = self._cutting.place(whole, offset)
        start, length = placed.starts[self.spec.signal], placed.lengths[self.spec.signal]
        if ((start < 0) | (start + length > n_samples)).any():
            wrong = int(np.flatnonzero((start < 0) | (start + length > n_samples))[0])
            raise InputError(
                f"With an offset of {offset[wrong]} samples a window begins at sample {start[wrong]} of a "
                f"recording that has {n_samples[wrong]}. Use offsets that WindowIndex.draw gives."
            )
        return placed

    def draw(self, numbers: ArrayLike, seed: int, epoch: int) -> NDArray[np.int64]:
        """Draw where windows are read from in one pass of a training.

        Parameters
        ----------
        numbers
            (window,) whole numbers below ``len``.
        seed, epoch
            Of the pass. The same window has the same place in it whatever else is read with it.

        Returns
        -------
        ndarray
            (window,) int64 offsets for ``place``. Every place of a crop is as likely as another; a window
            that a shift would bring out of its recording, or over what is marked bad or was not
            measured, is not shifted.

        Raises
        ------
        InputError
            If a number is not of this index.
        """
        checked, cutting = self._checked(numbers), self._cutting
        whole = self.locate(checked)
        recording, length = whole.recording, whole.lengths[self.spec.signal]
        offset = np.zeros(len(checked), np.int64)
        if cutting.crop is not None:
            offset = drawn_below((seed, epoch, "crops"), checked, length - cutting.crop[recording] + 1)
        if cutting.shift is not None:
            most = cutting.shift[recording]
            shift = drawn_below((seed, epoch, "shifts"), checked, 2 * most + 1) - most
            is_admitted = self._rules.admit(cutting.place(whole, offset + shift))
            offset = offset + np.where(is_admitted, shift, 0)
        return offset

    @cached_property
    def _rules(self) -> Rules:
        return Rules(self.tables, self.spec.signals)

    @property
    def is_drawn(self) -> bool:
        """Whether windows are read from places that a pass of a training draws."""
        return self._cutting.crop is not None or self._cutting.shift is not None

    def _checked(self, numbers: ArrayLike) -> NDArray[np.int64]:
        checked = np.asarray(numbers)
        if not checked.size:
            return np.empty(0, np.int64)
        if checked.ndim != 1 or checked.dtype.kind not in "iu":
            raise InputError(f"Numbers of windows are a list of whole numbers, not {numbers!r}.")
        least, most = int(checked.min()), int(checked.max())
        if least < 0 or most >= len(self):
            wrong = least if least < 0 else most
            raise InputError(f"There is no window {wrong}. Use numbers from 0 and below {len(self)}.")
        return checked.astype(np.int64, copy=False)

    def targets(self, numbers: ArrayLike) -> NDArray[np.float32] | NDArray[np.int64] | None:
        """Give the targets of windows.

        Returns
        -------
        ndarray or None
            (window,) float32, or int64 numbers of classes; None where there is no target or a signal is.

        Raises
        ------
        InputError
            If a number is not of this index.
        """
        checked = self._checked(numbers)
        if self.computed is not None:
            found = self.computed[checked]
        elif self.stretches.targets is not None:
            found = self.stretches.targets[self.stretches.find(checked)[0]]
        else:
            return None
        return found.astype(np.int64) if self.classes else found.astype(np.float32, copy=False)

    def column(self, name: str) -> Column:
        """Give what a column says of every window.

        Parameters
        ----------
        name
            ``"recording"`` (its id), ``"trial"`` (number of the anchor event among those of its recording,
            refused ones counted; 0 where whole recordings are cut), a descriptive field of the recordings,
            or, with event windows, a column of text of the events.

        Raises
        ------
        InputError
            If there is no such column.
        """
        origin = self.stretches.origin
        recording = self._cutting.recordings(origin)
        if name == "recording":
            return self._spread(recording, self.tables.ids)
        if name == "trial":
            return self._trial_column(recording)
        if name in self.tables.fields:
            texts, rows = self.tables.field_texts(name), recording
        elif name in self._event_columns():
            texts, rows = self.tables.event_texts(name), origin
        else:
            names = ["recording", "trial", *sorted(self.tables.fields), *self._event_columns()]
            raise InputError(f"Windows have no column {name!r}. Use one of: {', '.join(names)}.")
        return self._spread(texts.codes[rows], texts.values)

    def _event_columns(self) -> list[str]:
        names: list[str] = self.tables.events.column_names if isinstance(self.spec, EventWindows) else []
        return [name for name in names if name not in {"recording", "onset_s", "duration_s"}]

    def _trial_column(self, recording: NDArray[np.int32]) -> Column:
        trial = np.zeros(len(recording), np.int64)
        if isinstance(self.spec, EventWindows):
            anchors = np.flatnonzero(anchor_events(self.tables, self.spec))
            first = np.searchsorted(self.tables.event_numbers("recording")[anchors], recording)
            trial = np.searchsorted(anchors, self.stretches.origin) - first
        used, codes = np.unique(trial, return_inverse=True)
        return Column(self._each_window(codes.astype(np.int32)), tuple(str(number) for number in used))

    def subjects(self) -> Column:
        """Give the subject of every window: the field ``subject``, or the recording where it has none."""
        recording = self._cutting.recordings(self.stretches.origin)
        named = self.tables.fields.get("subject", (None,) * len(self.tables))
        pairs = zip(self.tables.ids, named, strict=True)
        texts = tuple(key if subject is None else subject for key, subject in pairs)
        distinct = tuple(sorted(set(texts)))
        number = {subject: i for i, subject in enumerate(distinct)}
        codes = np.fromiter((number[subject] for subject in texts), np.int32, len(texts))
        return self._spread(codes[recording], distinct)

    def _spread(self, codes: NDArray[np.int32], values: Sequence[str]) -> Column:
        """Give each window its stretch's value, of those that are used."""
        used, found = np.unique(codes, return_inverse=True)
        texts = [None if code < 0 else values[code] for code in used]
        order = sorted(range(len(texts)), key=lambda i: (texts[i] is None, texts[i] or ""))
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return Column(self._each_window(place[found]), tuple(texts[i] for i in order))

    def _each_window(self, of_stretch: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(of_stretch, np.diff(self.stretches.bounds))

    def take(self, keep: ArrayLike) -> WindowIndex:
        """Give the index of some of the windows, numbered anew in the same order.

        Parameters
        ----------
        keep
            (window,) bool.

        Raises
        ------
        InputError
            If ``keep`` is not one boolean per window.
        """
        mask = np.asarray(keep)
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise InputError(
                f"Keeping takes one boolean for each of {len(self)} windows, not {mask.dtype} {mask.shape}."
            )
        computed = None if self.computed is None else self.computed[mask]
        return replace(self, stretches=self.stretches.take(mask), computed=computed)

    def with_targets(self, values: ArrayLike, classes: tuple[str, ...] = ()) -> WindowIndex:
        """Give the same windows with targets that the user has computed.

        Parameters
        ----------
        values
            (window,) floats, or whole numbers of classes.
        classes
            Names of the classes; with whole numbers and none given, the numbers up to the largest.

        Raises
        ------
        InputError
            If there is not one value per window, one is not finite, or one is no number of a class.
        """
        given = np.asarray(values)
        if given.shape != (len(self),) or given.dtype.kind not in "iuf":
            raise InputError(
                f"Targets are one number for each of {len(self)} windows, not {given.dtype} {given.shape}."
            )
        if given.dtype.kind == "f":
            if classes:
                raise InputError("Targets of classes are their numbers, from 0. Give whole numbers.")
            computed: NDArray[np.float32] | NDArray[np.int32] = _as_float32(given)
        else:
            classes = classes or tuple(str(i) for i in range(int(given.max(initial=-1)) + 1))
            if given.size and not 0 <= int(given.min()) <= int(given.max()) < len(classes):
                raise InputError(
                    f"Numbers of classes reach from {given.min()} to {given.max()}, and there are "
                    f"{len(classes)} classes. Number them from 0."
                )
            computed = given.astype(np.int32)
        stretches = replace(self.stretches, targets=None)
        return replace(self, target=None, classes=classes, stretches=stretches, computed=computed)

    def table(self, numbers: ArrayLike | None = None) -> pa.Table:
        """List windows, in braindecode's words.

        Parameters
        ----------
        numbers
            (window,) which; all if None.

        Returns
        -------
        pyarrow.Table
            number, recording, anchor_s, i_window_in_trial, i_start_in_trial and i_stop_in_trial (samples
            of the main signal from the recording's first), target (float32, the name of the class, or null),
            then the recordings' descriptive fields.

        Raises
        ------
        InputError
            If a number is not of this index.
        """
        checked = self._checked(np.arange(len(self)) if numbers is None else numbers)
        located = self.locate(checked)
        start = located.starts[self.spec.signal]
        columns = {
            "number": checked,
            "recording": _texts(Texts(located.recording, self.tables.ids)),
            "anchor_s": located.anchor_s,
            "i_window_in_trial": located.i_window_in_trial,
            "i_start_in_trial": start,
            "i_stop_in_trial": start + located.lengths[self.spec.signal],
            "target": self._target_column(checked),
        }
        for name in self.tables.fields:
            texts = self.tables.field_texts(name)
            # A field of participants.tsv may well be called "target".
            shown = name if name not in columns else f"{name}_of_recording"
            columns[shown] = _texts(Texts(texts.codes[located.recording], texts.values))
        return pa.table(columns)

    def _target_column(self, numbers: NDArray[np.int64]) -> Any:
        found = self.targets(numbers)
        if found is None:
            return pa.nulls(len(numbers), pa.float32())
        return _texts(Texts(found.astype(np.int32), self.classes)) if self.classes else found

    def counts(self) -> dict[str, int]:
        """Count what was refused: reason -> windows, or recordings where they were refused as a whole."""
        counted: dict[str, int] = {}
        for refusal in self.refusals:
            counted[refusal.reason] = counted.get(refusal.reason, 0) + (refusal.n or 1)
        return {reason: counted[reason] for reason in REASONS if reason in counted}


def build_index(
    tables: Tables,
    spec: FixedWindows | EventWindows,
    target: Target | None = None,
    *,
    same_form: bool = True,
) -> WindowIndex:
    """Work out every admissible window.

    Parameters
    ----------
    tables
        What is known of the recordings.
    spec
        What the windows are.
    target
        What is predicted; windows without it are refused.
    same_form
        Whether recordings whose channels or rate differ from the commonest are refused; otherwise
        windows may differ in form, and a batch has to be of one.

    Raises
    ------
    InputError
        If the spec or target names a signal, field, value or column that is not there, or no window is
        left.
    """
    check_request(tables, spec, target)
    if isinstance(target, TimeTo) and (spec.crop_s is not None or spec.crop_samples is not None):
        raise InputError(
            "A time to an event cannot be told from a crop, which may lie anywhere in its window. Use a "
            "shift, which the time is told from, or windows of the crop's length."
        )
    chosen, refusals = choose(tables, spec, same_form=same_form)
    cutting = Cutting.of(tables, spec)
    origin = np.arange(len(tables), dtype=np.int32)
    if isinstance(spec, EventWindows):
        origin = np.flatnonzero(named_events(tables, spec.anchor)).astype(np.int32)
    origin = origin[chosen[cutting.recordings(origin)]]
    if isinstance(spec, EventWindows):
        is_anchor = anchor_events(tables, spec)[origin]
        refusals += no_trial(tables, cutting, origin[~is_anchor])
        origin = origin[is_anchor]
    n_windows = cutting.n_windows(origin)
    fits = n_windows > 0
    refusals += too_short(tables, cutting, origin[~fits])
    origin = origin[fits]
    found = None
    if target is not None and not isinstance(target, SignalTarget):
        found = look_up(target, tables, spec, cutting.recordings(origin), origin)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_windows[fits])])
    targets = None if found is None else found.values
    candidates = Stretches(origin, np.zeros(len(origin), np.int32), bounds, targets)
    keep, refused = judge(tables, cutting, candidates, None if found is None else found.present)
    refusals += refused
    stretches = candidates.take(keep)
    classes = () if found is None else found.classes
    if isinstance(target, RecordingColumn | EventColumn) and classes and not target.classes:
        stretches, classes = _used_classes(stretches, classes)
    refusals.sort(key=lambda refusal: (refusal.recording, REASONS.index(refusal.reason)))
    index = WindowIndex(
        tables=tables,
        spec=spec,
        target=target,
        classes=classes,
        stretches=stretches,
        computed=None,
        refusals=tuple(refusals),
    )
    if not len(index) and not refusals:
        raise InputError(
            f"No recording is what is asked for in every field: {_spelled_where(spec)}. Ask for less."
        )
    if not len(index):
        counts = index.counts()
        first = {refusal.reason: refusal for refusal in reversed(refusals)}
        told = "; ".join(
            f"{n} {reason!r}, such as of {first[reason].recording}: {first[reason].detail}"
            for reason, n in counts.items()
        )
        remedy = "Change what is asked for, or see the recordings."
        if "too short" in counts and isinstance(spec, EventWindows) and not spec.has_duration:
            # Markers of most recording systems last no time at all.
            remedy = "A trial lasts as long as its event says: give trial_duration_s."
        raise InputError(f"No window is left. Refused: {told}. {remedy}")
    return index


def _spelled_where(spec: FixedWindows | EventWindows) -> str:
    return " and ".join(f"{field} {', '.join(values)}" for field, values in spec.where.items())


def _used_classes(stretches: Stretches, classes: tuple[str, ...]) -> tuple[Stretches, tuple[str, ...]]:
    """Give numbers to the classes that windows have; those of refused windows alone are none."""
    assert stretches.targets is not None
    used, targets = np.unique(stretches.targets, return_inverse=True)
    renumbered = replace(stretches, targets=targets.astype(np.int32))
    return renumbered, tuple(classes[i] for i in used)


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # refused below
        numbers = values.astype(np.float32)  # a copy: the caller's array stays the caller's
    if n_wrong := int(np.count_nonzero(~np.isfinite(numbers))):
        raise InputError(
            f"{n_wrong} targets are no finite numbers. Leave those windows out first: "
            "windows.take(numpy.isfinite(values))."
        )
    return numbers


def _texts(texts: Texts) -> pa.DictionaryArray:
    codes = pa.array(texts.codes, mask=texts.codes < 0)
    return pa.DictionaryArray.from_arrays(codes, pa.array(texts.values, pa.string()))


def _digest(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little"))
        digest.update(chunk)
    return digest.hexdigest()


def _spelled(value: Any) -> dict[str, Any]:
    """Give the fields of a spec or target; younger ones only where they say something.

    So that an index has the fingerprint that it had before there were these fields.
    """
    return {name: each for name, each in asdict(value).items() if each or name not in _YOUNGER_FIELDS}


_YOUNGER_FIELDS = {
    "crop_s", "crop_samples", "excluding", "first_between", "shift_s", "shift_samples"
}  # fmt: skip


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _numbers(*columns: NDArray[Any]) -> Iterable[memoryview]:
    """Spell numbers out alike on every machine."""
    for column in columns:
        spelled = column.astype("<f8" if column.dtype.kind == "f" else "<i8", copy=False)
        yield np.ascontiguousarray(spelled).view(np.uint8).data
