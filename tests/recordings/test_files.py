from __future__ import annotations

import os
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
        ("eeglab_data.set", 2): (30504, 32),
        ("test.vhdr", 3): (7900, 26),
        ("test.bdf", 1): (15360, 16),
        ("test.edf", 1): (15360, 16),
    }


def test_a_folder_is_searched_to_the_bottom(tmp_path: Path) -> None:
    """Ids are paths from the folder; other files are passed over."""
    touch(tmp_path, "b/c/x.bdf", "b/a.EDF", "notes.txt", "b/a.json", ".hidden/y.bdf", "table.tsv.gz")
    assert ids(FileSource(tmp_path)) == ["b/a.EDF", "b/c/x.bdf"]
    assert FileSource(tmp_path).refusals() == ()


def test_a_file_given_by_itself_is_named_by_its_name(tmp_path: Path) -> None:
    """Files and folders can be mixed."""
    touch(tmp_path, "one/x.bdf", "two/y.edf")
    assert ids(FileSource([tmp_path / "one/x.bdf", tmp_path / "two"])) == ["x.bdf", "y.edf"]


def test_recordings_of_the_same_name_are_an_error(tmp_path: Path) -> None:
    """Two recordings never share an id; the message names both files."""
    touch(tmp_path, "one/y.bdf", "two/y.bdf")
    with pytest.raises(InputError, match=r"one/y\.bdf and .*two/y\.bdf would both be called 'y\.bdf'"):
        FileSource([tmp_path / "one", tmp_path / "two"]).entries()


def test_companions_and_later_parts_are_no_entries(tmp_path: Path) -> None:
    """What belongs to a recording is listed with it, not beside it."""
    touch(tmp_path, "a.vhdr", "a.eeg", "a.vmrk", "b.vhdr", "b.dat", "c.set", "c.fdt")
    touch(tmp_path, "d_raw.fif", "d_raw-1.fif", "d_raw-2.fif", "e_split-01_meg.fif", "e_split-02_meg.fif")
    files = {entry.id: [file.path.name for file in entry.files] for entry in FileSource(tmp_path).entries()}
    assert files == {
        "a.vhdr": ["a.vhdr", "a.eeg", "a.vmrk"],
        "b.vhdr": ["b.vhdr", "b.dat"],
        "c.set": ["c.set", "c.fdt"],
        "d_raw.fif": ["d_raw.fif", "d_raw-1.fif", "d_raw-2.fif"],
        "e_split-01_meg.fif": ["e_split-01_meg.fif", "e_split-02_meg.fif"],
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
        "i.bdf.gz",
        "j.vhdr.zip",
        "k.tsv.gz",
    )
    source = FileSource(tmp_path)
    assert ids(source) == ["a.bdf"]
    assert [(refusal.id, refusal.reason) for refusal in source.refusals()] == [
        ("b.gdf", "format"),
        ("c.vhdr", "files"),
        ("d.fdt", "files"),
        ("e_raw-1.fif", "files"),
        ("f_raw.fif.gz", "format"),
        ("g.mff", "format"),
        ("i.bdf.gz", "format"),
        ("j.vhdr.zip", "format"),
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


@pytest.mark.parametrize("way", ["absolute", "relative", "here", "link"])
def test_a_refusal_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Whichever way a path was given, the folders of this machine stay out of stores."""
    folder = touch(tmp_path / "secret", *(f"x{suffix}" for suffix in FORMATS), "x.eeg")
    (folder / "x.set").write_bytes(b"no MATLAB file")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if way == "here" else tmp_path)
    given = {"absolute": folder, "relative": Path("secret"), "here": Path(), "link": Path("link")}[way]
    source = FileSource(given)
    for entry in source.entries():
        with pytest.raises(SourceError) as caught:
            source.open(entry)
        assert not [name for name in (str(tmp_path), "secret", "link") if name in str(caught.value)]


def test_a_path_may_be_text(tmp_path: Path) -> None:
    """One path as text is one path, not its letters."""
    touch(tmp_path, "x.bdf", "y.bdf")
    assert ids(FileSource(str(tmp_path))) == ["x.bdf", "y.bdf"]
    assert ids(FileSource([str(tmp_path / "x.bdf")])) == ["x.bdf"]


def test_a_later_recording_renames_no_other(tmp_path: Path) -> None:
    """Two formats of one stem are two recordings."""
    before = ids(FileSource(touch(tmp_path, "x.bdf")))
    assert ids(FileSource(touch(tmp_path, "x.edf"))) == [*before, "x.edf"]


def test_a_folder_of_all_formats_is_listed_whole(measured: Path) -> None:
    """Recordings of one stem do not keep each other out."""
    assert ids(FileSource(measured / "eeg_formats")) == [
        "brainvision_responses/test.vhdr",
        "test.bdf",
        "test.edf",
        "testbva.vhdr",
    ]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """A link to a folder above is not followed, nor a link to itself; others are."""
    touch(tmp_path, "top/a/x.bdf", "elsewhere/y.bdf")
    (tmp_path / "top/a/up").symlink_to(tmp_path / "top")
    (tmp_path / "top/a/self").symlink_to(tmp_path / "top/a/self")
    (tmp_path / "top/side").symlink_to(tmp_path / "elsewhere")
    assert ids(FileSource(tmp_path / "top")) == ["a/x.bdf", "side/y.bdf"]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the folder given it is a refusal, the folder given itself an error."""
    touch(tmp_path, "x.bdf", "shut/y.bdf")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = FileSource(tmp_path)
    assert ids(source) == ["x.bdf"]
    (refusal,) = source.refusals()
    assert (refusal.id, refusal.reason) == ("shut", "files")
    assert refusal.detail == "Folder shut cannot be listed (PermissionError). Get the right to read it."
    with pytest.raises(InputError, match="Folder shut cannot be listed"):
        FileSource(tmp_path / "shut").entries()


def test_companions_in_capitals_are_joined(tmp_path: Path) -> None:
    """Windows writes either."""
    touch(tmp_path, "a.SET", "a.FDT", "b.VHDR", "b.EEG", "b.VMRK")
    source = FileSource(tmp_path)
    assert [[file.path.name for file in entry.files] for entry in source.entries()] == [
        ["a.SET", "a.FDT"],
        ["b.VHDR", "b.EEG", "b.VMRK"],
    ]
    assert source.refusals() == ()


def copied(measured: Path, folder: Path, stem: str, *suffixes: str) -> None:
    """Copy a recording twice: under its own name, and as ``new``."""
    for suffix in suffixes:
        for name in (Path(stem).name, "new"):
            shutil.copyfile(measured / f"{stem}{suffix}", folder / f"{name}{suffix}")


def test_a_header_that_names_the_files_of_another_is_refused(measured: Path, tmp_path: Path) -> None:
    """Files that are read but not listed would not be in the fingerprint; marker files are among them."""
    copied(measured, tmp_path, "eeg_formats/testbva", ".vhdr", ".dat", ".vmrk")
    copied(measured, tmp_path, "eeg_attention/eeglab_data", ".set", ".fdt")
    source = FileSource(tmp_path)
    problems = {}
    for entry in source.entries():
        try:
            source.open(entry).close()
        except SourceError as error:
            problems[entry.id] = str(error)
    assert problems == {
        "new.set": "new.set names eeglab_data.fdt, which is not new.fdt. Rename it inside the header.",
        "new.vhdr": "new.vhdr names testbva.dat, which is not new.dat. Rename it inside the header.",
    }
    header = (tmp_path / "new.vhdr").read_bytes().replace(b"DataFile=testbva.dat", b"DataFile=new.dat")
    (tmp_path / "new.vhdr").write_bytes(header)
    (entry,) = FileSource(tmp_path / "new.vhdr").entries()
    with pytest.raises(SourceError, match=r"names testbva\.vmrk, which is not new\.vmrk"):
        source.open(entry)
    (tmp_path / "testbva.vmrk").unlink()  # MNE then takes new.vmrk
    with source.open(entry) as recording:
        assert len(recording.events)


def test_parts_of_a_renamed_fif_are_not_taken_from_another(tmp_path: Path) -> None:
    """A first part goes on where its header says, which has to be after its own name."""
    raw = mne.io.RawArray(np.zeros((2, 200_000)), mne.create_info(2, 100.0, "eeg"), verbose="ERROR")
    raw.save(tmp_path / "x_raw.fif", split_size="2MB", buffer_size_sec=1, verbose="ERROR")
    shutil.copyfile(tmp_path / "x_raw.fif", tmp_path / "y_raw.fif")
    source = FileSource(tmp_path)
    x, y = source.entries()
    source.open(x).close()
    with pytest.raises(SourceError, match=r"y_raw\.fif goes on in x_raw-1\.fif, which is not named after it"):
        source.open(y)


def test_epochs_are_told_from_damage(tmp_path: Path) -> None:
    """A FIF of epochs is sound, and no continuous recording."""
    epochs = mne.EpochsArray(np.zeros((3, 2, 50)), mne.create_info(2, 100.0, "eeg"), verbose="ERROR")
    epochs.save(tmp_path / "x-epo.fif", verbose="ERROR")
    source = FileSource(tmp_path)
    with pytest.raises(SourceError, match=r"^x-epo\.fif holds epochs\. Hand in the continuous recording"):
        source.open(source.entries()[0])


def test_reading_does_not_depend_on_where_the_files_lie(tmp_path: Path, write_bdf: Write) -> None:
    """The same files elsewhere have the same ids."""
    write_bdf(tmp_path / "one" / "p" / "x.bdf")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert ids(FileSource(tmp_path / "one")) == ids(FileSource(tmp_path / "two"))
