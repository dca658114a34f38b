from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import mne
import numpy as np
import pytest
import zarr

from engram.errors import InputError, SourceError
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource, ConcatSource, RawSource
from engram.recordings.recording import Channel, Events
from engram.testing.sources import SourceConformance


def raw_array(n_samples: int = 500, seed: int = 0) -> Any:
    """Two channels of noise, one trigger channel and two annotations."""
    info = mne.create_info(["Fz", "Cz", "st"], 100.0, ["eeg", "eeg", "stim"])
    data = np.random.default_rng(seed).normal(0, 1e-5, (3, n_samples))
    raw = mne.io.RawArray(data, info, verbose="ERROR")
    return raw.set_annotations(mne.Annotations([1.0, 2.0], [0.0, 0.5], ["go", "stop"]))


def arrays() -> ArraySource:
    """Frames at 240 Hz, spike counts at 120 Hz and numbers of images, of two sessions."""
    rng = np.random.default_rng(0)
    recordings = {}
    for name, n_units in (("s2", 7), ("s1", 3)):
        recordings[name] = ArrayRecording(
            {
                "stim": ArraySignal(rng.integers(0, 255, (240, 6, 5), "uint8"), 240.0),
                "robs": ArraySignal(
                    rng.poisson(1, (120, n_units)).astype("int16"), 120.0, axes=("time", "unit")
                ),
                "betas": ArraySignal(rng.normal(size=(40, 2, 3, 4)).astype("float32"), 1.0, start_s=0.5),
                "shown": ArraySignal(rng.integers(0, 9, 40), 1.0, bank="images"),
            },
            events=Events((2.0, 1.0), (0.0, 0.1), ("b", "a"), {"x": ("2", None)}),
            fields={"subject": name, "age": 9.5},
        )
    return ArraySource(recordings, banks={"images": rng.integers(0, 255, (9, 8, 8), "uint8")})


class TestArrayConformance(SourceConformance):
    @pytest.fixture
    def source(self) -> ArraySource:
        """Two sessions and a bank."""
        return arrays()


class TestRawConformance(SourceConformance):
    @pytest.fixture
    def source(self) -> RawSource:
        """Two recordings by name."""
        return RawSource({"b": raw_array(), "a": raw_array(300, 1)}, {"a": {"subject": "1"}})


class TestConcatConformance(SourceConformance):
    @pytest.fixture
    def source(self) -> ConcatSource:
        """Three recordings as braindecode describes them."""
        datasets = [SimpleNamespace(raw=raw_array(seed=n), description={"subject": n}) for n in range(3)]
        return ConcatSource(SimpleNamespace(datasets=datasets))


def test_arrays_keep_shape_dtype_rate_and_clock() -> None:
    """Every signal is what was handed in, to the bit, in its own dtype."""
    source = arrays()
    bank, s1, _ = source.entries()
    assert (bank.id, bank.is_bank, s1.is_bank, s1.fields) == (
        "images",
        True,
        False,
        {"subject": "s1", "age": 9.5},
    )
    assert s1.size_bytes == 240 * 30 + 120 * 3 * 2 + 40 * 24 * 4 + 40 * 8
    with source.open(s1) as recording:
        described = [(s.name, s.array.dtype, s.array.axes, s.rate_hz, s.start_s) for s in recording.signals]
        assert described == [
            ("stim", "uint8", ("frame", "height", "width"), 240.0, 0.0),
            ("robs", "int16", ("time", "unit"), 120.0, 0.0),
            ("betas", "float32", ("time", "axis_1", "axis_2", "axis_3"), 1.0, 0.5),
            ("shown", "int64", ("time",), 1.0, 0.0),
        ]
        given = source.recordings["s1"].signals["stim"].data
        np.testing.assert_array_equal(recording.read("stim", 3, 9), given[3:9], strict=True)
        assert recording.events == Events((1.0, 2.0), (0.1, 0.0), ("a", "b"), {"x": (None, "2")})
        assert recording.whole is None


def test_arrays_on_disk_are_read_slice_by_slice(tmp_path: Path) -> None:
    """memmap, h5py and zarr arrays serve as they are, without being loaded."""
    values = np.arange(60, dtype="float32").reshape(20, 3)
    mapped = np.memmap(tmp_path / "x.bin", "float32", "w+", shape=(20, 3))
    mapped[:] = values
    chunked = zarr.create_array(tmp_path / "x.zarr", shape=(20, 3), dtype="float32", chunks=(5, 3))
    chunked[:] = values
    with h5py.File(tmp_path / "x.h5", "w") as file:
        on_disk = {"mapped": mapped, "hdf5": file.create_dataset("x", data=values), "zarr": chunked}
        signals = {name: ArraySignal(array, 10.0) for name, array in on_disk.items()}
        source = ArraySource({"r": ArrayRecording(signals)})
        with source.open(source.entries()[0]) as recording:
            for name in on_disk:
                got = recording.read(name, 4, 11)
                assert type(got) is np.ndarray
                np.testing.assert_array_equal(got, values[4:11], strict=True)


def test_a_number_outside_the_bank_is_an_error() -> None:
    """A row that the bank does not have is told with both figures."""
    for row in (-1, 3):
        shown = ArraySignal(np.array([0, row, 1]), 1.0, bank="images")
        source = ArraySource({"r": ArrayRecording({"shown": shown})}, {"images": np.zeros((3, 2))})
        with source.open(source.entries()[1]) as recording:
            assert recording.read("shown", 0, 1).tolist() == [0]
            with pytest.raises(SourceError, match=f"numbers row {row} of bank 'images', which has 3"):
                recording.read("shown", 0, 3)


ONE = np.zeros((5, 2))


@pytest.mark.parametrize(
    ("signals", "banks", "says"),
    [
        ({}, {}, "'r' has no signal"),
        ({"x": ArraySignal(ONE, 1.0)}, {"r": ONE}, "'r' names a recording and a bank"),
        ({"x": ArraySignal(ONE, 0.0)}, {}, "rate 0.0 Hz"),
        ({"x": ArraySignal(ONE, 1.0, axes=("time",))}, {}, "Signal 'x': 2 axes"),
        ({"x": ArraySignal(ONE, 1.0, channels=(Channel("a"),))}, {}, "names 1 channels for 2"),
        ({"x": ArraySignal(np.array([["a", None]], object), 1.0)}, {}, "Elements of object are no numbers"),
        ({"x": ArraySignal(np.zeros((5, 2), "M8[s]"), 1.0)}, {}, "Signal 'x': Elements of datetime64"),
        ({"x": ArraySignal(np.array(["a", "b"]), 1.0)}, {}, "Use booleans, integers, floats or complex"),
        ({"x": ArraySignal(np.array(1.0), 1.0)}, {}, "Signal 'x': A shape needs at least one axis"),
        ({"x": ArraySignal(ONE, 1.0, bank="b")}, {"b": ONE}, "numbers rows of bank 'b' with float64"),
        ({"x": ArraySignal(ONE.astype(int), 1.0, bank="b")}, {}, "refers to bank 'b'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_at_once(signals: Any, banks: Any, says: str) -> None:
    """What contradicts itself is an error when the source is made, not hours later."""
    with pytest.raises(InputError, match=says):
        ArraySource({"r": ArrayRecording(signals)}, banks)


def test_raws_are_read_as_they_are() -> None:
    """A Raw in memory gives what MNE gives, with its annotations as events."""
    raw = raw_array()
    source = RawSource([raw])
    (entry,) = source.entries()
    assert (entry.id, entry.size_bytes) == ("0", 500 * 3 * 8)
    with source.open(entry) as recording:
        np.testing.assert_array_equal(recording.read("eeg", 0, 500), raw.get_data("eeg", units="uV").T)
        assert recording.events.description == ("go", "stop")
        assert recording.whole is raw


def test_raws_in_a_list_are_numbered_in_order() -> None:
    """Zeros in front keep the order of the list when sorted."""
    assert [entry.id for entry in RawSource([raw_array(300)] * 11).entries()] == [
        f"{n:02}" for n in range(11)
    ]


def test_raws_need_a_name_that_exists() -> None:
    """No Raw, or fields for nobody, is an error."""
    with pytest.raises(InputError, match="at least one Raw"):
        RawSource({})
    with pytest.raises(InputError, match="'b', which is no recording"):
        RawSource({"a": raw_array(300)}, {"b": {}})


def test_descriptions_become_ids_and_fields() -> None:
    """Subject, session, task and run name a recording; missing values are absent."""
    description = {
        "run": np.int64(2),
        "subject": "7",
        "task": "rest",
        "age": np.float64(9.5),
        "p": np.nan,
        "q": None,
    }
    dataset = SimpleNamespace(datasets=[SimpleNamespace(raw=raw_array(), description=description)])
    (entry,) = ConcatSource(dataset).entries()
    assert entry.id == "sub-7_task-rest_run-2"
    assert entry.fields == {"run": 2, "subject": "7", "task": "rest", "age": 9.5}
    assert type(entry.fields["age"]) is float


def test_descriptions_that_do_not_tell_apart_are_numbered() -> None:
    """Two recordings of one description are told by their place."""
    one = SimpleNamespace(raw=raw_array(), description={"subject": "7"})
    other = SimpleNamespace(raw=raw_array(), description=None)
    for datasets in ([one, one], [one, other]):
        assert [entry.id for entry in ConcatSource(SimpleNamespace(datasets=datasets)).entries()] == [
            "0",
            "1",
        ]


class Lazy:
    """A recording that counts how often it is fetched, as eegdash fetches: by a property."""

    def __init__(self, number: int, record: dict[str, int] | None = None) -> None:
        self.description = {"subject": number}
        self.record = record
        self.n_fetched = 0

    @property
    def raw(self) -> Any:
        self.n_fetched += 1
        if self.description["subject"] == 2:
            raise OSError("no route\nto host")
        return raw_array(seed=self.description["subject"])


def test_a_dataset_that_fetches_is_asked_once() -> None:
    """Nothing is fetched to make a source, one recording to open it, and none to list what has a record."""
    listed = Lazy(0, {"ntimes": 500, "nchans": 3})
    unlisted = Lazy(1)
    source = ConcatSource(SimpleNamespace(datasets=[listed, unlisted]))
    assert (listed.n_fetched, unlisted.n_fetched) == (0, 0)
    entries = source.entries()
    assert [entry.size_bytes for entry in entries] == [500 * 3 * 8] * 2
    assert (listed.n_fetched, unlisted.n_fetched) == (0, 1)
    source.open(entries[0]).close()
    assert (listed.n_fetched, unlisted.n_fetched) == (1, 1)


def test_a_recording_that_cannot_be_fetched_is_refused_by_name() -> None:
    """It is listed with the others, and told of when it is opened; so is one that eegdash skipped."""
    skipped = SimpleNamespace(raw=None, description={"subject": 3})
    source = ConcatSource(SimpleNamespace(datasets=[Lazy(1), Lazy(2), skipped]))
    _, broken, without = source.entries()
    with pytest.raises(SourceError, match=r"^sub-2 cannot be read \(OSError: no route to host\)\."):
        source.open(broken)
    with pytest.raises(SourceError, match=r"^sub-3 has no Raw"):
        source.open(without)


def test_braindecode_datasets_are_read_and_their_windows_refused() -> None:
    """A BaseConcatDataset of recordings is a source; one of windows is told what to hand in."""
    datasets = pytest.importorskip("braindecode.datasets")
    from braindecode.preprocessing import create_fixed_length_windows

    concat = datasets.BaseConcatDataset(
        [datasets.RawDataset(raw_array(seed=n), {"subject": n, "age": 9.5}) for n in range(2)]
    )
    source = ConcatSource(concat)
    assert [(entry.id, entry.fields) for entry in source.entries()] == [
        ("sub-0", {"subject": 0.0, "age": 9.5}),
        ("sub-1", {"subject": 1.0, "age": 9.5}),
    ]
    travelled = pickle.loads(pickle.dumps(source))
    with travelled.open(travelled.entries()[1]) as recording:
        expected = raw_array(seed=1).get_data("eeg", units="uV").T
        np.testing.assert_array_equal(recording.read("eeg", 0, 500), expected)
    windows = create_fixed_length_windows(
        concat, window_size_samples=100, window_stride_samples=100, on_last_window="drop"
    )
    with pytest.raises(InputError, match=r"EEGWindowsDataset holds windows. Hand in the continuous"):
        ConcatSource(windows)
