from __future__ import annotations

from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest

from engram.arrays import ArraySpec
from engram.errors import DoesNotFit, InputError
from engram.recordings import as_source
from engram.recordings.bids import BidsSource
from engram.recordings.files import FileSource
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource, ConcatSource, RawSource
from engram.recordings.recording import (
    Channel,
    Events,
    Signal,
    Source,
    read_blocks,
    signal_named,
)


@pytest.fixture
def source() -> ArraySource:
    """Ten samples of two channels."""
    return ArraySource({"r": ArrayRecording({"eeg": ArraySignal(np.arange(20.0).reshape(10, 2), 5.0)})})


def raw() -> Any:
    """A short Raw."""
    return mne.io.RawArray(np.zeros((1, 50)), mne.create_info(["Cz"], 100.0, "eeg"), verbose="ERROR")


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, np.inf, np.nan])
def test_a_rate_is_above_zero_and_finite(rate_hz: float) -> None:
    """Time needs a rate."""
    with pytest.raises(InputError, match="Give a rate above zero"):
        Signal("eeg", ArraySpec((10, 2), "float32", ("time", "channel")), rate_hz)


def test_channels_name_every_column_or_none() -> None:
    """A signal has one channel for each index of its last axis."""
    spec = ArraySpec((10, 2), "float32", ("time", "channel"))
    assert Signal("eeg", spec, 5.0, channels=(Channel("a"), Channel("b"))).duration_s == 2.0
    with pytest.raises(InputError, match="names 1 channels for 2 columns"):
        Signal("eeg", spec, 5.0, channels=(Channel("a"),))


def test_columns_of_events_have_one_length() -> None:
    """A table has rows."""
    with pytest.raises(InputError, match=r"differ in length: \[1, 2\]"):
        Events((1.0,), (0.0,), ("a",), {"x": (None, "b")})


def test_blocks_are_as_large_as_allowed(source: ArraySource) -> None:
    """As many samples as fit, the rest last; a sample that does not fit is an error."""
    with source.open(source.entries()[0]) as recording:
        assert [(start, len(block)) for start, block in read_blocks(recording, "eeg", 70)] == [
            (0, 4),
            (4, 4),
            (8, 2),
        ]
        with pytest.raises(DoesNotFit, match="needs 16 B, allowed 15 B"):
            next(read_blocks(recording, "eeg", 15))


def test_an_unknown_signal_is_told_with_those_there_are(source: ArraySource) -> None:
    """The message names what could have been meant."""
    with (
        source.open(source.entries()[0]) as recording,
        pytest.raises(InputError, match=r"no signal 'x' .* one of: eeg"),
    ):
        signal_named(recording.signals, "x")


def test_a_folder_is_read_by_what_it_is(tmp_path: Path) -> None:
    """A BIDS dataset, or a folder of some, by BidsSource with filters; other paths by FileSource."""
    assert as_source(tmp_path) == FileSource(tmp_path)
    assert as_source(str(tmp_path)) == FileSource(tmp_path)
    assert as_source([tmp_path / "a.bdf", "b.edf"]) == FileSource([tmp_path / "a.bdf", Path("b.edf")])
    (tmp_path / "R1").mkdir()
    (tmp_path / "R1" / "dataset_description.json").touch()
    assert as_source(tmp_path, tasks="x", mini=True) == BidsSource(tmp_path, tasks="x", mini=True)
    assert as_source(tmp_path / "R1") == BidsSource(tmp_path / "R1")
    with pytest.raises(InputError, match="is a BIDS dataset in a list"):
        as_source([tmp_path / "R1", tmp_path / "a.bdf"])


def test_objects_are_known_by_what_they_can_do(source: ArraySource) -> None:
    """A Raw, several, arrays, a dataset, and a source itself."""
    assert as_source(source) is source
    for given in (raw(), [raw(), raw()], {"a": raw()}):
        assert isinstance(as_source(given), RawSource)
    assert isinstance(as_source(source.recordings), ArraySource)
    concat = type("Concat", (), {"datasets": [type("One", (), {"raw": raw(), "description": {}})()]})()
    assert isinstance(as_source(concat), ConcatSource)
    assert all(isinstance(as_source(given), Source) for given in (raw(), source.recordings, concat))


@pytest.mark.parametrize("given", [7, None, [], {}, [1], {"a": 1}, np.zeros(3)])
def test_what_holds_no_recordings_is_an_error(given: object) -> None:
    """Nothing is guessed."""
    with pytest.raises(InputError, match="holds no recordings"):
        as_source(given)


def test_an_unknown_filter_is_told_with_those_there_are(tmp_path: Path) -> None:
    """A misspelt filter is an error before anything is looked at."""
    for given in (tmp_path, [raw()]):
        with pytest.raises(InputError, match=r"no filter 'subject'. Use one of: subjects, sessions, tasks"):
            as_source(given, subject=3)


def test_filters_need_a_dataset_to_filter(tmp_path: Path) -> None:
    """A filter that could not do anything is an error."""
    with pytest.raises(InputError, match="tasks can be chosen in a BIDS dataset only"):
        as_source(tmp_path, tasks="rest")
