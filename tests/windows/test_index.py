from __future__ import annotations

import math
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import engram.windows.index as index_module
from engram.errors import InputError
from engram.testing.tables import ToySignal, make_tables
from engram.units import seconds_to_samples
from engram.windows.cutting import Cutting, Located
from engram.windows.index import WindowIndex, build_index
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.tables import SignalTable, Tables
from engram.windows.targets import EventColumn, RecordingColumn, SignalTarget, Target, TimeTo

Recordings = Mapping[str, Mapping[str, ToySignal]]
Events = Mapping[str, list[dict[str, Any]]]
Spec = FixedWindows | EventWindows

# ---------------------------------------------------------------- the model: lists of dicts


def _samples(seconds: float | None, samples: int | None, rate_hz: float) -> int | None:
    return seconds_to_samples(seconds, rate_hz) if seconds is not None else samples


def _model_trials(signal: ToySignal, events: list[dict[str, Any]], spec: Spec) -> Iterator[dict[str, Any]]:
    """The stretches of one recording that windows are cut from."""
    if isinstance(spec, FixedWindows):
        stop = _samples(spec.stop_offset_s, None, signal.rate_hz)
        yield {
            "anchor_s": signal.start_s + spec.start_offset_s,
            "start": seconds_to_samples(spec.start_offset_s, signal.rate_hz),
            "stop": signal.n_samples if stop is None else min(stop, signal.n_samples),
        }
        return
    offset = _samples(spec.trial_start_offset_s, spec.trial_start_offset_samples, signal.rate_hz) or 0
    for event in events:
        if event["description"] not in spec.anchor:
            continue
        start = seconds_to_samples(event["onset_s"] - signal.start_s, signal.rate_hz) + offset
        length = _samples(spec.trial_duration_s, spec.trial_duration_samples, signal.rate_hz)
        if length is None:
            length = seconds_to_samples(event["duration_s"], signal.rate_hz)
        yield {"anchor_s": event["onset_s"], "start": start, "stop": start + length, "event": event}


def _model_starts(trial: dict[str, Any], rate_hz: float, spec: Spec) -> list[tuple[int, int]]:
    """First sample and length of every window that a trial has room for."""
    size = _samples(spec.window_size_s, spec.window_size_samples, rate_hz)
    if size is None:
        length = trial["stop"] - trial["start"]
        return [(trial["start"], length)] if length > 0 else []
    stride = _samples(spec.window_stride_s, spec.window_stride_samples, rate_hz) or size
    starts = [s for s in range(trial["start"], trial["stop"], stride) if s + size <= trial["stop"]]
    if starts and not spec.drop_last_window and starts[-1] + size < trial["stop"]:
        starts.append(trial["stop"] - size)
    return [(start, size) for start in starts]


def _model_spans(
    signals: Mapping[str, ToySignal], anchor_s: float, length: int, spec: Spec
) -> dict[str, tuple[int, int]]:
    spans = {}
    for span in spec.beside:
        signal = signals[span.signal]
        start = seconds_to_samples(anchor_s - signal.start_s, signal.rate_hz)
        start += _samples(span.offset_s, span.offset_samples, signal.rate_hz) or 0
        size = _samples(span.window_size_s, span.window_size_samples, signal.rate_hz)
        if size is None:
            size = seconds_to_samples(length / signals[spec.signal].rate_hz, signal.rate_hz)
        spans[span.signal] = (start, size)
    return spans


def _model_reason(
    signals: Mapping[str, ToySignal], events: list[dict[str, Any]], spans: Mapping[str, tuple[int, int]]
) -> str | None:
    reasons = set()
    for name, (start, length) in spans.items():
        signal, stop = signals[name], start + length
        if length < 1:
            reasons.add("too short")
        if start < 0 or stop > signal.n_samples:
            reasons.add("outside")
        for event in events:
            if event["description"].upper().startswith(("BAD", "EDGE")):
                since_s = event["onset_s"] - signal.start_s
                first = seconds_to_samples(since_s, signal.rate_hz)
                last = seconds_to_samples(since_s + event["duration_s"], signal.rate_hz)
                if first < stop and last > start:
                    reasons.add("bad")
        if any(first < stop and last > start for first, last in signal.gaps):
            reasons.add("gap")
    order = ("too short", "outside", "bad", "gap")
    return next((reason for reason in order if reason in reasons), None)


def _model(recordings: Recordings, events: Events, spec: Spec) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Every window as a dict, one after another, and what was refused."""
    windows: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    for key in sorted(recordings):
        signals = recordings[key]
        if not set(spec.signals) <= set(signals):
            refused["no signal"] += 1
            continue
        main = signals[spec.signal]
        rows = sorted(events[key], key=lambda row: row["onset_s"])
        trials = list(_model_trials(main, rows, spec))
        refused["no events"] += not trials
        for number, trial in enumerate(trials):
            starts = _model_starts(trial, main.rate_hz, spec)
            refused["too short"] += not starts
            for i_window, (start, length) in enumerate(starts):
                anchor_s = trial["anchor_s"] + (start - trial["start"]) / main.rate_hz
                spans = {spec.signal: (start, length), **_model_spans(signals, anchor_s, length, spec)}
                reason = _model_reason(signals, rows, spans)
                if reason is not None:
                    refused[reason] += 1
                    continue
                windows.append(
                    {"recording": key, "trial": str(number), "i_window": i_window, "anchor_s": anchor_s}
                    | {"spans": spans, "event": trial.get("event")}
                )
    return windows, refused


# ---------------------------------------------------------------- what is drawn

rates = st.sampled_from([100.0, 120.0, 240.0, 62.5])
seconds = st.integers(1, 40).map(lambda n: n / 20)
gaps = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30)), max_size=2).map(
    lambda found: tuple((first, first + n) for first, n in found)
)
signals = st.builds(
    ToySignal, st.integers(1, 400), rates, st.sampled_from([0.0, 0.25, -0.5, 0.013]), gaps=gaps
)
recordings_ = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(st.sampled_from(["eeg", "stim"]), signals, min_size=1),
    min_size=1,
)
event_rows = st.lists(
    st.fixed_dictionaries(
        {
            "onset_s": st.integers(-10, 300).map(lambda n: n / 80),
            "duration_s": st.integers(0, 40).map(lambda n: n / 40),
            "description": st.sampled_from(["square", "circle", "rest", "bad_blink", "EDGE boundary"]),
        }
    ),
    max_size=8,
)
offsets = st.integers(-20, 20)
spans = st.lists(
    st.builds(Span, signal=st.just("stim"), window_size_s=st.none() | seconds)
    | st.builds(Span, signal=st.just("stim"), offset_samples=offsets, window_size_samples=st.integers(1, 40))
    | st.builds(Span, signal=st.just("stim"), offset_s=offsets.map(lambda n: n / 50)),
    max_size=1,
).map(tuple)


def _cuts() -> st.SearchStrategy[dict[str, Any]]:
    return (
        st.just({})
        | st.fixed_dictionaries({"window_size_s": seconds}, optional={"window_stride_s": seconds})
        | st.fixed_dictionaries(
            {"window_size_samples": st.integers(1, 90)},
            optional={"window_stride_samples": st.integers(1, 50)},
        )
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec of a main signal and perhaps one beside it."""
    shared = {**draw(_cuts()), "drop_last_window": draw(st.booleans()), "beside": draw(spans)}
    if draw(st.booleans()):
        start = draw(st.integers(0, 20)) / 50
        return FixedWindows(
            signal="eeg", start_offset_s=start, stop_offset_s=draw(st.none() | seconds), **shared
        )
    trial = draw(
        st.just({})
        | st.fixed_dictionaries({"trial_start_offset_s": offsets.map(lambda n: n / 50)})
        | st.fixed_dictionaries({"trial_start_offset_samples": offsets, "trial_duration_s": seconds})
        | st.fixed_dictionaries({"trial_duration_samples": st.integers(1, 120)})
    )
    return EventWindows(signal="eeg", anchor=("square", "circle"), **trial, **shared)


# ---------------------------------------------------------------- the rules


@settings(deadline=None)
@given(recordings_, st.data(), specs())
def test_every_window_is_where_a_list_of_them_says(
    recordings: Recordings, data: st.DataObject, spec: Spec
) -> None:
    """Windows of any spec, their places, trials and refusals are those of a plain list of windows."""
    events = {key: data.draw(event_rows) for key in recordings}
    windows, refused = _model(recordings, events, spec)
    tables = make_tables(recordings, events)
    if not windows:
        with pytest.raises(InputError):
            build_index(tables, spec, same_form=False)
        return
    index = build_index(tables, spec, same_form=False)
    assert index.counts() == {reason: n for reason, n in refused.items() if n}
    keep = data.draw(st.lists(st.booleans(), min_size=len(windows), max_size=len(windows)))
    kept = [window for window, is_kept in zip(windows, keep, strict=True) if is_kept]
    for some, expected in ((index, windows), (index.take(keep), kept)):
        assert len(some) == len(expected)
        _assert_same(some, expected, np.arange(len(expected)))
        shuffled = np.array(data.draw(st.permutations(range(len(expected)))), np.int64)
        _assert_same(some, [expected[i] for i in shuffled], shuffled)
        _assert_lengths(some, expected)
        for column in ("trial", "recording"):
            found = some.column(column)
            assert [found.values[code] for code in found.codes] == [window[column] for window in expected]


def _assert_same(index: WindowIndex, windows: list[dict[str, Any]], numbers: NDArray[Any]) -> None:
    located = index.locate(numbers)
    assert [index.tables.ids[i] for i in located.recording] == [window["recording"] for window in windows]
    assert located.i_window_in_trial.tolist() == [window["i_window"] for window in windows]
    assert located.anchor_s.tolist() == [window["anchor_s"] for window in windows]
    for name in index.spec.signals:
        starts, lengths = located.starts[name].tolist(), located.lengths[name].tolist()
        assert list(zip(starts, lengths, strict=True)) == [window["spans"][name] for window in windows]


def _assert_lengths(index: WindowIndex, windows: list[dict[str, Any]]) -> None:
    """Compare what stretches tell with every window, two stretches at a time."""
    for name in index.spec.signals:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_module, "_AT_ONCE", 2)
            found = [np.repeat(lengths[name], n_windows) for n_windows, lengths in index.lengths()]
        expected = [window["spans"][name][1] for window in windows]
        assert [length for some in found for length in some.tolist()] == expected
    recordings = sorted({window["recording"] for window in windows})
    assert [index.tables.ids[i] for i in index.recordings.tolist()] == recordings


def test_frames_with_lags_stand_beside_bins_of_spikes() -> None:
    """Each bin at 120 Hz has its frames at 240 Hz, lags 32 to 0; bins without all lags are refused."""
    tables = make_tables({"a": {"stim": ToySignal(480, 240.0), "robs": ToySignal(240, 120.0)}})
    spec = FixedWindows(
        signal="robs",
        window_size_samples=1,
        beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
    )
    index = build_index(tables, spec)
    located = index.locate(np.arange(len(index)))
    assert located.starts["robs"].tolist() == list(range(16, 240))
    assert located.starts["stim"].tolist() == list(range(0, 448, 2))
    assert set(located.lengths["robs"].tolist()) == {1}
    assert set(located.lengths["stim"].tolist()) == {33}
    assert index.counts() == {"outside": 16}


def test_sentences_are_windows_of_their_own_length() -> None:
    """Without a size every recording is one window, as long as it is."""
    tables = make_tables({f"s{n}": {"eeg": ToySignal(n)} for n in (700, 1, 2197)})
    index = build_index(tables, FixedWindows(signal="eeg"))
    located = index.locate([0, 1, 2])
    assert located.lengths["eeg"].tolist() == [1, 2197, 700]
    assert located.starts["eeg"].tolist() == [0, 0, 0]


FOUR_S = FixedWindows(signal="eeg", window_size_s=4.0, window_stride_s=2.0, crop_s=2.0)


def test_a_crop_is_the_middle_unless_it_is_drawn() -> None:
    """Windows lie where they did; what is read of them is shorter, and is what lengths tell."""
    tables = make_tables({"a": {"eeg": ToySignal(1000)}, "b": {"eeg": ToySignal(401, 50.0)}})
    index = build_index(tables, FOUR_S, same_form=False)
    assert index.is_drawn
    assert index.locate([0, 3]).starts["eeg"].tolist() == [0, 600]
    assert index.locate([0, 3]).lengths["eeg"].tolist() == [400, 400]
    middle = index.place([0, 3, 4, 6])
    assert middle.starts["eeg"].tolist() == [100, 700, 50, 250]
    assert middle.lengths["eeg"].tolist() == [200, 200, 100, 100]
    offset = np.array([0, 200, 100, 7])
    placed = index.place([0, 3, 4, 6], offset)
    assert placed.starts["eeg"].tolist() == [0, 800, 100, 207]
    assert placed.anchor_s.tolist() == [0.0, 8.0, 2.0, 4.14]
    assert [lengths["eeg"].tolist() for _, lengths in index.lengths()] == [[200, 100]]
    assert index.table([3])["i_start_in_trial"].to_pylist() == [600]


def test_every_place_of_a_crop_is_drawn_alike() -> None:
    """Uniform over all whole offsets, another one in every pass, and of a window and pass alone."""
    tables = make_tables({"a": {"eeg": ToySignal(2_000_000)}})
    index = build_index(tables, replace(FOUR_S, crop_s=3.96))
    numbers = np.arange(len(index))
    assert len(numbers) == 9999
    offset = index.draw(numbers, seed=3, epoch=5)
    counts = np.bincount(offset, minlength=5)
    assert len(counts) == 5
    assert np.abs(counts / len(numbers) - 0.2).max() < 0.015  # four deviations
    backwards = index.draw(numbers[::-7], seed=3, epoch=5)
    np.testing.assert_array_equal(backwards, offset[::-7])
    for seed, epoch in ((3, 6), (4, 5)):
        same = (index.draw(numbers, seed, epoch) == offset).mean()
        assert abs(same - 0.2) < 0.015
    with pytest.raises(InputError, match="no window 9999"):
        index.draw([9999], 0, 0)


def test_a_shift_never_leads_where_no_window_may_be() -> None:
    """To either side by as much at most; over an edge, a gap or what is marked bad it is left out."""
    bad = {"onset_s": 6.0, "duration_s": 1.0, "description": "BAD_jump"}
    rows = [{"onset_s": onset_s, "description": "go"} for onset_s in (0.0, 2.0, 4.95, 8.5)]
    tables = make_tables({"a": {"eeg": ToySignal(1000, gaps=((300, 305),))}}, {"a": [*rows, bad]})
    spec = EventWindows(signal="eeg", anchor=("go",), trial_duration_s=1.0, shift_samples=10)
    index = build_index(tables, spec)
    assert len(index) == 4
    drawn = np.array([index.draw(np.arange(4), 0, epoch) for epoch in range(1500)])
    assert set(drawn[:, 0].tolist()) == set(range(11))
    assert set(drawn[:, 1].tolist()) == {*range(-10, 1)}
    assert set(drawn[:, 2].tolist()) == {*range(-10, 6)}
    assert set(drawn[:, 3].tolist()) == {*range(-10, 11)}
    # What may not be is left where it was: as often as it is drawn, and once for the draw of nothing.
    assert abs((drawn[:, 0] == 0).mean() - 11 / 21) < 0.055
    assert index.place([0], drawn[0, :1]).lengths["eeg"].tolist() == [100]


def test_offsets_that_lead_elsewhere_are_refused() -> None:
    """Out of the recording lies another one's samples: never read, and never silently."""
    tables = make_tables(
        {"a": {"eeg": ToySignal(1000)}, "b": {"eeg": ToySignal(1000), "emg": ToySignal(1000)}}
    )
    index = build_index(tables, FOUR_S)
    assert index.place([0, 3], np.array([0, 200])).starts["eeg"].tolist() == [0, 800]
    for offset, said in (
        ([-1, 0], "an offset of -1 samples a window begins at sample -1 of a recording that has 1000"),
        ([0, 201], "an offset of 201 samples a window begins at sample 801"),
        ([0], r"one for each of 2 windows of one signal, not \(1,\) for 1"),
    ):
        with pytest.raises(InputError, match=said):
            index.place([0, 3], np.array(offset))
    two = build_index(tables, FixedWindows(signal="eeg", window_size_s=1.0, beside=(Span(signal="emg"),)))
    with pytest.raises(InputError, match=r"not \(1,\) for 2 signals"):
        two.place([0], np.zeros(1, np.int64))


def test_a_time_is_not_told_from_a_crop() -> None:
    """Where in its window the crop lay, nobody could tell the network."""
    spec = replace(ANCHORED, crop_s=0.25)
    with pytest.raises(InputError, match="cannot be told from a crop"):
        build_index(TABLES, spec, TimeTo(("press",)))
    assert build_index(TABLES, spec, EventColumn("rt")).is_drawn


def test_a_crop_fits_into_its_window() -> None:
    """A longer one is refused with both figures; of an event's own duration nothing is known."""
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": [{"onset_s": 1.0, "description": "go"}]})
    with pytest.raises(InputError, match="A crop of 401 samples is longer than the window, which has 400"):
        build_index(tables, replace(FOUR_S, crop_s=None, crop_samples=401))
    with pytest.raises(InputError, match="A crop is given without a length"):
        EventWindows(signal="eeg", anchor=("go",), crop_s=1.0)


ROWS = [
    {"onset_s": 1.0, "duration_s": 1.0, "description": "square", "rt": "0.4", "side": "left"},
    {"onset_s": 1.4, "duration_s": 0.0, "description": "press"},
    {"onset_s": 3.0, "duration_s": 1.0, "description": "square", "rt": "n/a", "side": "right"},
    {"onset_s": 5.0, "duration_s": 1.0, "description": "circle", "rt": "0.6", "side": None},
    {"onset_s": 5.75, "duration_s": 0.0, "description": "press"},
]
TABLES = make_tables(
    {key: {"eeg": ToySignal(), "emg": ToySignal()} for key in "abc"},
    {"a": ROWS, "b": ROWS[:2], "c": ROWS[3:]},
    {"a": {"subject": "A", "age": "9.5"}, "b": {"subject": "B", "age": "nan"}, "c": {"target": "?"}},
)
ANCHORED = EventWindows(signal="eeg", anchor=("square", "circle"), window_size_s=0.5)


def _targets(index: WindowIndex, numbers: Any) -> NDArray[Any]:
    found = index.targets(numbers)
    assert found is not None
    return found


def test_every_window_of_a_trial_has_its_target() -> None:
    """Targets of events, columns of recordings and times are those of the windows' trials."""
    rt = build_index(TABLES, ANCHORED, EventColumn("rt"))
    expected = np.repeat(np.array([0.4, 0.6, 0.4, 0.6], np.float32), 2)
    np.testing.assert_array_equal(_targets(rt, np.arange(8)), expected)
    assert rt.counts() == {"no target": 2}
    time = build_index(TABLES, ANCHORED, TimeTo(("press",), max_s=0.5))
    assert _targets(time, [0, 1, 2]).tolist() == [pytest.approx(0.4)] * 3
    assert time.counts() == {"no target": 6}
    age = build_index(TABLES, ANCHORED, RecordingColumn("age"))
    assert _targets(age, [0, 5]).tolist() == [9.5, 9.5]
    assert (len(age), age.task, age.classes, age.counts()) == (6, "regression", (), {"no target": 4})


def test_classes_are_numbered_by_those_that_windows_have() -> None:
    """Without named classes, one that only refused windows have is none; named ones are kept."""
    target = EventColumn("side", "classification")
    index = build_index(TABLES, ANCHORED, target)
    assert (index.task, index.classes) == ("classification", ("left", "right"))
    found = _targets(index, np.arange(6))
    assert found.dtype == np.int64
    assert found.tolist() == [0, 0, 1, 1, 0, 0]
    only_left = replace(TABLES.signals["eeg"], gaps={0: np.array([[300, 400]])})
    index = build_index(replace(TABLES, signals={"eeg": only_left}), ANCHORED, target)
    assert index.classes == ("left",)
    named = build_index(TABLES, ANCHORED, replace(target, classes=("right", "left")))
    assert named.classes == ("right", "left")
    assert named.take(np.arange(6) == 0).classes == ("right", "left")


def test_a_signal_to_predict_has_no_numbers() -> None:
    """With a signal as target there is nothing to look up; its samples are read."""
    spec = FixedWindows(signal="eeg", window_size_s=1.0, beside=(Span(signal="emg"),))
    index = build_index(TABLES, spec, SignalTarget("emg"))
    assert (index.targets([0]), index.task, index.classes) == (None, "regression", ())
    assert build_index(TABLES, spec).task is None


def test_columns_are_of_recordings_and_of_anchors() -> None:
    """A column says a window's field, or its anchor's text; what is missing is None, and last."""
    index = build_index(TABLES, ANCHORED)

    def texts(name: str) -> list[str | None]:
        column = index.column(name)
        assert column.codes.dtype == np.int32
        return [column.values[code] for code in column.codes]

    assert texts("subject") == ["A"] * 6 + ["B"] * 2 + [None] * 2
    assert texts("description") == [*["square"] * 4, *["circle"] * 2, *["square"] * 2, *["circle"] * 2]
    assert texts("trial") == ["0", "0", "1", "1", "2", "2", "0", "0", "0", "0"]
    assert index.column("side").values == ("left", "right", None)
    assert index.take(np.arange(10) > 5).column("trial").values == ("0",)
    with pytest.raises(InputError, match="recording, trial, age, subject, target, description, rt, side"):
        index.column("hand")
    whole = build_index(TABLES, FixedWindows(signal="eeg", window_size_s=1.0))
    with pytest.raises(InputError, match=r"Use one of: recording, trial, age, subject, target\."):
        whole.column("side")


def test_a_recording_without_subject_is_its_own() -> None:
    """Subjects are the field of that name, else the recordings: two unknown people are not one."""
    index = build_index(TABLES, ANCHORED)
    subjects = index.subjects()
    assert [subjects.values[code] for code in subjects.codes] == ["A"] * 6 + ["B"] * 2 + ["c"] * 2
    nameless = build_index(replace(TABLES, fields={}), ANCHORED)
    assert nameless.subjects().values == ("a", "b", "c")


def test_targets_may_be_computed_by_the_user() -> None:
    """Numbers or classes of one's own take the place of the target, and follow the windows."""
    index = build_index(TABLES, ANCHORED, EventColumn("description", "classification"))
    values = np.arange(10) / 4
    mine = index.with_targets(values)
    values[:] = 0
    assert (mine.target, mine.task, mine.classes) == (None, "regression", ())
    assert _targets(mine.take(np.arange(10) % 2 == 1), [0, 4]).tolist() == [0.25, 2.25]
    sides = index.with_targets(np.arange(10) % 2, ("even", "odd"))
    assert (sides.task, sides.classes) == ("classification", ("even", "odd"))
    assert sides.table([3])["target"].to_pylist() == ["odd"]
    assert index.with_targets(np.arange(10) % 3).classes == ("0", "1", "2")
    assert _targets(index, [0]).dtype == np.int64
    assert mine.fingerprint not in {index.fingerprint, sides.fingerprint}


@pytest.mark.parametrize(
    ("values", "classes", "said"),
    [
        (np.zeros(9), (), "one number for each of 10 windows"),
        (np.zeros((10, 1)), (), "one number for each of 10 windows"),
        (np.zeros(10, bool), (), "not bool"),
        (np.array([np.nan, *[1.0] * 9]), (), "1 targets are no finite numbers"),
        (np.full(10, 1e39), (), "10 targets are no finite numbers"),
        (np.zeros(10), ("a",), "Give whole numbers"),
        (np.full(10, 2), ("a", "b"), "from 2 to 2, and there are 2 classes"),
        (np.full(10, -1), (), "from -1 to -1"),
    ],
)
def test_computed_targets_are_one_finite_number_or_class_each(
    values: NDArray[Any], classes: tuple[str, ...], said: str
) -> None:
    """Another count or shape, a value that is not finite, or no number of a class is refused."""
    with pytest.raises(InputError, match=said):
        build_index(TABLES, ANCHORED).with_targets(values, classes)


def test_the_table_speaks_braindecodes_words() -> None:
    """One row per window: its place in the main signal, its target, and the recording's fields."""
    index = build_index(TABLES, ANCHORED, EventColumn("rt"))
    table = index.table([1, 6])
    assert table.to_pylist() == [
        {
            "number": 1,
            "recording": "a",
            "anchor_s": 1.5,
            "i_window_in_trial": 1,
            "i_start_in_trial": 150,
            "i_stop_in_trial": 200,
            "target": pytest.approx(0.4),
            "age": "9.5",
            "subject": "A",
            "target_of_recording": None,
        },
        {
            "number": 6,
            "recording": "c",
            "anchor_s": 5.0,
            "i_window_in_trial": 0,
            "i_start_in_trial": 500,
            "i_stop_in_trial": 550,
            "target": pytest.approx(0.6),
            "age": None,
            "subject": None,
            "target_of_recording": "?",
        },
    ]
    assert index.table().num_rows == len(index)
    assert build_index(TABLES, ANCHORED).table([0])["target"].to_pylist() == [None]


@pytest.mark.parametrize("numbers", [[10], [-1], [0.5], [[0]], [True]])
def test_only_windows_that_are_there_can_be_asked_about(numbers: Any) -> None:
    """A number beyond the index is an error, not the last window or another's."""
    index = build_index(TABLES, ANCHORED)
    with pytest.raises(InputError):
        index.locate(numbers)
    with pytest.raises(InputError):
        index.targets(numbers)


def test_asking_about_none_gives_none() -> None:
    """No numbers have no windows, and an index of no windows is one."""
    index = build_index(TABLES, ANCHORED, EventColumn("rt"))
    assert index.locate([]).starts["eeg"].shape == (0,)
    nothing = index.take(np.zeros(len(index), bool))
    assert (len(nothing), nothing.column("subject").values, nothing.table().num_rows) == (0, (), 0)
    assert nothing.fingerprint != index.fingerprint


@pytest.mark.parametrize("keep", [np.ones(9, bool), np.ones(10, int), np.ones((10, 1), bool)])
def test_keeping_takes_one_boolean_per_window(keep: NDArray[Any]) -> None:
    """Numbers in the place of booleans would keep something else."""
    with pytest.raises(InputError, match="one boolean for each of 10"):
        build_index(TABLES, ANCHORED).take(keep)


def test_an_index_survives_pickling() -> None:
    """Another process has the same windows, targets and refusals, from little more than their bytes."""
    tables = make_tables({f"{i:04}": {"eeg": ToySignal()} for i in range(1000)})
    index = build_index(tables, FixedWindows(signal="eeg", window_size_s=1.0))
    index.locate([0])
    pickled = pickle.dumps(index)
    found = pickle.loads(pickled)
    assert found.fingerprint == index.fingerprint
    assert found.refusals == index.refusals
    numbers = np.arange(0, len(index), 7)
    np.testing.assert_array_equal(found.locate(numbers).starts["eeg"], index.locate(numbers).starts["eeg"])
    assert len(pickled) - len(pickle.dumps(tables)) < index.n_bytes + 4096


def _changes() -> dict[str, WindowIndex]:
    """Indices that each differ from the first in one thing that matters."""
    eeg = TABLES.signals["eeg"]
    later = TABLES.events.set_column(
        1, "onset_s", pa.array([t + 0.01 for t in TABLES.events["onset_s"].to_pylist()])
    )
    first = build_index(TABLES, ANCHORED)
    return {
        "itself": first,
        "content": build_index(replace(TABLES, fingerprints=("other", *TABLES.fingerprints[1:])), ANCHORED),
        "id": build_index(replace(TABLES, ids=("0", "b", "c")), ANCHORED),
        "form": build_index(replace(TABLES, signals={"eeg": replace(eeg, forms=("other",))}), ANCHORED),
        "start": build_index(
            replace(TABLES, signals={**TABLES.signals, "eeg": replace(eeg, start_s=eeg.start_s - 1)}),
            ANCHORED,
        ),
        "onsets": build_index(replace(TABLES, events=later), ANCHORED),
        "size": build_index(TABLES, replace(ANCHORED, window_size_s=0.25)),
        "last": build_index(TABLES, replace(ANCHORED, drop_last_window=False)),
        "target": build_index(TABLES, ANCHORED, EventColumn("description", "classification")),
        "classes": build_index(
            TABLES, ANCHORED, EventColumn("description", "classification", ("square", "circle"))
        ),
        "computed": first.with_targets(np.zeros(10)),
        "values": first.with_targets(np.ones(10)),
        "some": first.take(np.arange(10) != 3),
        "others": first.take(np.arange(10) != 4),
    }


def test_the_fingerprint_is_of_everything_that_matters() -> None:
    """Content, places, targets and the spec change it, each in its own way."""
    fingerprints = {name: index.fingerprint for name, index in _changes().items()}
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_the_fingerprint_is_not_of_what_does_not_matter() -> None:
    """Recordings without windows, other events, the way to the same windows and fields leave it."""
    first = build_index(TABLES, ANCHORED)
    more = make_tables(
        {key: {"eeg": ToySignal(), "emg": ToySignal()} for key in ("0", *"abc")},
        {"0": [{"onset_s": 0.5, "description": "rest"}], "a": ROWS, "b": ROWS[:2], "c": ROWS[3:]},
    )
    assert build_index(more, ANCHORED).fingerprint == first.fingerprint
    both = first.take(np.arange(10) < 8).take(np.arange(8) != 3)
    assert both.fingerprint == first.take((np.arange(10) < 8) & (np.arange(10) != 3)).fingerprint


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """It depends on no hash seed, process or machine: here is one, to stay."""
    code = """
from engram.testing.tables import ToySignal, make_tables
from engram.windows import EventWindows, TimeTo, build_index
rows = [{"onset_s": 1.0, "description": "square"}, {"onset_s": 1.4, "description": "rt"}]
tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": rows}, {"a": {"subject": "A"}})
spec = EventWindows(signal="eeg", anchor=("square",), trial_duration_s=2.0)
print(build_index(tables, spec, TimeTo(("rt",))).fingerprint)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "5ffe0cc8983af2440cb6925e72b86c8b"


# ---------------------------------------------------------------- sizes


def _many(n_recordings: int, n_samples: int, events: pa.Table | None = None) -> Tables:
    ids = tuple(f"{i:06}" for i in range(n_recordings))
    ones = np.ones(n_recordings)
    eeg = SignalTable(
        present=ones > 0,
        n_samples=np.arange(n_recordings) % 100 + n_samples,
        rate_hz=ones * 100.0,
        start_s=ones * 0.0,
        form=np.zeros(n_recordings, np.int32),
        forms=("129 channels, float16",),
    )
    fields = {"age": tuple(str(i % 80) for i in range(n_recordings))}
    return Tables(ids, ids, fields, {"eeg": eeg}, make_tables({}).events if events is None else events)


def _built(tables: Tables, spec: Spec, target: Target) -> tuple[WindowIndex, int, int]:
    """Build an index, and give what was held then and at most meanwhile, by Python's own count."""
    tracemalloc.start()
    index = build_index(tables, spec, target)
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return index, held_bytes, peak_bytes


def test_ten_million_sliding_windows_take_less_than_a_megabyte() -> None:
    """An index of sliding windows grows with recordings, not with windows; built with a byte of each."""
    spec = FixedWindows(signal="eeg", window_size_samples=400, window_stride_samples=100)
    index, held_bytes, peak_bytes = _built(_many(26_000, 39_000), spec, RecordingColumn("age"))
    assert len(index) >= 10_000_000
    assert index.n_bytes < 1_000_000
    assert held_bytes < 1_000_000
    assert peak_bytes < 2 * len(index)
    last = index.locate([len(index) - 1])
    assert last.recording.tolist() == [25_999]
    assert last.starts["eeg"].tolist() == [38_600]


def test_admissible_trials_are_not_looked_at_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten million windows two of each recording are placed to build their index, of one with a gap all."""
    placed, lay = [], Cutting.lay

    def counting(cutting: Cutting, origin: NDArray[np.int32], i_window: NDArray[np.int64]) -> Located:
        placed.append(len(origin))
        return lay(cutting, origin, i_window)

    tables = _many(26_000, 39_000)
    eeg = replace(tables.signals["eeg"], gaps={17: np.array([[0, 1]], np.int64)})
    monkeypatch.setattr(Cutting, "lay", counting)
    spec = FixedWindows(signal="eeg", window_size_samples=400, window_stride_samples=100)
    index = build_index(replace(tables, signals={"eeg": eeg}), spec)

    of_one = 387
    assert len(index) == index.stretches.bounds[-1] > 10_000_000
    assert [(refusal.recording, refusal.n) for refusal in index.refusals] == [("000017", 1)]
    assert sum(placed) == 2 * 26_000 + of_one


def test_a_million_event_windows_take_less_than_32_megabytes() -> None:
    """An index of event windows takes 16 bytes each and the target, also after any choice of them."""
    n_recordings, n_each = 10_000, 100
    events = pa.table(
        {
            "recording": np.repeat(np.arange(n_recordings, dtype=np.int32), n_each),
            "onset_s": np.tile(np.arange(n_each) * 3.0, n_recordings),
            "duration_s": np.zeros(n_recordings * n_each),
            "description": pa.array(["square"] * (n_recordings * n_each)),
        }
    )
    tables = _many(n_recordings, 40_000, events)
    spec = EventWindows(signal="eeg", anchor=("square",), trial_duration_s=2.0)
    target = EventColumn("description", "classification")
    index, held_bytes, peak_bytes = _built(tables, spec, target)
    assert len(index) == 1_000_000
    assert index.n_bytes < 20.1 * len(index) < 32_000_000
    assert held_bytes < 32_000_000
    assert peak_bytes < 80 * len(index)
    # What is pickled beside the tables is what the index says that it holds.
    held = len(pickle.dumps(index)) - len(pickle.dumps(tables))
    assert math.isclose(held, index.n_bytes, rel_tol=0.01)
    half = index.take(np.random.default_rng(0).random(len(index)) < 0.5)
    assert half.n_bytes < 20.2 * len(half)
