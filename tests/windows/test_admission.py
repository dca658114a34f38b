from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InputError
from engram.testing.tables import ToySignal, make_tables
from engram.windows.admission import Barred, WindowRefusal, check_request, choose
from engram.windows.index import build_index
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.targets import EventColumn, SignalTarget

WHOLE = FixedWindows(signal="eeg", window_size_s=1.0)

samples = st.integers(-3, 12)
intervals = st.lists(st.tuples(st.integers(0, 2), samples, st.integers(0, 4)), max_size=8)


@given(intervals, intervals)
def test_overlap_is_as_of_two_intervals(barred: list[Any], windows: list[Any]) -> None:
    """A window overlaps where a stretch of its recording begins before its end and ends after its start."""
    number, start, length = np.array(barred, np.int64).reshape(-1, 3).T
    rule = Barred(number.astype(np.int32), start, start + length)
    recording, first, n = np.array(windows, np.int64).reshape(-1, 3).T
    found = rule.overlap(recording.astype(np.int32), first, first + n)
    expected = [any(i == j and a < b + m and a + k > b for j, a, k in barred) for i, b, m in windows]
    assert found.tolist() == expected


def test_recordings_of_another_form_are_refused_by_the_commonest() -> None:
    """Channels, then rates, of most recordings are kept; of equally common ones the first recording's."""
    six, slow = ToySignal(form="6 channels, float16"), ToySignal(rate_hz=50.0)
    tables = make_tables(
        {"a": {"eeg": six}, "b": {"eeg": slow}, "c": {"eeg": ToySignal()}, "d": {"stim": ToySignal()}}
    )
    chosen, refusals = choose(tables, WHOLE, same_form=True)
    assert chosen.tolist() == [False, True, False, False]
    assert refusals == [
        WindowRefusal("d", "no signal", 0, "it has no 'eeg'"),
        WindowRefusal(
            "a",
            "other channels",
            0,
            "its 'eeg' has 6 channels, float16; most have 2 channels (C3, C4), float16",
        ),
        WindowRefusal("c", "other rate", 0, "its 'eeg' has 100 Hz; most have 50 Hz"),
    ]
    assert choose(tables, WHOLE, same_form=False)[0].tolist() == [True, True, True, False]


def test_only_recordings_that_are_asked_for_are_counted() -> None:
    """What ``where`` leaves out is not refused, and has no say in what is commonest."""
    six = ToySignal(form="6 channels, float16")
    tables = make_tables(
        {"a": {"eeg": six}, "b": {"eeg": six}, "c": {"eeg": ToySignal()}, "d": {"eeg": ToySignal()}},
        {"a": [{"onset_s": 1.0, "description": "rest"}], "d": [{"onset_s": 1.0, "description": "square"}]},
        {key: {"task": "rest" if key in "ab" else "count"} for key in "abcd"},
    )
    spec = EventWindows(signal="eeg", anchor=("square",), trial_duration_s=1.0, where={"task": ("count",)})
    chosen, refusals = choose(tables, spec, same_form=True)
    assert chosen.tolist() == [False, False, False, True]
    assert refusals == [WindowRefusal("c", "no events", 0, "it has no event square")]


def test_recordings_that_are_to_be_left_out_are_refused_and_counted() -> None:
    """They have no say in what is commonest; who is named and not there is no mistake."""
    six = ToySignal(form="6 channels, float16")
    tables = make_tables(
        {"a": {"eeg": six}, "b": {"eeg": six}, "c": {"eeg": ToySignal()}},
        fields={"a": {"subject": "A"}, "b": {"subject": "B"}, "c": {}},
    )
    spec = replace(WHOLE, excluding={"subject": ("A", "B", "Z")})
    index = build_index(tables, spec)
    assert index.counts() == {"excluded": 2}
    assert index.refusals[0] == WindowRefusal("a", "excluded", 0, "its subject is 'A'")
    assert {index.tables.ids[i] for i in index.recordings.tolist()} == {"c"}


def test_anchors_that_are_no_trials_are_counted() -> None:
    """Before the first dividing event, after another anchor between two, and after the last."""
    rows = [(0.5, "go"), (1.0, "start"), (1.5, "go"), (2.0, "go"), (3.0, "start"), (4.0, "go")]
    events = {"a": [{"onset_s": onset_s, "description": name} for onset_s, name in rows]}
    tables = make_tables({"a": {"eeg": ToySignal()}}, events)
    spec = EventWindows(signal="eeg", anchor=("go",), trial_duration_s=1.0, first_between=("start",))
    index = build_index(tables, spec)
    assert index.locate([0]).anchor_s.tolist() == [1.5]
    said = (
        "its event is not the first of its kind between two that divide the recording, the first at 0.500 s"
    )
    assert index.refusals == (WindowRefusal("a", "no trial", 3, said),)
    assert index.column("trial").values == ("0",)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (FixedWindows(signal="meg"), "No recording has a signal 'meg'. There are: eeg."),
        (FixedWindows(signal="eeg", beside=(Span(signal="stim"),)), "No recording has a signal 'stim'"),
        (replace(WHOLE, where={"tasks": ("rest",)}), "no field 'tasks'. There are: task."),
        (replace(WHOLE, excluding={"tasks": ("rest",)}), "no field 'tasks'. There are: task."),
        (replace(WHOLE, where={"task": ("rest", "nap")}), "No recording has task nap. There are: rest."),
        (EventWindows(signal="eeg", anchor=("Square",)), "has an event Square. There are: rt, square."),
    ],
)
def test_a_name_that_is_not_there_is_named_beside_those_that_are(
    spec: FixedWindows | EventWindows, said: str
) -> None:
    """A mistyped signal, event, field or value is an error that lists the right ones."""
    events = [{"onset_s": 1.0, "description": name} for name in ("square", "rt")]
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": events}, {"a": {"task": "rest"}})
    with pytest.raises(InputError) as refusal:
        check_request(tables, spec, None)
    assert said in str(refusal.value)


def test_fields_that_no_recording_has_together_are_named() -> None:
    """Each value is there, but no recording has all of them: nothing was refused, and nothing is left."""
    recordings = {name: {"eeg": ToySignal()} for name in "ab"}
    fields = {"a": {"task": "rest", "release": "R1"}, "b": {"task": "nap", "release": "R2"}}
    spec = replace(WHOLE, where={"task": ("rest",), "release": ("R2",)})
    with pytest.raises(InputError, match="in every field: release R2 and task rest"):
        build_index(make_tables(recordings, {}, fields), spec)


def test_one_condition_alone_may_be_there() -> None:
    """An anchor of several names is not refused where some recording has one of them."""
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": [{"onset_s": 1.0, "description": "open"}]})
    check_request(tables, EventWindows(signal="eeg", anchor=("open", "closed")), None)


def test_what_is_predicted_is_a_target() -> None:
    """The name of a column alone does not say how it is read, and is told what does."""
    with pytest.raises(InputError, match=r"'age' is no target. Give such as RecordingColumn\('age'\)"):
        check_request(make_tables({"a": {"eeg": ToySignal()}}), WHOLE, "age")  # type: ignore[arg-type]


def test_a_signal_is_predicted_from_another() -> None:
    """A signal to predict has to be cut, the main one or one beside it, and another has to be left."""
    tables = make_tables({"a": {"eeg": ToySignal(), "stim": ToySignal()}})
    for name in ("eeg", "stim"):
        with pytest.raises(InputError, match="Add a Span of"):
            check_request(tables, WHOLE, SignalTarget(name))
    for name in ("eeg", "stim"):
        check_request(tables, replace(WHOLE, beside=(Span(signal="stim"),)), SignalTarget(name))


def test_a_window_is_refused_once_for_the_first_reason() -> None:
    """Windows are counted by recording and reason, with the first one's anchor, each for one reason."""
    squares = [(0.2, 1.0, "0.4"), (2.0, 0.1, "0.4"), (3.0, 1.0, None), (9.5, 1.0, None)]
    events: list[dict[str, Any]] = [
        {"onset_s": onset_s, "duration_s": duration_s, "description": "square", "rt": rt}
        for onset_s, duration_s, rt in squares
    ]
    events += [{"onset_s": 3.5, "duration_s": 0.5, "description": "bad_blink"}]
    tables = make_tables({"a": {"eeg": ToySignal(gaps=((50, 50), (350, 360)))}}, {"a": events})
    spec = EventWindows(signal="eeg", anchor=("square",), window_size_s=0.5)
    index = build_index(tables, spec, EventColumn("rt"))
    assert index.refusals == (
        WindowRefusal("a", "too short", 1, "there is no room for a window, the first at 2.000 s"),
        WindowRefusal("a", "outside", 1, "it is not all within the recording, the first at 10.000 s"),
        WindowRefusal("a", "bad", 1, "it overlaps an event marked BAD or EDGE, the first at 3.500 s"),
        WindowRefusal("a", "gap", 1, "it overlaps samples that were not measured, the first at 0.200 s"),
        WindowRefusal("a", "no target", 2, "it has no target, the first at 3.000 s"),
    )
    assert index.counts() == {"too short": 1, "outside": 1, "bad": 1, "gap": 1, "no target": 2}
    assert index.locate([0]).anchor_s.tolist() == [0.7]
    with pytest.raises(
        InputError, match=r"Refused: 1 'too short', such as of a: there .*; 6 'outside', such as"
    ):
        build_index(tables, replace(spec, trial_start_offset_s=100.0))


def test_a_recording_without_room_is_refused_as_a_whole() -> None:
    """A recording shorter than a window is one refusal that counts no windows."""
    tables = make_tables({"a": {"eeg": ToySignal(99)}, "b": {"eeg": ToySignal(100)}})
    index = build_index(tables, WHOLE)
    assert index.refusals == (WindowRefusal("a", "too short", 0, "there is no room for a window"),)
    assert index.counts() == {"too short": 1}


def test_markers_that_last_no_time_ask_for_a_duration() -> None:
    """Where no trial has room for a window since its event lasts 0 s, the remedy is to say how long it is."""
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": [{"onset_s": 1.0, "description": "square"}]})
    with pytest.raises(InputError, match="give trial_duration_s"):
        build_index(tables, EventWindows(signal="eeg", anchor=("square",)))


def test_a_window_without_a_sample_of_some_signal_is_too_short() -> None:
    """Where a slow signal has no sample for as long as the main one's window lasts, there is no window."""
    tables = make_tables({"a": {"eeg": ToySignal(100, 240.0), "temperature": ToySignal(100, 1.0)}})
    spec = FixedWindows(signal="eeg", window_size_samples=1, beside=(Span(signal="temperature"),))
    with pytest.raises(InputError, match="Refused: 100 'too short'"):
        build_index(tables, spec)
