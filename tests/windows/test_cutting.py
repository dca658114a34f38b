from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InputError
from engram.testing.tables import ToySignal, make_tables
from engram.windows.cutting import Cutting, Stretches
from engram.windows.index import build_index
from engram.windows.spec import EventWindows, FixedWindows

N_SAMPLES, RATE_HZ = 1003, 100.0

COLUMNS = ["i_window_in_trial", "i_start_in_trial", "i_stop_in_trial"]
Row = tuple[int, int, int]


def _braindecode_raw(annotations: list[tuple[float, float, str]]) -> Any:
    import mne
    from braindecode.datasets import BaseConcatDataset, RawDataset

    info = mne.create_info(["C3", "C4"], RATE_HZ, "eeg")
    raw = mne.io.RawArray(np.zeros((2, N_SAMPLES)), info, verbose="error")
    onsets, durations, descriptions = zip(*annotations, strict=True) if annotations else ((), (), ())
    raw.set_annotations(mne.Annotations(onsets, durations, descriptions))
    return BaseConcatDataset([RawDataset(raw, {"subject": "A"})])


def _braindecode_rows(windows: Any) -> list[Row]:
    return [(int(a), int(b), int(c)) for a, b, c in windows.get_metadata()[COLUMNS].to_numpy()]


def _rows(spec: FixedWindows | EventWindows, annotations: list[tuple[float, float, str]]) -> list[Row]:
    events = [
        {"onset_s": onset_s, "duration_s": duration_s, "description": description}
        for onset_s, duration_s, description in annotations
    ]
    tables = make_tables({"a": {"eeg": ToySignal(N_SAMPLES, RATE_HZ)}}, {"a": events})
    table = build_index(tables, spec).table()
    columns = (
        table[name].to_pylist() for name in ("i_window_in_trial", "i_start_in_trial", "i_stop_in_trial")
    )
    return list(zip(*columns, strict=True))


@pytest.mark.filterwarnings("ignore:Usage of offset_sample args:UserWarning")
@pytest.mark.parametrize("drop_last_window", [True, False])
@pytest.mark.parametrize(
    ("size", "stride", "start", "stop"),
    [
        (200, 100, 0, None),
        (200, 50, 0, None),
        (200, 200, 3, None),
        (100, 130, 0, None),
        (7, 7, 0, 500),
        (250, 83, 12, 997),
        (1003, 1, 0, None),
        (200, 100, 0, 900),
    ],
)
def test_whole_recordings_are_cut_as_braindecode_does(
    size: int, stride: int, start: int, stop: int | None, drop_last_window: bool
) -> None:
    """Starts, stops and numbers of fixed-length windows are braindecode's, last window or not."""
    from braindecode.preprocessing import create_fixed_length_windows

    theirs = create_fixed_length_windows(
        _braindecode_raw([]),
        start_offset_samples=start,
        stop_offset_samples=stop,
        window_size_samples=size,
        window_stride_samples=stride,
        on_last_window="drop" if drop_last_window else "overlap",
    )
    spec = FixedWindows(
        signal="eeg",
        window_size_samples=size,
        window_stride_s=stride / RATE_HZ,
        start_offset_s=start / RATE_HZ,
        stop_offset_s=None if stop is None else stop / RATE_HZ,
        drop_last_window=drop_last_window,
    )
    assert _rows(spec, []) == _braindecode_rows(theirs)


def test_a_whole_recording_is_one_window_as_in_braindecode() -> None:
    """Without a window size a recording is one window."""
    from braindecode.preprocessing import create_fixed_length_windows

    theirs = create_fixed_length_windows(_braindecode_raw([]))
    assert _rows(FixedWindows(signal="eeg"), []) == _braindecode_rows(theirs) == [(0, 0, N_SAMPLES)]


@pytest.mark.parametrize("drop_last_window", [True, False])
@pytest.mark.parametrize(
    ("offset", "duration", "size", "stride"),
    [
        (50, 200, None, None),
        (0, 200, 200, 100),
        (-20, 170, 50, 50),
        (-20, 170, 50, 17),
        (10, 101, 100, 1),
        (0, 100, 30, 45),
    ],
)
def test_trials_are_cut_as_braindecode_does(
    offset: int, duration: int, size: int | None, stride: int | None, drop_last_window: bool
) -> None:
    """Starts, stops and numbers of windows about events are braindecode's, last window or not."""
    from braindecode.preprocessing import create_windows_from_events

    annotations = [(1.0, 0.0, "square"), (2.134, 0.0, "rt"), (3.337, 0.0, "square"), (7.4, 0.0, "square")]
    theirs = create_windows_from_events(
        _braindecode_raw(annotations),
        trial_start_offset_samples=offset,
        trial_stop_offset_samples=offset + duration,
        window_size_samples=size,
        window_stride_samples=stride,
        on_last_window="drop" if drop_last_window else "overlap",
        mapping={"square": 0},
        on_overlapping_events="ignore",
    )
    spec = EventWindows(
        signal="eeg",
        anchor=("square",),
        trial_start_offset_samples=offset,
        trial_duration_s=duration / RATE_HZ,
        window_size_samples=size,
        window_stride_samples=stride,
        drop_last_window=drop_last_window,
    )
    assert _rows(spec, annotations) == _braindecode_rows(theirs)


@pytest.mark.parametrize("drop_last_window", [True, False])
def test_trials_of_their_own_duration_are_cut_as_braindecode_does(drop_last_window: bool) -> None:
    """Without a trial's duration the event's own counts, and its windows are braindecode's."""
    from braindecode.preprocessing import create_windows_from_events

    annotations = [(1.0, 0.5, "square"), (3.0, 2.0, "square"), (5.5, 1.25, "square")]
    theirs = create_windows_from_events(
        _braindecode_raw(annotations),
        trial_start_offset_samples=10,
        trial_stop_offset_samples=10,
        window_size_samples=40,
        window_stride_samples=30,
        on_last_window="drop" if drop_last_window else "overlap",
        mapping={"square": 0},
    )
    spec = EventWindows(
        signal="eeg",
        anchor=("square",),
        trial_start_offset_s=0.1,
        window_size_s=0.4,
        window_stride_s=0.3,
        drop_last_window=drop_last_window,
    )
    assert _rows(spec, annotations) == _braindecode_rows(theirs)


def test_only_an_onset_between_two_samples_is_rounded_otherwise() -> None:
    """MNE takes a tie to the even sample, Engram to the later one: the one difference in onsets."""
    import mne

    onsets_s = [0.12, 0.125, 0.135, 0.1449]
    concat = _braindecode_raw([(onset_s, 0.0, "square") for onset_s in onsets_s])
    theirs = mne.events_from_annotations(concat.datasets[0].raw, verbose="error")[0][:, 0]
    spec = EventWindows(signal="eeg", anchor=("square",), trial_duration_samples=10)
    ours = [start for _, start, _ in _rows(spec, [(onset_s, 0.0, "square") for onset_s in onsets_s])]
    assert theirs.tolist() == [12, 12, 14, 14]
    assert ours == [12, 13, 14, 14]


def test_one_rate_is_held_once() -> None:
    """What is the same for every recording takes no memory per recording."""
    spec = FixedWindows(signal="eeg", window_size_s=2.0)
    few, many = (make_tables({f"{i:04}": {"eeg": ToySignal()} for i in range(n)}) for n in (2, 2000))
    per_recording = few.signals["eeg"].n_samples.itemsize  # the end of what is cut differs
    assert Cutting.of(many, spec).n_bytes - Cutting.of(few, spec).n_bytes == 1998 * per_recording


def test_a_size_of_less_than_a_sample_is_refused() -> None:
    """A size or stride that rounds to no sample at some rate is an error, not an endless row of windows."""
    tables = make_tables({"a": {"eeg": ToySignal(rate_hz=1000.0)}, "b": {"eeg": ToySignal(rate_hz=100.0)}})
    with pytest.raises(InputError, match="window stride is less than a sample of 'eeg' at 100 Hz"):
        Cutting.of(tables, FixedWindows(signal="eeg", window_size_s=1.0, window_stride_s=0.004))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_stretches_behave_as_a_list_of_windows(n_each: list[int], data: st.DataObject) -> None:
    """Taking windows, and taking of those, gives the list's windows in as few stretches as can be."""
    windows = [(10 + trial, i) for trial, n in enumerate(n_each) for i in range(n)]
    bounds = np.concatenate([[0], np.cumsum(n_each)])
    origin = np.arange(10, 10 + len(n_each), dtype=np.int32)
    stretches = Stretches(origin, np.zeros(len(n_each), np.int32), bounds, origin * np.float32(2))
    for _ in range(2):
        keep = data.draw(st.lists(st.booleans(), min_size=len(windows), max_size=len(windows)))
        windows = [window for window, kept in zip(windows, keep, strict=True) if kept]
        stretches = stretches.take(np.array(keep, bool))
        assert stretches.targets is not None
        stretch, i_window = stretches.find(np.arange(len(windows)))
        assert list(zip(stretches.origin[stretch].tolist(), i_window.tolist(), strict=True)) == windows
        assert stretches.targets[stretch].tolist() == [2.0 * trial for trial, _ in windows]
        n_breaks = sum(
            (trial, i) != (before, j + 1) for (before, j), (trial, i) in itertools.pairwise(windows)
        )
        assert len(stretches.origin) == (n_breaks + 1 if windows else 0)
        assert len(stretches) == len(windows)


def test_choosing_windows_takes_a_few_bytes_of_each() -> None:
    """A corpus cut at every sample has billions: numbers of 8 bytes for each would be gigabytes."""
    n = 1_000_000
    stretches = Stretches(np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([0, n]), None)
    keep = np.ones(n, bool)
    tracemalloc.start()
    stretches.take(keep)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * n


def test_events_are_only_looked_at() -> None:
    """A cutting copies no column of the events."""
    row = {"onset_s": 1.0, "description": "square"}
    tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": [row]})
    cutting = Cutting.of(tables, EventWindows(signal="eeg", anchor=("square",), trial_duration_s=1.0))
    held: pa.Array = tables.events["onset_s"].chunk(0)
    assert cutting.event_onset_s.ctypes.data == held.buffers()[1].address
