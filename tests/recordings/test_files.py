from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mne
import numpy as np
import pytest

from engram.errors import InputError, SourceError
from engram.recordings.files import FileSource
from engram.recordings.mne_raw import FORMATS
from engram.testing.sources import SourceConformance, opened_files

Write = Callable[..., Path]


def touch(folder: Path, *names: str) -> Path:
    """Make empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ids(source: FileSource) -> list[str]:
    """Ids as listed."""
    return [entry.id for entry in source.entries()]


class TestFileConformance(SourceConformance):
    @pytest.fixture
    def source(self, tmp_path: Path, write_bdf: Write) -> FileSource:
        """Three recordings of two formats, and two files that cannot be used."""
        write_bdf(tmp_path / "b.bdf", n_channels=1)
        write_bdf(tmp_path / "deep" / "a.bdf")
        info = mne.create_info(["Cz", "st"], 100.0, ["eeg", "stim"])
        raw = mne.io.RawArray(np.random.default_rng(0).normal(0, 1e-5, (2, 900)), info, verbose="ERROR")
        raw.set_annotations(mne.Annotations([1.0, 2.0], [0.0, 0.5], ["go", "BAD_ACQ_SKIP"]))
        raw.save(tmp_path / "c_raw.fif", verbose="ERROR")
        touch(tmp_path, "d.vhdr", "e.gdf")
        return FileSource(tmp_path)


class TestMeasuredFilesConformance(SourceConformance):
    @pytest.fixture
    def source(self, measured: Path) -> FileSource:
        """Measured recordings of three formats."""
        names = ("eeg_formats/test.bdf", "eeg_formats/testbva.vhdr", "eeg_attention")
        return FileSource([measured / name for name in names])


def test_measured_files_are_found_and_opened(measured: Path) -> None:
    """Each of four formats is listed with all its files and opened by its suffix."""
    found = {}
    for name in (
        "eeg_attention",
        "eeg_formats/brainvision_responses",
        "eeg_formats/test.bdf",
        "eeg_formats/test.edf",
    ):
        source = FileSource(measured / name)
        (entry,) = source.entries()
        with source.open(entry) as recording:
            found[entry.id, len(entry.files)] = recording.signals[0].array.shape
    assert found == {
        ("eeglab_data", 2): (30504, 32),
        ("test", 3): (7900, 26),
        ("test", 1): (15360, 16),
    }


def test_a_folder_is_searched_to_the_bottom(tmp_path: Path) -> None:
    """Ids are paths from the folder without the suffix; other files are passed over."""
    touch(tmp_path, "b/c/x.bdf", "b/a.EDF", "notes.txt", "b/a.json", ".hidden/y.bdf", "table.tsv.gz")
    assert ids(FileSource(tmp_path)) == ["b/a", "b/c/x"]
    assert FileSource(tmp_path).refusals() == ()


def test_a_file_given_by_itself_is_named_by_its_stem(tmp_path: Path) -> None:
    """Files and folders can be mixed."""
    touch(tmp_path, "one/x.bdf", "two/y.edf")
    assert ids(FileSource([tmp_path / "one/x.bdf", tmp_path / "two"])) == ["x", "y"]


def test_recordings_of_the_same_name_are_an_error(tmp_path: Path) -> None:
    """Two recordings never share an id; the message names both files."""
    touch(tmp_path, "x.bdf", "x.edf", "one/y.bdf", "two/y.bdf")
    with pytest.raises(InputError, match=r"x\.bdf and .*x\.edf would both be called 'x'"):
        FileSource(tmp_path).entries()
    with pytest.raises(InputError, match="would both be called 'y'"):
        FileSource([tmp_path / "one", tmp_path / "two"]).entries()


def test_companions_and_later_parts_are_no_entries(tmp_path: Path) -> None:
    """What belongs to a recording is listed with it, not beside it."""
    touch(tmp_path, "a.vhdr", "a.eeg", "a.vmrk", "b.vhdr", "b.dat", "c.set", "c.fdt")
    touch(tmp_path, "d_raw.fif", "d_raw-1.fif", "d_raw-2.fif", "e_split-01_meg.fif", "e_split-02_meg.fif")
    files = {entry.id: [file.path.name for file in entry.files] for entry in FileSource(tmp_path).entries()}
    assert files == {
        "a": ["a.vhdr", "a.eeg", "a.vmrk"],
        "b": ["b.vhdr", "b.dat"],
        "c": ["c.set", "c.fdt"],
        "d_raw": ["d_raw.fif", "d_raw-1.fif", "d_raw-2.fif"],
        "e_split-01_meg": ["e_split-01_meg.fif", "e_split-02_meg.fif"],
    }
    assert FileSource(tmp_path).refusals() == ()


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """Formats not read, headers without data, data without headers and parts without the first."""
    touch(
        tmp_path,
        "a.bdf",
        "b.gdf",
        "c.vhdr",
        "d.fdt",
        "e_raw-1.fif",
        "f_raw.fif.gz",
        "g.mff/signal1.bin",
        "h.dat",
    )
    source = FileSource(tmp_path)
    assert ids(source) == ["a"]
    assert [(refusal.id, refusal.reason) for refusal in source.refusals()] == [
        ("b.gdf", "format"),
        ("c.vhdr", "files"),
        ("d.fdt", "files"),
        ("e_raw-1.fif", "files"),
        ("f_raw.fif.gz", "format"),
        ("g.mff", "format"),
    ]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    """A folder without a recording, a missing path, a companion by itself: each says what to do."""
    touch(tmp_path, "notes.txt", "a.vhdr", "a.vmrk", "a.eeg")
    with pytest.raises(InputError, match=r"There is no recording in .*empty.*ending in \.bdf, \.edf"):
        FileSource([touch(tmp_path / "empty", "x.txt")]).entries()
    with pytest.raises(InputError, match="does not exist"):
        FileSource(tmp_path / "gone").entries()
    for name in ("notes.txt", "a.eeg"):
        with pytest.raises(InputError, match="does not open a recording"):
            FileSource(tmp_path / name).entries()


def test_an_embedded_set_is_resident(tmp_path: Path) -> None:
    """A .set without its .fdt is held in memory by MNE; what is read in pieces is not."""
    (tmp_path / "a.set").write_bytes(b"12345")
    (tmp_path / "b.bdf").write_bytes(b"12345")
    assert [entry.resident_bytes for entry in FileSource(tmp_path).entries()] == [20, 0]


def test_a_damaged_file_is_listed_and_refused_on_opening(tmp_path: Path) -> None:
    """Listing does not look inside; opening tells what is wrong."""
    source = FileSource(
        touch(tmp_path, *(f"x{number}{suffix}" for number, suffix in enumerate(sorted(FORMATS))))
    )
    (tmp_path / "x4.eeg").touch()
    with opened_files() as opened:
        entries = source.entries()
    assert len(entries) == len(FORMATS)
    assert not [name for name in opened if Path(name).suffix in FORMATS]
    for entry in entries:
        with pytest.raises(SourceError, match=r"^x\d\.\w+ cannot be read"):
            source.open(entry)


def test_reading_does_not_depend_on_where_the_files_lie(tmp_path: Path, write_bdf: Write) -> None:
    """The same files elsewhere have the same ids."""
    write_bdf(tmp_path / "one" / "p" / "x.bdf")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert ids(FileSource(tmp_path / "one")) == ids(FileSource(tmp_path / "two"))
