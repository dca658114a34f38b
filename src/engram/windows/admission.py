"""Which recordings and windows are admitted, and what is said of those that are not.

Whole recordings are asked about first, then windows; each is refused for the first reason that applies:

==================  ================================================================================
``excluded``        the recording is one of those that are to be left out
``no signal``       the recording lacks a signal that is asked for
``no events``       the recording has no event that the anchor names
``other channels``  a signal's form differs from the commonest one (of equally common: the first one's)
``other rate``      a signal's rate does, among recordings of that form
``no trial``        an event that the anchor names is not the first between two that divide the recording
``too short``       a trial, or a whole recording's stretch, has no room for a window
``outside``         a window is not all within the recording, in every signal
``bad``             it overlaps an event whose description begins with BAD or EDGE, in any case
``gap``             it overlaps samples that were not measured, or a joint
``no target``       it has none
==================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError
from engram.units import times_to_samples
from engram.windows.cutting import Cutting, Located, Stretches
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.tables import SignalTable, Tables, Texts
from engram.windows.targets import SignalTarget, Target, named_events

__all__ = [
    "OF_RECORDINGS",
    "REASONS",
    "Barred",
    "Rules",
    "WindowRefusal",
    "check_request",
    "choose",
    "judge",
    "no_trial",
    "too_short",
]

REASONS = (
    "excluded",
    "no signal",
    "no events",
    "other channels",
    "other rate",
    "no trial",
    "too short",
    "outside",
    "bad",
    "gap",
    "no target",
)
"""Every reason to refuse, in the order in which they are asked about."""

OF_RECORDINGS = REASONS[:5]
"""The reasons for which recordings are refused as a whole."""

_NO_TRIAL, _TOO_SHORT, _OUTSIDE, _BAD, _GAP, _NO_TARGET = range(5, 11)
_ADMITTED = len(REASONS)

_SAID = {
    _NO_TRIAL: "its event is not the first of its kind between two that divide the recording",
    _TOO_SHORT: "there is no room for a window",
    _OUTSIDE: "it is not all within the recording",
    _BAD: "it overlaps an event marked BAD or EDGE",
    _GAP: "it overlaps samples that were not measured",
    _NO_TARGET: "it has no target",
}

# Windows judged at a time: some ten arrays of 8 bytes each, 20 MB.
_AT_ONCE = 1 << 18

# Recording and sample in one sortable integer. 2**38 samples are eight years at 1 kHz, and 2**23
# recordings are left.
_PER_RECORDING = 1 << 40
_MOST_SAMPLES = 1 << 38


@dataclass(frozen=True, slots=True)
class WindowRefusal:
    """Windows of one recording that were refused for one reason."""

    recording: str
    """Id of the recording."""
    reason: str
    """One of `REASONS`."""
    n: int
    """Windows (events for ``no trial``, trials for ``too short``), or 0: the recording as a whole."""
    detail: str
    """What was seen, and where first."""


class Barred:
    """Stretches of samples that no window may overlap.

    A stretch of length zero is a joint between two samples: windows may end or begin there, and not
    reach over it, which is MNE's ``reject_by_annotation``.

    Parameters
    ----------
    recording
        (stretch,) number of the recording.
    start, stop
        (stretch,) samples, half-open.

    Examples
    --------
    >>> import numpy as np
    >>> zero = np.zeros(3, np.int32)
    >>> barred = Barred(zero[:1], np.array([10]), np.array([20]))
    >>> barred.overlap(zero, np.array([0, 5, 20]), np.array([10, 11, 30]))
    array([False,  True, False])
    """

    def __init__(
        self, recording: NDArray[np.int32], start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> None:
        starts = _keys(recording, start)
        order = np.argsort(starts)
        self._starts = starts[order]
        # How far any stretch so far reaches; a later recording's keys are all greater. The last entry
        # is found where there is no stretch before a window.
        reach = np.maximum.accumulate(_keys(recording, stop)[order])
        self._reach = np.append(reach, np.iinfo(np.int64).min)

    def overlap(
        self, recording: NDArray[np.int32], start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Tell which windows [start, stop) overlap a stretch of their recording: (window,) bool."""
        n_before = np.searchsorted(self._starts, _keys(recording, stop))
        overlaps: NDArray[np.bool_] = self._reach[n_before - 1] > _keys(recording, start)
        return overlaps


def _keys(recording: NDArray[np.int32], sample: NDArray[np.int64]) -> NDArray[np.int64]:
    return recording.astype(np.int64) * _PER_RECORDING + np.clip(sample, -_MOST_SAMPLES, _MOST_SAMPLES)


def check_request(tables: Tables, spec: FixedWindows | EventWindows, target: Target | None) -> None:
    """Check that every name of a spec and of a signal to predict is there.

    An anchor may name an event that no recording has, as long as there is another: somebody may predict
    recordings of one condition alone. Who is to be left out need not be there.

    Raises
    ------
    InputError
        If a signal, field or value is not there, or no event of the anchor is.
    """
    for name in spec.signals:
        if name not in tables.signals or not tables.signals[name].present.any():
            raise InputError(f"No recording has a signal {name!r}. There are: {_listed(tables.signals)}.")
    for name in (*spec.where, *spec.excluding):
        if name not in tables.fields:
            raise InputError(f"Recordings have no field {name!r}. There are: {_listed(tables.fields)}.")
    for name, values in spec.where.items():
        there_are = {value for value in tables.fields[name] if value is not None}
        if unknown := [value for value in values if value not in there_are]:
            raise InputError(f"No recording has {name} {_listed(unknown)}. There are: {_listed(there_are)}.")
    if isinstance(spec, EventWindows) and not named_events(tables, spec.anchor).any():
        raise InputError(
            f"No recording has an event {_listed(spec.anchor)}. "
            f"There are: {_listed(tables.event_texts('description').values)}."
        )
    if not isinstance(target, Target | None):
        raise InputError(f"{target!r} is no target. Give such as RecordingColumn('age') or TimeTo(('rt',)).")
    if isinstance(target, SignalTarget) and target.signal not in spec.signals:
        raise InputError(
            f"{target.signal!r} cannot be predicted: it is no signal of the windows, which are of "
            f"{_listed(spec.signals)}. Add a Span of it."
        )
    if isinstance(target, SignalTarget) and len(spec.signals) == 1:
        raise InputError(
            f"{target.signal!r} is the only signal: nothing is left to predict it from. Add a Span of one."
        )


def _listed(names: Collection[str]) -> str:
    """Name some, in order: a list of a thousand subjects helps nobody."""
    found = sorted(names)
    more = f", ... ({len(found)} in all)" if len(found) > 12 else ""
    return ", ".join(found[:12]) + more or "none"


class _Choice:
    """Recordings that are still chosen, and what was refused so far."""

    def __init__(self, ids: tuple[str, ...]) -> None:
        self.ids = ids
        self.chosen = np.ones(len(ids), bool)
        self.refusals: list[WindowRefusal] = []

    def refuse(self, wrong: NDArray[np.bool_], reason: str, say: Callable[[int], str]) -> None:
        numbers = np.flatnonzero(self.chosen & wrong).tolist()
        self.refusals += [WindowRefusal(self.ids[i], reason, 0, say(i)) for i in numbers]
        self.chosen[numbers] = False

    def commonest(self, values: NDArray[Any]) -> Any:
        """Give the commonest value of the chosen recordings; of equally common ones the first's."""
        used, first, n_each = np.unique(values[self.chosen], return_index=True, return_counts=True)
        return used[np.lexsort((first, -n_each))[0]]


def choose(
    tables: Tables, spec: FixedWindows | EventWindows, *, same_form: bool
) -> tuple[NDArray[np.bool_], list[WindowRefusal]]:
    """Choose the recordings that windows are cut from.

    Returns
    -------
    chosen, refusals
        (recording,) bool, and why the others that were asked for are not.
    """
    choice = _Choice(tables.ids)
    for field, values in spec.where.items():
        choice.chosen &= _is_one_of(tables.field_texts(field), values)
    for field, values in spec.excluding.items():
        _choose_others(choice, field, tables.field_texts(field), values)
    for name in spec.signals:
        _choose_present(choice, name, tables.signals[name])
    if isinstance(spec, EventWindows):
        recording = tables.event_numbers("recording")[named_events(tables, spec.anchor)]
        is_bare = np.bincount(recording, minlength=len(tables)) == 0
        choice.refuse(is_bare, "no events", lambda _: f"it has no event {_listed(spec.anchor)}")
    if same_form:
        for name in spec.signals:
            _choose_form(choice, name, tables.signals[name])
    return choice.chosen, choice.refusals


def _is_one_of(texts: Texts, values: tuple[str, ...]) -> NDArray[np.bool_]:
    # One more at the end, which code -1 finds: no value.
    named = np.array([*(value in values for value in texts.values), False])
    return np.asarray(named[texts.codes])


def _choose_others(choice: _Choice, field: str, texts: Texts, values: tuple[str, ...]) -> None:
    choice.refuse(
        _is_one_of(texts, values), "excluded", lambda i: f"its {field} is {texts.values[texts.codes[i]]!r}"
    )


def _choose_present(choice: _Choice, name: str, signal: SignalTable) -> None:
    choice.refuse(~signal.present, "no signal", lambda _: f"it has no {name!r}")


def _choose_form(choice: _Choice, name: str, signal: SignalTable) -> None:
    if not choice.chosen.any():
        return
    form = choice.commonest(signal.form)
    choice.refuse(
        signal.form != form,
        "other channels",
        lambda i: f"its {name!r} has {signal.forms[signal.form[i]]}; most have {signal.forms[form]}",
    )
    rate_hz = choice.commonest(signal.rate_hz)
    choice.refuse(
        signal.rate_hz != rate_hz,
        "other rate",
        lambda i: f"its {name!r} has {signal.rate_hz[i]:g} Hz; most have {rate_hz:g} Hz",
    )


class Rules:
    """What windows must be within, and must not overlap, in every signal.

    Parameters
    ----------
    tables
        What is known of the recordings.
    signals
        Names of the signals.
    """

    def __init__(self, tables: Tables, signals: Collection[str]) -> None:
        self._signals = [_SignalRules.of(tables, name) for name in signals]

    def verdict(self, located: Located) -> NDArray[np.uint8]:
        """Give the place in `REASONS` of the first rule that each window breaks, in any signal."""
        verdict = np.full(len(located.recording), _ADMITTED, np.uint8)
        for signal in self._signals:
            np.minimum(verdict, signal.verdict(located), out=verdict)
        return verdict

    def admit(self, located: Located) -> NDArray[np.bool_]:
        """Tell which windows break none: (window,) bool."""
        is_admitted: NDArray[np.bool_] = self.verdict(located) == _ADMITTED
        return is_admitted


class _Tally:
    """Refused windows, counted by recording and reason."""

    def __init__(self) -> None:
        self._counted: dict[tuple[int, int], tuple[int, float]] = {}

    def add(
        self, recording: NDArray[np.int32], anchor_s: NDArray[np.float64], verdict: NDArray[np.uint8]
    ) -> None:
        """Count windows by their verdicts: places in `REASONS`, or `_ADMITTED`."""
        refused = np.flatnonzero(verdict != _ADMITTED)
        pairs = recording[refused].astype(np.int64) * len(REASONS) + verdict[refused]
        used, first, n_each = np.unique(pairs, return_index=True, return_counts=True)
        for pair, row, n in zip(used.tolist(), refused[first], n_each.tolist(), strict=True):
            key = divmod(pair, len(REASONS))
            n_before, first_s = self._counted.get(key, (0, float(anchor_s[row])))
            self._counted[key] = (n_before + n, first_s)

    def refusals(self, tables: Tables) -> list[WindowRefusal]:
        """Name what was counted."""
        return [
            WindowRefusal(tables.ids[i], REASONS[reason], n, f"{_SAID[reason]}, the first at {first_s:.3f} s")
            for (i, reason), (n, first_s) in self._counted.items()
        ]


def no_trial(tables: Tables, cutting: Cutting, row: NDArray[np.int32]) -> list[WindowRefusal]:
    """Refuse events that the anchor names and that are no trials: (event,) rows."""
    recording, onset_s = cutting.recordings(row), cutting.event_onset_s[row]
    tally = _Tally()
    tally.add(recording, onset_s, np.full(len(row), _NO_TRIAL, np.uint8))
    return tally.refusals(tables)


def too_short(tables: Tables, cutting: Cutting, origin: NDArray[np.int32]) -> list[WindowRefusal]:
    """Refuse trials without room for a window: (trial,) origins."""
    if cutting.event_recording is None:
        said = _SAID[_TOO_SHORT]
        return [WindowRefusal(tables.ids[i], "too short", 0, said) for i in origin.tolist()]
    tally, trials = _Tally(), cutting.trials(origin)
    tally.add(trials.recording, trials.anchor_s, np.full(len(origin), _TOO_SHORT, np.uint8))
    return tally.refusals(tables)


def judge(
    tables: Tables, cutting: Cutting, candidates: Stretches, is_target: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_], list[WindowRefusal]]:
    """Judge every window there is room for.

    Parameters
    ----------
    tables
        What is known of the recordings.
    cutting
        Where windows lie.
    candidates
        All windows.
    is_target
        (stretch,) whether the trial has a target; None where none is asked for.

    Returns
    -------
    keep, refusals
        (window,) bool, and what was refused.
    """
    tally = _Tally()
    rules = Rules(tables, cutting.signals)
    is_whole = _admitted_whole(rules, cutting, candidates)
    if is_target is not None:
        is_whole &= is_target
    keep = np.repeat(is_whole, np.diff(candidates.bounds))
    for first in range(0, len(candidates), _AT_ONCE):
        numbers = first + np.flatnonzero(~keep[first : first + _AT_ONCE])
        if not len(numbers):
            continue
        stretch, i_window = candidates.find(numbers)
        located = cutting.lay(candidates.origin[stretch], i_window)
        verdict = rules.verdict(located)
        if is_target is not None:
            # Of several reasons the one that is asked about first, the least, counts.
            verdict[(verdict == _ADMITTED) & ~is_target[stretch]] = _NO_TARGET
        keep[numbers] = verdict == _ADMITTED
        tally.add(located.recording, located.anchor_s, verdict)
    return keep, tally.refusals(tables)


def _admitted_whole(rules: Rules, cutting: Cutting, candidates: Stretches) -> NDArray[np.bool_]:
    """Tell in which trials every window is admissible, without looking at each: (stretch,) bool.

    Windows of a trial are equally long, and later ones lie later in every signal. So where nothing is
    to be refused from the first one's start to the last one's end, none of them is. Ten million
    sliding windows of two thousand recordings are judged in milliseconds, and not in a second.
    """
    n_windows = np.diff(candidates.bounds)
    is_whole = np.zeros(len(n_windows), bool)
    several = np.flatnonzero(n_windows > 1)
    for begin in range(0, len(several), _AT_ONCE):
        some = several[begin : begin + _AT_ONCE]
        origin, i_first = candidates.origin[some], candidates.i_first[some].astype(np.int64)
        first, last = cutting.lay(origin, i_first), cutting.lay(origin, i_first + n_windows[some] - 1)
        reach = {name: last.starts[name] + last.lengths[name] - first.starts[name] for name in first.starts}
        whole = replace(first, lengths=reach)
        is_whole[some] = rules.admit(first) & rules.admit(whole)
    return is_whole


@dataclass(frozen=True, slots=True, eq=False)
class _SignalRules:
    """What windows of one signal must be within, and must not overlap."""

    name: str
    n_samples: NDArray[np.int64]
    bad: Barred | None
    gaps: Barred | None

    @classmethod
    def of(cls, tables: Tables, name: str) -> Self:
        signal = tables.signals[name]
        return cls(name, signal.n_samples, _bad(tables, signal), _gaps(signal))

    def verdict(self, located: Located) -> NDArray[np.uint8]:
        """Give the place in `REASONS` of the first rule that each window breaks."""
        recording, start, length = located.recording, located.starts[self.name], located.lengths[self.name]
        stop = start + length
        verdict = np.full(len(recording), _ADMITTED, np.uint8)
        if self.gaps is not None:
            verdict[self.gaps.overlap(recording, start, stop)] = _GAP
        if self.bad is not None:
            verdict[self.bad.overlap(recording, start, stop)] = _BAD
        verdict[(start < 0) | (stop > self.n_samples[recording])] = _OUTSIDE
        verdict[length < 1] = _TOO_SHORT
        return verdict


def _gaps(signal: SignalTable) -> Barred | None:
    counted = [(i, gaps) for i, gaps in signal.gaps.items() if len(gaps)]
    if not counted:
        return None
    recording = np.repeat(
        np.array([i for i, _ in counted], np.int32), np.array([len(gaps) for _, gaps in counted])
    )
    edges = np.concatenate([gaps for _, gaps in counted])
    return Barred(recording, edges[:, 0], edges[:, 1])


def _bad(tables: Tables, signal: SignalTable) -> Barred | None:
    """Find the events marked bad, in samples of a signal that their recordings have."""
    descriptions = tables.event_texts("description").values
    marked = tuple(text for text in descriptions if text.upper().startswith(("BAD", "EDGE")))
    is_bad = named_events(tables, marked) & signal.present[tables.event_numbers("recording")]
    if not is_bad.any():
        return None
    recording = tables.event_numbers("recording")[is_bad]
    since_s = tables.event_numbers("onset_s")[is_bad] - signal.start_s[recording]
    until_s = since_s + tables.event_numbers("duration_s")[is_bad]
    rate_hz = signal.rate_hz[recording]
    return Barred(recording, times_to_samples(since_s, rate_hz), times_to_samples(until_s, rate_hz))
