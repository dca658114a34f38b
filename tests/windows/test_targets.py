from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InputError
from engram.testing.tables import ToySignal, make_tables
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.targets import (
    EventColumn,
    RecordingColumn,
    TimeTo,
    anchor_events,
    look_up,
    named_events,
)

EVENTS = EventWindows(signal="eeg", anchor=("square",))
WHOLE = FixedWindows(signal="eeg", window_size_s=1.0)


def _values(texts: list[str | None], target: RecordingColumn) -> list[float]:
    keys = [f"{i:03}" for i in range(len(texts))]
    tables = make_tables(
        {key: {"eeg": ToySignal()} for key in keys},
        fields={key: {"score": text} for key, text in zip(keys, texts, strict=True)},
    )
    origin = np.arange(len(texts), dtype=np.int32)
    found = look_up(target, tables, WHOLE, origin, origin)
    assert found.values.dtype == (np.float32 if target.task == "regression" else np.int32)
    return [float(v) if p else math.nan for v, p in zip(found.values, found.present, strict=True)]


def test_text_that_is_no_finite_number_is_no_target() -> None:
    """What is missing, not a number, not finite or beyond float32 gives no target, and no error."""
    texts = ["9.5", None, "n/a", "NaN", "", "high", "inf", "1e39", " 7 ", "-1e-3"]
    found = _values(texts, RecordingColumn("score"))
    np.testing.assert_array_equal(
        np.array(found, np.float32), np.array([9.5, *[np.nan] * 7, 7, -1e-3], np.float32)
    )


def test_classes_are_the_sorted_values_or_those_named() -> None:
    """Classes are numbered as named, else as sorted; missing and unnamed values are no target."""
    texts = ["F", "M", None, "nan", "n/a", "F"]
    sorted_ = _values(texts, RecordingColumn("score", "classification"))
    named = _values(texts, RecordingColumn("score", "classification", ("M", "X")))
    np.testing.assert_array_equal(sorted_, [0, 1, np.nan, np.nan, np.nan, 0])
    np.testing.assert_array_equal(named, [np.nan, 0, np.nan, np.nan, np.nan, np.nan])


moments = st.integers(0, 12).map(lambda n: n / 4)
rows = st.lists(
    st.tuples(moments, st.sampled_from(["square", "circle", "press", "tap", "stop"])), max_size=12
)


@given(
    st.lists(rows, min_size=1, max_size=3),
    st.sets(st.sampled_from(["press", "tap"]), min_size=1),
    st.sets(st.sampled_from(["stop", "tap"])),
    st.none() | moments,
    st.none() | moments,
)
def test_an_answer_comes_before_the_next_anchor_and_before_what_ends_it(
    recordings: list[list[tuple[float, str]]],
    events: set[str],
    until: set[str],
    min_s: float | None,
    max_s: float | None,
) -> None:
    """`TimeTo` is the first answer at or after an anchor that no later anchor or end precedes."""
    if min_s is not None and max_s is not None and min_s > max_s:
        min_s, max_s = max_s, min_s
    tables = make_tables(
        {f"{i}": {"eeg": ToySignal()} for i in range(len(recordings))},
        {
            f"{i}": [{"onset_s": time_s, "description": name} for time_s, name in rows]
            for i, rows in enumerate(recordings)
        },
    )
    spec = EventWindows(signal="eeg", anchor=("square", "circle"))
    target = TimeTo(tuple(sorted(events)), tuple(sorted(until)), min_s, max_s)
    origin = np.flatnonzero(named_events(tables, spec.anchor)).astype(np.int32)
    found = look_up(target, tables, spec, tables.event_numbers("recording")[origin], origin)

    expected = []
    for of_recording in recordings:
        for onset_s, name in sorted(of_recording, key=lambda row: row[0]):
            if name not in spec.anchor:
                continue
            answers = [t for t, other in of_recording if other in events and t >= onset_s]
            ends = [t for t, other in of_recording if other in {*spec.anchor, *until} and t > onset_s]
            time_s = min(answers, default=math.inf) - onset_s
            is_target = min(answers, default=math.inf) < min(ends, default=math.inf)
            is_target &= (min_s or 0.0) <= time_s <= (math.inf if max_s is None else max_s)
            expected.append(time_s if is_target else math.nan)
    np.testing.assert_array_equal(found.values, np.array(expected, np.float32))


trial_rows = st.lists(
    st.tuples(moments, st.sampled_from(["start", "start", "left", "right", "press"])), max_size=16
)


@given(st.lists(trial_rows, min_size=1, max_size=3))
def test_trials_between_events_are_as_in_the_challenge(recordings: list[list[tuple[float, str]]]) -> None:
    """From each start to the next: the first target within, and the first press from then on within.

    The last start begins no trial. Written as the EEG Foundation Challenge's trial table is: interval
    by interval.
    """
    tables = make_tables(
        {f"{i}": {"eeg": ToySignal()} for i in range(len(recordings))},
        {
            f"{i}": [{"onset_s": time_s, "description": name} for time_s, name in rows]
            for i, rows in enumerate(recordings)
        },
    )
    spec = EventWindows(signal="eeg", anchor=("left", "right"), first_between=("start",))
    origin = np.flatnonzero(anchor_events(tables, spec)).astype(np.int32)
    recording = tables.event_numbers("recording")[origin]
    found = look_up(TimeTo(("press",)), tables, spec, recording, origin)

    expected = []
    for number, of_recording in enumerate(recordings):
        starts = sorted(time_s for time_s, name in of_recording if name == "start")
        for start_s, stop_s in pairwise(starts):
            inside = sorted(row for row in of_recording if start_s <= row[0] < stop_s)
            targets = [time_s for time_s, name in inside if name in ("left", "right")]
            if not targets:
                continue
            presses = [time_s for time_s, name in inside if name == "press" and time_s >= targets[0]]
            expected.append((number, targets[0], presses[0] - targets[0] if presses else math.nan))
    onset_s = tables.event_numbers("onset_s")[origin]
    assert recording.tolist() == [number for number, _, _ in expected]
    assert onset_s.tolist() == [target_s for _, target_s, _ in expected]
    np.testing.assert_array_equal(found.values, np.array([time_s for *_, time_s in expected], np.float32))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RecordingColumn("age", "ranking"), "'regression' or 'classification'"),  # type: ignore[arg-type]
        (lambda: RecordingColumn("age", classes=("a",)), "has no classes"),
        (lambda: EventColumn("side", "classification", ("a", "b", "a")), "name one twice"),
        (lambda: EventColumn("description", "classification", "left"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: TimeTo(()), "names nothing"),
        (lambda: TimeTo("press"), r"\('press',\)"),  # type: ignore[arg-type]
        (lambda: TimeTo(("press",), min_s=2.0, max_s=1.0), "0 <= min_s <= max_s"),
        (lambda: TimeTo(("press",), max_s=math.nan), "max_s=nan"),
    ],
)
def test_targets_refuse_what_cannot_be_meant(make: Any, said: str) -> None:
    """An unknown task, classes of numbers, no event or an empty range is refused where it is written."""
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("target", "spec", "said"),
    [
        (RecordingColumn("ages"), WHOLE, "Recordings have the fields: age"),
        (EventColumn("rts"), EVENTS, "Events have the columns: description, rt"),
        (EventColumn("description"), EVENTS, "has no number, but such as"),
        (EventColumn("onset_s"), EVENTS, "Events have the columns: description, rt"),
        (EventColumn("rt"), WHOLE, "Cut EventWindows"),
        (TimeTo(("rt",)), WHOLE, "Cut EventWindows"),
        (TimeTo(("rt", "square")), EVENTS, "anchors themselves"),
    ],
)
def test_a_target_that_is_not_there_is_named_beside_what_is(
    target: RecordingColumn | EventColumn | TimeTo, spec: FixedWindows | EventWindows, said: str
) -> None:
    """A wrong column is an error that lists the right ones; targets of events need anchors."""
    rows = [{"onset_s": 1.0, "description": "square", "rt": "0.4"}]
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": rows}, {"a": {"age": "9"}})
    with pytest.raises(InputError, match=said):
        look_up(target, tables, spec, np.zeros(1, np.int32), np.zeros(1, np.int32))
