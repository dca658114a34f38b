from __future__ import annotations

import datetime as dt
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edfio
import mne
import numpy as np
import pytest
import scipy.io

from engram.errors import InputError, SourceError
from engram.recordings.mne_raw import FORMATS, RawRecording, first_part, format_of, open_raw, signal_files
from engram.recordings.recording import Gap

VOLTS = {"eeg", "eog", "ecg", "emg", "seeg", "ecog", "dbs", "bio"}


def raw_array(n_samples: int = 1000, types: tuple[str, ...] = ("eeg", "eeg")) -> Any:
    """Noise at 100 Hz."""
    info = mne.create_info(len(types), 100.0, list(types))
    data = np.random.default_rng(0).normal(0, 2e-5, (len(types), n_samples))
    return mne.io.RawArray(data, info, verbose="ERROR")


def test_measured_files_equal_mne_to_the_bit(measured: Path) -> None:
    """Every channel of every format is what MNE gives, volts as microvolts."""
    paths = sorted(path for path in measured.rglob("*") if format_of(path.name))
    assert {path.suffix for path in paths} == {".bdf", ".edf", ".set", ".vhdr"}
    for path in paths:
        raw = getattr(mne.io, FORMATS[path.suffix].reader)(path, verbose="ERROR")
        with RawRecording(open_raw(path)) as recording:
            assert sum(len(signal.channels) for signal in recording.signals) == len(raw.ch_names)
            for signal in recording.signals:
                units = "uV" if signal.name in VOLTS else None
                expected = raw.get_data(signal.name, units=units).T
                got = recording.read(signal.name, 0, signal.n_samples)
                np.testing.assert_array_equal(got, expected.astype(signal.array.dtype), strict=True)
                part = recording.read(signal.name, 100, 357)
                np.testing.assert_array_equal(part, got[100:357])


def test_fif_and_its_split_parts_equal_mne_to_the_bit(tmp_path: Path) -> None:
    """A split FIF is one recording, read over its joints."""
    raw = raw_array(200_000)
    raw.save(tmp_path / "long_raw.fif", split_size="2MB", buffer_size_sec=1, verbose="ERROR")
    names = signal_files("long_raw.fif", {path.name for path in tmp_path.iterdir()})
    assert names == ("long_raw.fif", "long_raw-1.fif")
    with RawRecording(open_raw(tmp_path / "long_raw.fif")) as recording:
        expected = mne.io.read_raw_fif(tmp_path / "long_raw.fif", verbose="ERROR").get_data(units="uV").T
        np.testing.assert_array_equal(recording.read("eeg", 0, 200_000), expected)


def test_one_signal_per_channel_type() -> None:
    """Types are signals of their own, eeg first in float64, others in float32 and their unit."""
    recording = RawRecording(raw_array(types=("stim", "eog", "eeg", "misc", "eeg")))
    kinds = [(s.name, s.array.shape, s.array.dtype, s.channels[0].unit) for s in recording.signals]
    assert kinds == [
        ("eeg", (1000, 2), "float64", "uV"),
        ("stim", (1000, 1), "float32", ""),
        ("eog", (1000, 1), "float32", "uV"),
        ("misc", (1000, 1), "float32", "AU"),
    ]
    assert [channel.name for channel in recording.signals[0].channels] == ["2", "4"]


def test_positions_and_bad_channels_are_kept() -> None:
    """A channel has its place in the head frame, where it is known, and its bad mark."""
    raw = mne.io.RawArray(np.zeros((2, 10)), mne.create_info(["Cz", "x"], 100.0, "eeg"), verbose="ERROR")
    place = mne.channels.make_dig_montage({"Cz": [0.0, 0.01, 0.1]}, coord_frame="head")
    raw.set_montage(place, on_missing="ignore")
    raw.info["bads"] = ["x"]
    cz, other = RawRecording(raw).signals[0].channels
    assert cz.position_m == (0.0, 0.01, 0.1)
    assert (cz.bad, other.position_m, other.bad) == (False, None, True)


@pytest.mark.parametrize("meas_date", [None, dt.datetime(2020, 5, 17, tzinfo=dt.UTC)])
def test_onsets_count_from_the_first_sample(meas_date: dt.datetime | None) -> None:
    """Cropping moves events and gaps with the samples, with and without a measurement date."""
    raw = raw_array()
    raw.set_meas_date(meas_date)
    extras = [{"feedback": "smiley_face", "rt": 1.25}, None]
    raw.set_annotations(mne.Annotations([2.0, 4.0], [0.0, 0.5], ["target", "BAD_ACQ_SKIP"], extras=extras))
    raw.crop(1.5, 9.0)
    recording = RawRecording(raw)
    assert recording.events.onset_s == (0.5, 2.5)
    assert recording.events.duration_s == (0.0, 0.5)
    assert recording.events.description == ("target", "BAD_ACQ_SKIP")
    assert recording.events.extras == {"feedback": ("smiley_face", None), "rt": ("1.25", None)}
    assert recording.signals[0].gaps == (Gap(250, 300),)


def test_channels_of_an_annotation_are_kept() -> None:
    """An annotation for some channels names them in the extras."""
    raw = raw_array()
    raw.set_annotations(mne.Annotations([1.0, 2.0], 0.0, "x", ch_names=[("0", "1"), ()]))
    assert RawRecording(raw).events.extras == {"ch_names": ("0,1", None)}


def test_joints_are_gaps_without_length() -> None:
    """Where recordings were put together, filters stop, as MNE's skip_by_annotation says."""
    recording = RawRecording(mne.concatenate_raws([raw_array(), raw_array(500)], verbose="ERROR"))
    assert recording.signals[0].gaps == (Gap(1000, 1000),)


def test_overlapping_gaps_become_one() -> None:
    """Gaps are sorted, apart and inside the recording; one at the very edge joins nothing."""
    raw = raw_array()
    onsets, durations = [0.0, 1.0, 1.5, 3.0, 9.5], [0.0, 1.0, 1.0, 0.0, 0.5]
    raw.set_annotations(
        mne.Annotations(onsets, durations, ["EDGE", "BAD_ACQ_SKIP", "bad_acq_skip 2", "edge", "EDGE"])
    )
    assert RawRecording(raw).signals[0].gaps == (Gap(100, 250), Gap(300, 300), Gap(950, 1000))


def test_reading_leaves_a_raw_in_memory_alone() -> None:
    """A Raw that somebody holds keeps its samples, whatever is done with what was read."""
    raw = raw_array()
    before = raw.get_data()
    recording = RawRecording(raw)
    recording.read("eeg", 0, 1000)[:] = 0
    recording.close()
    np.testing.assert_array_equal(raw.get_data(), before)
    with pytest.raises(InputError, match="closed"):
        recording.read("eeg", 0, 1)


def cut_bdf(path: Path) -> None:
    """Cut within a record."""
    os.truncate(path, path.stat().st_size * 2 // 3)


def cut_bdf_between_records(path: Path) -> None:
    """Cut off the last record."""
    os.truncate(path, path.stat().st_size - 3 * 4 * 100)


def cut_bdf_never_closed(path: Path) -> None:
    """Promise nothing, and end within a record."""
    with path.open("r+b") as file:
        file.seek(236)
        file.write(b"-1      ")
    os.truncate(path, path.stat().st_size - 1)


def cut_bdf_header(path: Path) -> None:
    """Cut within the header."""
    os.truncate(path, 300)


def empty_bdf(path: Path) -> None:
    """Leave nothing."""
    os.truncate(path, 0)


def interrupt_bdf(path: Path) -> None:
    """Declare interruptions."""
    with path.open("r+b") as file:
        file.seek(192)
        file.write(b"BDF+D")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_bdf, r"x\.bdf is truncated: its header promises 5 records of 1200 bytes"),
        (cut_bdf_between_records, "it holds 4 and 0 bytes"),
        (cut_bdf_never_closed, "promises whole records of 1200 bytes, it holds 4 and 1199 bytes"),
        (cut_bdf_header, r"x\.bdf cannot be read \(ValueError"),
        (empty_bdf, r"x\.bdf cannot be read \(ValueError: Bad BDF file"),
        (interrupt_bdf, "BDF.D, with interruptions"),
    ],
)
def test_a_damaged_bdf_is_refused(
    tmp_path: Path, write_bdf: Callable[..., Path], damage: Callable[[Path], None], says: str
) -> None:
    """A file that ends before its header says is an error, never a shorter recording."""
    path = write_bdf(tmp_path / "x.bdf")
    damage(path)
    with pytest.raises(SourceError, match=says) as caught:
        open_raw(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_bdf_that_was_never_closed_is_read_and_told(
    tmp_path: Path, write_bdf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """-1 records in the header with whole records in the file is all there is; the log says so."""
    path = write_bdf(tmp_path / "x.bdf")
    with path.open("r+b") as file:
        file.seek(236)
        file.write(b"-1      ")
    with caplog.at_level(logging.WARNING, "engram.recordings"), RawRecording(open_raw(path)) as recording:
        assert recording.signals[0].n_samples == 500
    assert "x.bdf: Number of records from the header does not match" in caplog.text


def test_a_file_cut_while_open_is_an_error(tmp_path: Path, write_bdf: Callable[..., Path]) -> None:
    """Samples that vanish after opening are an error at reading."""
    with RawRecording(open_raw(write_bdf(tmp_path / "x.bdf"))) as recording:
        cut_bdf(tmp_path / "x.bdf")
        with pytest.raises(SourceError, match=r"x\.bdf cannot be read"):
            recording.read("eeg", 0, 500)


def test_an_edf_of_mixed_rates_is_refused(tmp_path: Path) -> None:
    """Slow channels that MNE would resample block by block, with other values, are refused."""
    noise = np.random.default_rng(0).normal(size=500)
    signals = [edfio.EdfSignal(noise, 100, label="Cz"), edfio.EdfSignal(noise[:5], 1, label="temp")]
    edfio.Edf(signals).write(tmp_path / "x.edf")
    with pytest.raises(SourceError, match=r"mixes channels of \[1, 100\] samples per record"):
        open_raw(tmp_path / "x.edf")


@pytest.mark.parametrize("missing_bytes", [1, 100, 500_000])
def test_a_truncated_fif_is_refused(tmp_path: Path, missing_bytes: int) -> None:
    """A FIF file without its end is refused on opening, wherever it was cut."""
    path = tmp_path / "x_raw.fif"
    raw_array(100_000).save(path, verbose="ERROR")
    os.truncate(path, path.stat().st_size - missing_bytes)
    with pytest.raises(SourceError, match=r"x_raw\.fif is truncated") as caught:
        open_raw(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_split_fif_without_its_end_is_refused(tmp_path: Path) -> None:
    """A later part that is missing is an error, not a shorter recording."""
    raw_array(200_000).save(tmp_path / "x_raw.fif", split_size="2MB", buffer_size_sec=1, verbose="ERROR")
    (tmp_path / "x_raw-1.fif").unlink()
    with pytest.raises(SourceError, match=r"next file x_raw-1\.fif does not exist"):
        open_raw(tmp_path / "x_raw.fif")


def copied(measured: Path, tmp_path: Path, *names: str) -> Path:
    """Copy files that may be damaged; return the first."""
    for name in names:
        shutil.copyfile(measured / name, tmp_path / Path(name).name)
    return tmp_path / Path(names[0]).name


def test_a_truncated_brainvision_is_refused(measured: Path, tmp_path: Path) -> None:
    """DataPoints, where the header has it, and whole samples are both held to."""
    path = copied(measured, tmp_path, *(f"eeg_formats/testbva.{end}" for end in ("vhdr", "vmrk", "dat")))
    os.truncate(tmp_path / "testbva.dat", 128 * 2111)
    with pytest.raises(SourceError, match="promises 2112 samples of 128 bytes"):
        open_raw(path)
    path.write_bytes(path.read_bytes().replace(b"DataPoints=2112", b""))
    os.truncate(tmp_path / "testbva.dat", 128 * 2111 - 1)
    with pytest.raises(SourceError, match="promises whole samples of 128 bytes"):
        open_raw(path)


def test_a_truncated_fdt_is_refused(measured: Path, tmp_path: Path) -> None:
    """The .fdt of an EEGLAB recording holds what the .set promises, or it is refused."""
    path = copied(measured, tmp_path, "eeg_attention/eeglab_data.set", "eeg_attention/eeglab_data.fdt")
    os.truncate(tmp_path / "eeglab_data.fdt", 1_000_000)
    with pytest.raises(SourceError, match="promises 3904512 bytes, it holds 1000000"):
        open_raw(path)


@pytest.mark.parametrize("nested", [False, True])
def test_an_embedded_set_is_read(tmp_path: Path, nested: bool) -> None:
    """A .set that holds its samples itself, in either layout of EEGLAB, reads as MNE reads it."""
    samples = np.random.default_rng(0).normal(0, 20, (2, 300)).astype("float32")
    places = np.zeros((1, 2), [("labels", object)])
    places["labels"] = [["Fz", "Cz"]]
    event = np.zeros((1, 1), [("type", object), ("latency", object)])
    event[0, 0] = ("go", 51.0)
    eeg = {
        "nbchan": 2,
        "pnts": 300,
        "trials": 1,
        "srate": 100.0,
        "chanlocs": places,
        "event": event,
        "data": samples,
    }
    scipy.io.savemat(tmp_path / "x.set", {"EEG": eeg} if nested else eeg, appendmat=False)
    with RawRecording(open_raw(tmp_path / "x.set")) as recording:
        np.testing.assert_allclose(recording.read("eeg", 0, 300), samples.T, rtol=1e-6)
        assert (recording.events.onset_s, recording.events.description) == ((0.5,), ("go",))


def test_a_recording_without_samples_is_refused(tmp_path: Path, write_bdf: Callable[..., Path]) -> None:
    """No samples is no recording."""
    path = write_bdf(tmp_path / "x.bdf")
    with path.open("r+b") as file:
        file.seek(236)
        file.write(b"0       ")
    os.truncate(path, 256 * 5)
    with pytest.raises(SourceError, match="holds no samples"):
        open_raw(path)


def test_parts_of_split_recordings_are_known_by_name() -> None:
    """A later part names the first; no other file does."""
    assert first_part("sub-1_split-03_meg.fif") == "sub-1_split-01_meg.fif"
    assert first_part("a_raw-12.fif") == "a_raw.fif"
    assert first_part("sub-1_split-01_meg.fif") is None
    assert first_part("run-1.fif") is None


def test_a_companion_that_is_missing_is_an_error() -> None:
    """A header without its data names what is missing."""
    with pytest.raises(SourceError, match=r"a\.vhdr has no a\.eeg beside it"):
        signal_files("a.vhdr", {"a.vhdr", "a.vmrk"})
    assert signal_files("a.set", {"a.set", "b.fdt"}) == ("a.set",)


def test_an_unknown_suffix_is_an_input_error(tmp_path: Path) -> None:
    """What MNE could perhaps read under another name is not guessed at."""
    with pytest.raises(InputError, match=r"notes\.txt is of no known format"):
        open_raw(tmp_path / "notes.txt")
