"""What is predicted: a column of the recordings or events, a time, or a signal.

The values that say so, and `look_up`, which finds the targets of trials in the tables. Trials without
one are told apart here and refused by ``engram.windows.index``. A target that no column holds is
computed by the user and handed to ``WindowIndex.with_targets``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError
from engram.windows.spec import EventWindows, FixedWindows, check_names
from engram.windows.tables import Tables, Texts

__all__ = [
    "EventColumn",
    "Found",
    "RecordingColumn",
    "SignalTarget",
    "Target",
    "TargetTask",
    "TimeTo",
    "look_up",
    "named_events",
]

TargetTask: TypeAlias = Literal["regression", "classification"]
"""Numbers, or one of some classes."""


def _check_column(task: str, classes: tuple[str, ...]) -> None:
    if task not in get_args(TargetTask):
        raise InputError(f"task={task!r} is unknown. Use 'regression' or 'classification'.")
    check_names("classes", classes)
    if len(set(classes)) < len(classes):
        raise InputError(f"classes={classes!r} name one twice. Name each class once.")
    if task == "regression" and classes:
        raise InputError(f"A regression has no classes, not {classes!r}. Use task='classification'.")


@dataclass(frozen=True, slots=True)
class RecordingColumn:
    """A descriptive field of the recording: age, a score, a diagnosis.

    Raises
    ------
    InputError
        If the task is unknown, a class is named twice, or a regression is given classes.

    Examples
    --------
    >>> RecordingColumn("externalizing")
    RecordingColumn(column='externalizing', task='regression', classes=())
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    column: str
    """Name of the field. Text that is no finite number is no target of a regression."""
    task: TargetTask = "regression"
    """Whether the column holds numbers or names of classes."""
    classes: tuple[str, ...] = ()
    """The classes, numbered in this order; empty: those of the windows, sorted."""

    def __post_init__(self) -> None:
        _check_column(self.task, self.classes)


@dataclass(frozen=True, slots=True)
class EventColumn:
    """A column of the anchor event, such as a measured response time, or its description.

    Raises
    ------
    InputError
        If the task is unknown, a class is named twice, or a regression is given classes.

    Examples
    --------
    >>> EventColumn("description", "classification", ("left_target", "right_target")).classes
    ('left_target', 'right_target')
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    column: str
    """``"description"``, or another column of the events."""
    task: TargetTask = "regression"
    """Whether the column holds numbers or names of classes."""
    classes: tuple[str, ...] = ()
    """The classes, numbered in this order; empty: those of the windows, sorted."""

    def __post_init__(self) -> None:
        _check_column(self.task, self.classes)


@dataclass(frozen=True, slots=True)
class TimeTo:
    """Seconds from the anchor event to the first answering event, a regression.

    The first event of ``events`` at or after the anchor's onset counts, where it comes before the
    next anchor's onset and before the next event of ``until``, or that divides the recording
    (``EventWindows.first_between``), all of them later than the anchor's own.

    Raises
    ------
    InputError
        If no event is named, or the range is empty.

    Examples
    --------
    >>> TimeTo(("left_buttonPress", "right_buttonPress"), max_s=2.5).max_s
    2.5
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    events: tuple[str, ...]
    """Descriptions of the events that answer."""
    until: tuple[str, ...] = ()
    """Descriptions of events after which an answer belongs to something else."""
    min_s: float | None = None
    """The least time that is a target, itself included; None: any."""
    max_s: float | None = None
    """The largest time that is a target, itself included; None: any."""

    def __post_init__(self) -> None:
        check_names("events", self.events, at_least=1)
        check_names("until", self.until)
        least, most = self.min_s or 0.0, float("inf") if self.max_s is None else self.max_s
        if not 0.0 <= least <= most:
            raise InputError(
                f"No time lies between min_s={self.min_s} and max_s={self.max_s}. Use 0 <= min_s <= max_s."
            )


@dataclass(frozen=True, slots=True)
class SignalTarget:
    """One of the windows' signals: spike counts to be predicted from frames.

    Examples
    --------
    >>> SignalTarget("robs")
    SignalTarget(signal='robs')
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    signal: str
    """Name of the signal: the main one, or one ``beside`` it. The others are the input."""


Target: TypeAlias = RecordingColumn | EventColumn | TimeTo | SignalTarget
"""Any of the targets."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The targets of some trials."""

    values: NDArray[np.float32] | NDArray[np.int32]
    """(trial,) number, or number of the class; NaN or -1 where there is none."""
    classes: tuple[str, ...]
    """Names of the classes; () for numbers."""

    @property
    def present(self) -> NDArray[np.bool_]:
        """(trial,) whether there is a target."""
        return self.values >= 0 if self.values.dtype == np.int32 else ~np.isnan(self.values)


def named_events(tables: Tables, names: tuple[str, ...]) -> NDArray[np.bool_]:
    """Tell which events have one of some descriptions: (event,) bool."""
    descriptions = tables.event_texts("description")
    wanted = np.array([value in names for value in descriptions.values], bool)
    return wanted[descriptions.codes] if len(wanted) else np.zeros(len(descriptions.codes), bool)


def anchor_events(tables: Tables, spec: EventWindows) -> NDArray[np.bool_]:
    """Tell which events are the anchors of windows: (event,) bool."""
    named = named_events(tables, spec.anchor)
    if not spec.first_between:
        return named
    recording, moment = tables.event_numbers("recording"), _moments(tables)[0]
    # As infinitely many dividers as wanted, so that every row has one before it and one after it, of no
    # recording if there is none.
    dividers = np.flatnonzero(named_events(tables, spec.first_between))
    moments = np.concatenate([[-1], moment[dividers], [len(moment)]])
    of_recording = np.concatenate([[-1], recording[dividers], [-1]])
    rows = np.flatnonzero(named)
    before = np.searchsorted(moments[:-1], moment[rows], side="right") - 1
    is_between = (of_recording[before] == recording[rows]) & (of_recording[before + 1] == recording[rows])
    firsts = np.unique(before[is_between], return_index=True)[1]
    anchors = np.zeros(len(named), bool)
    anchors[rows[is_between][firsts]] = True
    return anchors


def _moments(tables: Tables) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the moment of each event (rows of one recording and onset share one), and their first rows."""
    recording, onset_s = tables.event_numbers("recording"), tables.event_numbers("onset_s")
    is_new = np.ones(len(onset_s), bool)
    is_new[1:] = (np.diff(recording) != 0) | (np.diff(onset_s) != 0)
    return np.cumsum(is_new) - 1, np.flatnonzero(is_new)


def look_up(
    target: RecordingColumn | EventColumn | TimeTo,
    tables: Tables,
    spec: FixedWindows | EventWindows,
    recording: NDArray[np.int32],
    origin: NDArray[np.int32],
) -> Found:
    """Find the targets of trials.

    Parameters
    ----------
    target
        What is predicted.
    tables
        What is known of the recordings.
    spec
        What the windows are.
    recording
        (trial,) number of the recording.
    origin
        (trial,) row of the anchor event; the recording's number where whole recordings are cut.

    Raises
    ------
    InputError
        If there is no such column, it has text where numbers are asked for, or a target of events is
        asked of windows that have none.
    """
    if isinstance(target, RecordingColumn):
        if target.column not in tables.fields:
            raise _no_column(target, sorted(tables.fields), "Recordings have the fields")
        return _column(target, tables.field_texts(target.column), recording)
    if isinstance(spec, FixedWindows):
        raise InputError(f"{type(target).__name__} is about an anchor event. Cut EventWindows for it.")
    if isinstance(target, TimeTo):
        return _times(target, tables, spec, origin)
    names = [name for name in tables.events.column_names if name not in _NUMBERS]
    if target.column not in names:
        raise _no_column(target, names, "Events have the columns")
    return _column(target, tables.event_texts(target.column), origin)


_LARGEST = float(np.finfo(np.float32).max)

_NUMBERS = ("recording", "onset_s", "duration_s")


def _no_column(target: RecordingColumn | EventColumn, names: list[str], there_are: str) -> InputError:
    return InputError(f"No column {target.column!r} to predict. {there_are}: {', '.join(names) or 'none'}.")


def _column(target: RecordingColumn | EventColumn, texts: Texts, rows: NDArray[np.int32]) -> Found:
    # One more at the end, which code -1 finds: no value.
    if target.task == "regression":
        numbers = np.array([*map(_number, texts.values), math.nan], np.float32)
        words = [value for value in texts.values if not _is_missing(value)]
        if words and np.isnan(numbers).all():
            raise InputError(
                f"Column {target.column!r} has no number, but such as {words[0]!r}. "
                "Use task='classification', or another column."
            )
        return Found(numbers[texts.codes[rows]], ())
    there_are = tuple(sorted(value for value in texts.values if not _is_missing(value)))
    classes = target.classes or there_are
    number = {name: i for i, name in enumerate(classes)}
    codes = np.array([*(number.get(value, -1) for value in texts.values), -1], np.int32)
    return Found(codes[texts.codes[rows]], classes)


def _is_missing(text: str) -> bool:
    return text.strip().lower() in {"", "n/a", "nan"}


def _number(text: str) -> float:
    """Read a finite number, else NaN: what cannot be a target is refused and counted, not raised."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan


def _times(target: TimeTo, tables: Tables, spec: EventWindows, origin: NDArray[np.int32]) -> Found:
    if both := set(target.events) & set(spec.anchor):
        raise InputError(
            f"TimeTo looks for {sorted(both)} before the next anchor, and they are anchors themselves. "
            "Name other events."
        )
    onset_s = np.append(tables.event_numbers("onset_s"), math.inf)
    recording = np.append(tables.event_numbers("recording"), -1)
    n_events = len(onset_s) - 1
    of_event, first_rows = _moments(tables)
    first_rows = np.append(first_rows, n_events)
    here, after = first_rows[of_event[origin]], first_rows[of_event[origin] + 1]

    def next_s(events: NDArray[np.bool_], row: NDArray[np.int64]) -> NDArray[np.float64]:
        """Onset of the first of some events from a row on, in the same recording; else infinity."""
        rows = np.append(np.flatnonzero(events), n_events)
        found = rows[np.searchsorted(rows, row)]
        return np.where(recording[found] == recording[origin], onset_s[found], math.inf)

    answer_s = next_s(named_events(tables, target.events), here)
    ends = anchor_events(tables, spec) | named_events(tables, (*target.until, *spec.first_between))
    end_s = next_s(ends, after)
    time_s = answer_s - onset_s[origin]
    least, most = target.min_s or 0.0, math.inf if target.max_s is None else target.max_s
    is_target = (answer_s < end_s) & (time_s >= least) & (time_s <= most)
    return Found(np.where(is_target, time_s, math.nan).astype(np.float32), ())
