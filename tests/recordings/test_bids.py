from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest

from engram.errors import InputError, SourceError
from engram.recordings.bids import BidsSource
from engram.recordings.mne_raw import RawRecording
from engram.recordings.recording import Entry, Events, Refusal
from engram.testing.sources import SourceConformance, opened_files

EVENTS = """onset\tduration\tvalue\tevent_code\tfeedback
3.25\t0\tright_target\t9\tn/a
1.5\tn/a\tcontrastTrial_start\t5\tn/a
4.0\t0.5\tright_buttonPress\t13\tsmiley_face
"""

Write = Callable[..., Path]


def write_dataset(root: Path, files: Mapping[str, str | None] | None = None) -> Path:
    """Write a dataset; a file without text is empty, as listing needs no more."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    for name, text in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "", encoding="utf-8")
    return root


def names(subjects: tuple[str, ...], runs: tuple[int, ...] = (1, 2)) -> dict[str, None]:
    """File names of some subjects: contrastChangeDetection in runs, and RestingState."""
    tasks = [f"task-contrastChangeDetection_run-{run}" for run in runs] + ["task-RestingState"]
    return {f"sub-{sub}/eeg/sub-{sub}_{task}_eeg.bdf": None for sub in subjects for task in tasks}


def ids(source: BidsSource) -> list[str]:
    """Ids as listed."""
    return [entry.id for entry in source.entries()]


class TestBidsConformance(SourceConformance):
    @pytest.fixture
    def source(self, tmp_path: Path, write_bdf: Write) -> BidsSource:
        """One release of two subjects, with a table of events and a file of unknown format."""
        for name in names(("A", "B"), runs=(1,)):
            write_bdf(tmp_path / "R1" / name, seed=len(name))
        events = {
            "sub-A/eeg/sub-A_task-RestingState_events.tsv": EVENTS,
            "sub-A/eeg/sub-A_task-x_eeg.gdf": None,
        }
        write_dataset(tmp_path / "R1", events)
        return BidsSource(tmp_path)


def test_entities_and_participants_become_fields(tmp_path: Path) -> None:
    """Entities lose their prefix, participants.tsv gives every column as text, n/a is absent."""
    table = (
        "participant_id\trelease_number\tage\texternalizing\tRestingState\nsub-A\tR5\t10.5\tn/a\tavailable\n"
    )
    files = {
        "participants.tsv": f"\ufeff{table}",
        "sub-A/ses-1/eeg/sub-A_ses-1_task-rest_acq-hi_run-02_eeg.bdf": None,
    }
    (entry,) = BidsSource(write_dataset(tmp_path / "R5", files)).entries()
    assert entry.id == "sub-A_ses-1_task-rest_acq-hi_run-02"
    assert entry.fields == {
        "subject": "A",
        "session": "1",
        "task": "rest",
        "acq": "hi",
        "run": "02",
        "release": "R5",
        "release_number": "R5",
        "age": "10.5",
        "RestingState": "available",
    }


@pytest.mark.parametrize("folder", ["R5", "R5_L100_bdf", "R5_mini_L100_bdf", "cmi_bids_R5", "R5/data"])
def test_the_release_is_read_off_the_path(tmp_path: Path, folder: str) -> None:
    """Where participants.tsv does not tell the release, the folder's name or its parent's does."""
    (entry,) = BidsSource(
        write_dataset(tmp_path / folder, {"sub-A/eeg/sub-A_task-x_eeg.bdf": None})
    ).entries()
    assert entry.fields["release"] == "R5"


@pytest.mark.parametrize("folder", ["people", "R5_L100_bdf", "R05"])
@pytest.mark.parametrize("told", ["R5", "r5", "R05", "5", "05", "5.0", "Release 5", "release-05"])
def test_a_release_is_named_in_one_way(tmp_path: Path, folder: str, told: str) -> None:
    """However release_number is spelt: R5 is kept from training by its name."""
    table = f"participant_id\trelease_number\nsub-A\t{told}\n"
    root = write_dataset(tmp_path / folder, names(("A",), ()) | {"participants.tsv": table})
    (entry,) = BidsSource(root).entries()
    assert (entry.fields["release"], entry.fields["release_number"]) == ("R5", told)


@pytest.mark.parametrize("told", ["pilot", "R100", "2017"])
def test_a_release_without_a_number_stays_as_it_is(tmp_path: Path, told: str) -> None:
    """A number is of one or two digits."""
    table = f"participant_id\trelease_number\nsub-A\t{told}\n"
    (entry,) = BidsSource(write_dataset(tmp_path, names(("A",), ()) | {"participants.tsv": table})).entries()
    assert entry.fields["release"] == told


@pytest.mark.parametrize("told", ["3", "R3", "pilot"])
def test_a_recording_of_two_releases_is_refused(tmp_path: Path, told: str) -> None:
    """Which of them is right nobody can tell; other subjects are listed, n/a says nothing."""
    table = f"participant_id\trelease_number\nsub-A\t{told}\nsub-B\tn/a\nsub-C\tRelease 5\n"
    files = names(("A", "B", "C"), ()) | {"participants.tsv": table}
    source = BidsSource(write_dataset(tmp_path / "R5_L100_bdf", files), releases="R5")
    assert ids(source) == ["sub-B_task-RestingState", "sub-C_task-RestingState"]
    (refusal,) = source.refusals()
    assert (refusal.id, refusal.reason) == ("sub-A_task-RestingState", "release")
    says = "R3" if "3" in told else told
    assert refusal.detail.startswith(f"participants.tsv says {says}, the folder's name R5. ")


def test_other_folder_names_are_no_release(tmp_path: Path) -> None:
    """A name that merely contains an R and a number is none."""
    files = {"sub-A/eeg/sub-A_task-x_eeg.bdf": None}
    (entry,) = BidsSource(write_dataset(tmp_path / "FOR5" / "dsR12x", files)).entries()
    assert "release" not in entry.fields


def test_a_folder_of_releases_is_one_source(tmp_path: Path) -> None:
    """Datasets one level below the root are listed together, sorted by id."""
    write_dataset(tmp_path / "R2", names(("A",), runs=()))
    write_dataset(tmp_path / "R1", names(("B",), runs=()))
    source = BidsSource(tmp_path)
    assert [(entry.id, entry.fields["release"]) for entry in source.entries()] == [
        ("sub-A_task-RestingState", "R2"),
        ("sub-B_task-RestingState", "R1"),
    ]


def test_the_same_recording_in_two_releases_is_an_error(tmp_path: Path) -> None:
    """Ids are unique over all releases; the message names both files."""
    for release in ("R1", "R2"):
        write_dataset(tmp_path / release, names(("A",), runs=()))
    with pytest.raises(
        InputError, match=r"R1.*_eeg\.bdf and .*R2.*_eeg\.bdf are both sub-A_task-RestingState"
    ):
        BidsSource(tmp_path).entries()


def test_filters_take_one_value_or_several(tmp_path: Path) -> None:
    """Filters narrow the listing together; runs compare as numbers."""
    write_dataset(tmp_path / "R1", names(("A", "B")))
    write_dataset(tmp_path / "R2", names(("C",)))
    assert len(ids(BidsSource(tmp_path))) == 9
    assert ids(BidsSource(tmp_path, tasks="RestingState", releases=["R1"], subjects=["A", "B"])) == [
        "sub-A_task-RestingState",
        "sub-B_task-RestingState",
    ]
    assert len(ids(BidsSource(tmp_path, runs=2))) == len(ids(BidsSource(tmp_path, runs=["02"]))) == 3
    assert ids(BidsSource(tmp_path, runs=(1, 2), subjects="C")) == [
        "sub-C_task-contrastChangeDetection_run-1",
        "sub-C_task-contrastChangeDetection_run-2",
    ]


def test_a_number_of_subjects_counts_those_left_by_the_filters(tmp_path: Path) -> None:
    """The first N are taken of subjects that have a recording of the task."""
    write_dataset(tmp_path, names(("A", "C"), runs=()) | names(("B", "D")))
    source = BidsSource(tmp_path, subjects=2, tasks="contrastChangeDetection", runs=1)
    assert [entry.fields["subject"] for entry in source.entries()] == ["B", "D"]


def test_mini_takes_twenty_subjects_of_each_release(tmp_path: Path) -> None:
    """The first 20 of each release, sorted, whatever the task."""
    for release, first in (("R1", 100), ("R2", 200)):
        write_dataset(tmp_path / release, names(tuple(str(n) for n in range(first, first + 22)), runs=()))
    subjects = {str(entry.fields["subject"]) for entry in BidsSource(tmp_path, mini=True).entries()}
    assert subjects == {str(n) for n in (*range(100, 120), *range(200, 220))}


def test_mini_takes_twenty_subjects_of_each_dataset_without_a_release(tmp_path: Path) -> None:
    """On the disk and in a listing alike."""
    listings = {}
    for dataset, first in (("ds1", 100), ("ds2", 200)):
        listings[dataset] = names(tuple(str(n) for n in range(first, first + 22)), runs=())
        write_dataset(tmp_path / dataset, listings[dataset])
    source = BidsSource(tmp_path, mini=True)
    subjects = {str(entry.fields["subject"]) for entry in source.entries()}
    assert subjects == {str(n) for n in (*range(100, 120), *range(200, 220))}
    listed = [of_one.filters["subjects"] for of_one in source.wanted(listings).values()]
    assert [set(labels) for labels in listed] == [
        {str(n) for n in range(first, first + 20)} for first in (100, 200)
    ]


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (
            {"tasks": "Resting"},
            r"no task 'Resting' among these recordings. Use one of: RestingState, contrast",
        ),
        ({"subjects": ["A", "Z"]}, r"no subject 'Z' among these recordings. Use one of: A, B"),
        ({"sessions": "1"}, r"no session '1' among these recordings. Leave this filter out"),
        ({"releases": "R9"}, r"no release 'R9'"),
        ({"datatype": "meg"}, r"no meg recording"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_error(tmp_path: Path, filters: Any, says: str) -> None:
    """A misspelt value is told with those that exist, not an empty listing."""
    source = BidsSource(write_dataset(tmp_path, names(("A", "B"))), **filters)
    with pytest.raises(InputError, match=says):
        source.entries()


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    """Without dataset_description.json here or one level below, there is nothing to read."""
    with pytest.raises(InputError, match=r"has dataset_description\.json"):
        BidsSource(tmp_path).entries()
    with pytest.raises(InputError, match="is no folder"):
        BidsSource(tmp_path / "missing").entries()


def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    """Unknown formats, missing companions and links to nowhere are refusals with a remedy."""
    folder = "sub-A/eeg/sub-A_task"
    files = {
        f"{folder}-{name}": None
        for name in ("a_eeg.cnt", "b_eeg.vhdr", "c_eeg.eeg", "d_eeg.json", "e_eeg.bdf", "h_eeg.bdf.gz")
    }
    root = write_dataset(tmp_path, files)
    (root / f"{folder}-f_eeg.bdf").symlink_to(root / ".git/annex/objects/absent")
    (root / f"{folder}-g_eeg.mff").mkdir()
    source = BidsSource(root)
    assert ids(source) == ["sub-A_task-e"]
    assert {refusal.id[-1]: refusal.detail.split(". ")[-1] for refusal in source.refusals()} == {
        "a": "Convert it to BDF, EDF or BrainVision.",
        "b": "Put both files into one folder.",
        "c": "Convert it to BDF, EDF or BrainVision.",
        "f": "Fetch it, for example with datalad get.",
        "g": "Convert it to BDF, EDF or BrainVision.",
        "h": "Unpack it.",
    }
    reasons = {refusal.id[-1]: refusal.reason for refusal in source.refusals()}
    assert reasons == dict.fromkeys("acgh", "format") | dict.fromkeys("bf", "files")


def test_of_two_formats_of_a_recording_one_is_taken(tmp_path: Path) -> None:
    """The first by name; each other file is refused under its own name, and so is a compressed copy."""
    ends = ("bdf", "bdf.gz", "edf", "vhdr", "eeg", "json")
    source = BidsSource(write_dataset(tmp_path, {f"sub-A/eeg/sub-A_task-x_eeg.{end}": None for end in ends}))
    (entry,) = source.entries()
    assert (entry.id, [file.path.name for file in entry.files]) == ("sub-A_task-x", ["sub-A_task-x_eeg.bdf"])
    found = {refusal.id.removeprefix("sub-A_task-x_eeg."): refusal for refusal in source.refusals()}
    assert {end: refusal.reason for end, refusal in found.items()} == {
        "bdf.gz": "format",
        "edf": "duplicate",
        "vhdr": "duplicate",
    }
    assert found["edf"].detail == (
        "sub-A_task-x_eeg.edf is the same recording as sub-A_task-x_eeg.bdf, which is taken. "
        "Remove one of them."
    )


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever task is asked for: it could be in there. A filter on subjects still leaves it out."""
    root = write_dataset(tmp_path, names(("A", "B"), runs=()))
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path == root / "sub-B" / "eeg":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = BidsSource(root, tasks="RestingState")
    assert ids(source) == ["sub-A_task-RestingState"]
    assert [(r.id, r.reason) for r in source.refusals()] == [("sub-B/eeg", "files")]
    assert BidsSource(root, subjects="A").refusals() == ()


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_subjects_is_at_least_one(number: int) -> None:
    """-1 is not all but one."""
    with pytest.raises(InputError, match=f"subjects={number} asks for no subject"):
        BidsSource(Path("x"), subjects=number)


def test_filters_given_as_lists_can_be_hashed() -> None:
    """A source is a value, whatever its filters were given as."""
    source = BidsSource(Path("x"), tasks=["a", "b"], runs=[1, 2])
    assert hash(source) == hash(BidsSource(Path("x"), tasks=("a", "b"), runs=(1, 2)))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (b"subject\tage\nsub-A\t9\n", "has no column participant_id, only subject, age"),
        (b"participant_id\tage\nsub-A\t9\nsub-A\t10\n", "two that differ for 'A'"),
        (b"participant_id\tage\nn/a\t9\n", "a row without a participant"),
        ("participant_id\tname\nsub-A\tJos\u00e9\n".encode("latin-1"), "is not UTF-8 .* Save it as UTF-8"),
    ],
)
def test_broken_participants_are_an_error(tmp_path: Path, table: bytes, says: str) -> None:
    """The table of all subjects is mended before anything is prepared."""
    root = write_dataset(tmp_path, names(("A",), runs=()))
    (root / "participants.tsv").write_bytes(table)
    with pytest.raises(InputError, match=says):
        BidsSource(root).entries()


def test_a_participant_may_be_repeated_word_for_word(tmp_path: Path) -> None:
    """Equal rows say one thing."""
    table = "participant_id\tage\nsub-A\t9\nsub-A\t9\n"
    (entry,) = BidsSource(write_dataset(tmp_path, names(("A",), ()) | {"participants.tsv": table})).entries()
    assert entry.fields["age"] == "9"


def test_participants_that_were_not_fetched_are_an_error(tmp_path: Path) -> None:
    """A link to nowhere is not a dataset without a table."""
    root = write_dataset(tmp_path, names(("A",), runs=()))
    (root / "participants.tsv").symlink_to(root / ".git/annex/objects/absent")
    with pytest.raises(InputError, match=r"participants\.tsv is a link to a file that is not here. Fetch it"):
        BidsSource(root).entries()


def test_data_of_another_recording_are_refused(tmp_path: Path, measured: Path) -> None:
    """A header in BIDS is held to its own files too."""
    folder = write_dataset(tmp_path) / "sub-A" / "eeg"
    folder.mkdir(parents=True)
    for end in ("vhdr", "vmrk", "dat"):
        for name in ("testbva", "sub-A_task-x_eeg"):
            shutil.copyfile(measured / f"eeg_formats/testbva.{end}", folder / f"{name}.{end}")
    source = BidsSource(tmp_path)
    (entry,) = source.entries()
    with pytest.raises(SourceError, match=r"names testbva\.dat, which is not sub-A_task-x_eeg\.dat"):
        source.open(entry)


def test_files_of_an_entry_are_signal_then_sidecars(tmp_path: Path) -> None:
    """The file to open comes first, sidecars last; size_bytes counts the signal alone."""
    stem = "sub-A/eeg/sub-A_task-x"
    ends = {"_eeg.set": "1234", "_eeg.fdt": "12", "_channels.tsv": "1", "_events.tsv": "1", "_eeg.json": "{}"}
    root = write_dataset(tmp_path, {stem + end: text for end, text in ends.items()})
    (entry,) = BidsSource(root).entries()
    names_found = [file.path.name.removeprefix("sub-A_task-x") for file in entry.files]
    assert names_found == ["_eeg.set", "_eeg.fdt", "_events.tsv", "_channels.tsv"]
    assert (entry.size_bytes, entry.resident_bytes) == (6, 0)
    (root / f"{stem}_eeg.fdt").unlink()
    (entry,) = BidsSource(root).entries()
    assert (entry.size_bytes, entry.resident_bytes) == (4, 16)


def test_a_large_listing_opens_only_participants(tmp_path: Path) -> None:
    """3,000 recordings are listed from names and sizes; no signal, no sidecar is opened."""
    folder = write_dataset(tmp_path, {"participants.tsv": "participant_id\tage\nsub-S0001\t9\n"})
    for subject in range(300):
        eeg = folder / f"sub-S{subject:04d}" / "eeg"
        eeg.mkdir(parents=True)
        for run in range(10):
            for end in ("eeg.bdf", "events.tsv", "channels.tsv", "eeg.json"):
                (eeg / f"sub-S{subject:04d}_task-x_run-{run}_{end}").touch()
    with opened_files() as opened:
        entries = BidsSource(tmp_path).entries()
    assert len(entries) == 3000
    assert [Path(name).name for name in opened if str(tmp_path) in name and Path(name).is_file()] == [
        "participants.tsv"
    ]


def opened(tmp_path: Path, write_bdf: Write, events: str, channels: str = "") -> RawRecording:
    """Open a recording of four channels with these tables beside it."""
    stem = "sub-A/eeg/sub-A_task-x"
    tables = {f"{stem}_events.tsv": events, f"{stem}_channels.tsv": channels}
    root = write_dataset(tmp_path, {name: text for name, text in tables.items() if text})
    write_bdf(root / f"{stem}_eeg.bdf")
    source = BidsSource(root)
    return source.open(source.entries()[0])


def test_events_have_all_columns_and_are_sorted(tmp_path: Path, write_bdf: Write) -> None:
    """Onset order, value as description without trial_type, n/a as None, no duration as 0."""
    with opened(tmp_path, write_bdf, "\ufeff" + EVENTS.replace("\n", "\r\n")) as recording:
        assert recording.events == Events(
            (1.5, 3.25, 4.0),
            (0.0, 0.0, 0.5),
            ("contrastTrial_start", "right_target", "right_buttonPress"),
            {"event_code": ("5", "9", "13"), "feedback": (None, None, "smiley_face")},
        )


def test_trial_type_goes_before_value(tmp_path: Path, write_bdf: Write) -> None:
    """Row by row: trial_type, else value, else "event"; value stays a column."""
    table = "onset\tduration\ttrial_type\tvalue\n1\t0\tgo\t7\n2\t0\tn/a\t8\n3\t0\tn/a\tn/a\n"
    with opened(tmp_path, write_bdf, table) as recording:
        assert recording.events.description == ("go", "8", "event")
        assert recording.events.extras == {"value": ("7", "8", None)}


def test_a_table_without_rows_is_no_events(tmp_path: Path, write_bdf: Write) -> None:
    """events.tsv goes before annotations even where it says that nothing happened."""
    with opened(tmp_path, write_bdf, "onset\tduration\n") as recording:
        assert len(recording.events) == 0


def test_events_without_an_onset_are_left_out_and_told(
    tmp_path: Path, write_bdf: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """A row whose onset is n/a has no place in time; the log names it."""
    with caplog.at_level(logging.WARNING, "engram.recordings"):
        recording = opened(tmp_path, write_bdf, "onset\tduration\n2\t0\nn/a\t0\nNaN\t0\n1\t0\n")
    assert recording.events.onset_s == (1.0, 2.0)
    assert "sub-A_task-x_events.tsv: 2 events without an onset are left out (rows [3, 4])" in caplog.text


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("onset\tduration\nsoon\t0\n", "has 'soon' in column onset"),
        ("onset\tduration\n1\tlong\n", "has 'long' in column duration"),
        ("onset\tduration\n1\tinf\n", "has 'inf' in column duration"),
        ("onset\tduration\n1\n", "has 1 cells in row 2 for 2 named columns"),
        ("onset\tonset\n1\t1\n", "has 2 cells in row 1 for 1 named columns"),
        ("time\tduration\n1\t0\n", "has no column onset, only time, duration"),
        ("\n", "is empty"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, write_bdf: Write, table: str, says: str) -> None:
    """A table that cannot be read row by row refuses its recording, with the row or value."""
    with pytest.raises(SourceError, match=says):
        opened(tmp_path, write_bdf, table)


def test_channels_table_sets_types_and_bad_channels(
    tmp_path: Path, write_bdf: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """TYPE becomes MNE's type as in MNE-BIDS, status becomes the bad mark, strangers are told."""
    rows = ("name type status", "E1 EEG bad", "E2 VEOG good", "E3 AUDIO n/a", "X EEG bad")
    table = "\n".join(rows).replace(" ", "\t")
    with (
        caplog.at_level(logging.WARNING, "engram.recordings"),
        opened(tmp_path, write_bdf, "", table) as recording,
    ):
        found = {s.name: [(c.name, c.unit, c.bad) for c in s.channels] for s in recording.signals}
    assert found == {
        "eeg": [("E1", "uV", True), ("E4", "uV", False)],
        "eog": [("E2", "uV", False)],
        "misc": [("E3", "AU", False)],
    }
    assert "1 of 4 channels are not in the recording: X" in caplog.text


def read_by_mne_bids(root: Path, entry: Entry) -> Any:
    """Read with the field's own library."""
    mne_bids = pytest.importorskip("mne_bids")
    entities = {
        key: str(entry.fields[key]) for key in ("subject", "session", "task", "run") if key in entry.fields
    }
    path = mne_bids.BIDSPath(root=root, datatype="eeg", **entities)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # MNE-BIDS warns of electrodes and files, which is not what is compared
        return mne_bids.read_raw_bids(path, verbose="ERROR")


def assert_equal_to_mne_bids(source: BidsSource) -> None:
    """Samples, types and events are those that MNE-BIDS gives."""
    for entry in source.entries():
        raw = read_by_mne_bids(source.root, entry)
        with source.open(entry) as recording:
            types = {channel.name: channel.type for s in recording.signals for channel in s.channels}
            assert types == dict(zip(raw.ch_names, raw.get_channel_types(), strict=True))
            eeg = recording.read("eeg", 0, raw.n_times)
            np.testing.assert_array_equal(eeg, raw.get_data("eeg", units="uV").T)
            np.testing.assert_array_equal(recording.events.onset_s, raw.annotations.onset - raw.first_time)
            np.testing.assert_array_equal(recording.events.duration_s, raw.annotations.duration)
            assert list(recording.events.description) == list(raw.annotations.description)


def test_the_measured_dataset_equals_mne_bids(measured: Path, tmp_path: Path) -> None:
    """A published BrainVision dataset reads as MNE-BIDS reads it."""
    shutil.copytree(
        measured / "tiny_bids", tmp_path / "tiny", copy_function=shutil.copyfile
    )  # MNE-BIDS locks files
    assert_equal_to_mne_bids(BidsSource(tmp_path / "tiny"))


def test_a_dataset_written_by_mne_bids_equals_mne_bids(tmp_path: Path) -> None:
    """What MNE-BIDS writes, with sessions and runs, reads as MNE-BIDS reads it."""
    mne_bids = pytest.importorskip("mne_bids")
    info = mne.create_info(["Fz", "Cz", "VEOG", "st"], 200.0, ["eeg", "eeg", "eog", "stim"])
    for run in ("01", "02"):
        data = np.random.default_rng(int(run)).normal(0, 1e-5, (4, 2000))
        raw = mne.io.RawArray(data, info, verbose="ERROR")
        raw.set_annotations(mne.Annotations([1.0, 2.5], [0.0, 0.5], ["go", "stop"]))
        path = mne_bids.BIDSPath("1", "a", "rest", run=run, root=tmp_path, datatype="eeg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the conversion to BrainVision is what we want
            mne_bids.write_raw_bids(raw, path, allow_preload=True, format="BrainVision", verbose="ERROR")
    source = BidsSource(tmp_path)
    assert ids(source) == ["sub-1_ses-a_task-rest_run-01", "sub-1_ses-a_task-rest_run-02"]
    assert_equal_to_mne_bids(source)


# -- known by a listing only -------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tasks": "RestingState"},
    {"runs": [2], "subjects": 3},
    {"subjects": ["B", "X"], "tasks": ["contrastChangeDetection", "RestingState"]},
    {"releases": "R2"},
    {"sessions": "1"},
    {"mini": True, "runs": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_wanted_of_a_listing_is_all_that_a_source_reads(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """A copy of the wanted files lists the same, refusals included, dataset by dataset; and no fewer do."""
    people = {"participants.tsv": "participant_id\tage\nsub-A\t9\n", "README": None, "raw.zip": None}
    sidecars = {
        f"{name.removesuffix('eeg.bdf')}{end}": None
        for name in names(("A", "B", "C"))
        for end in ("events.tsv", "channels.tsv", "eeg.json")
    }
    shared = {"sub-A/eeg/sub-A_coordsystem.json": None, "sub-B/eeg/sub-B_run-2_notes.tsv": None}
    others = {
        "sub-A/anat/sub-A_T1w.nii": None,
        "sub-A/eeg/._sub-A_task-RestingState_eeg.bdf": None,
        "sub-C/eeg/sub-C_task-RestingState_eeg.gdf": None,
        "sub-C/eeg/sub-C_task-x_eeg.set": None,
        "sub-C/ses-1/eeg/sub-C_ses-1_task-x_eeg.vhdr": None,
        "sub-C/ses-1/eeg/sub-C_ses-1_task-x_eeg.eeg": None,
        "sub-C/ses-1/eeg/sub-C_ses-1_task-x_eeg.vmrk": None,
        "sub-C/eeg/sub-C_task-x_eeg.mefd/a.segment": None,
    }
    files = {**people, **names(("A", "B", "C")), **sidecars, **shared, **others}
    write_dataset(tmp_path / "all" / "R1_L100", files)
    write_dataset(tmp_path / "all" / "R2_L100", {**people, **names(("X",)), **names(("Y",), runs=(1,))})
    source = BidsSource(tmp_path / "all", **options)
    listings = {
        root.name: {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}
        for root in sorted((tmp_path / "all").iterdir())
    }
    wanted = source.wanted(listings)
    entries: list[Entry] = []
    refusals: list[Refusal] = []
    for name, of_one in wanted.items():
        for path in of_one.files:
            copy = tmp_path / "wanted" / name / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "all" / name / path, copy)
        if of_one.files:
            alone = BidsSource(tmp_path / "wanted" / name, **of_one.filters)  # type: ignore[arg-type]
            assert {e.id for e in alone.entries()} | {r.id for r in alone.refusals()} == of_one.ids
            entries += alone.entries()
            refusals += alone.refusals()

    assert [told(entry) for entry in sorted(entries, key=lambda e: e.id)] == list(map(told, source.entries()))
    assert sorted(refusals, key=lambda r: r.id) == list(source.refusals())
    fetched = {path for of_one in wanted.values() for path in of_one.files}
    assert not fetched & {"README", "raw.zip", "sub-A/anat/sub-A_T1w.nii"}
    labels = {path.split("/")[0] for path in fetched if path.startswith("sub-")}
    assert labels == {f"sub-{each.fields['subject']}" for each in entries} | {
        f"sub-{each.id.split('_')[0].removeprefix('sub-')}" for each in refusals
    }


def told(entry: Entry) -> tuple[object, ...]:
    """What an entry says, but for where its folder lies."""
    return entry.id, dict(entry.fields), [(file.path.name, file.size_bytes) for file in entry.files]


def test_a_listing_without_recordings_is_an_error(tmp_path: Path) -> None:
    """As a folder without recordings is."""
    with pytest.raises(InputError, match="There is no eeg recording in R1, R2"):
        BidsSource(tmp_path).wanted({"R1": {"README": 1}, "R2": {"sub-A/anat/sub-A_T1w.nii": 1}})


def test_the_same_recording_in_two_listings_is_an_error(tmp_path: Path) -> None:
    """As in two folders; a filter may leave one of them out."""
    listings = {"a": [*names(("A",), ())], "b": [*names(("A",))]}
    with pytest.raises(InputError, match=r"^a.*_eeg\.bdf and b.*_eeg\.bdf are both sub-A_task-RestingState"):
        BidsSource(tmp_path).wanted(listings)
    wanted = BidsSource(tmp_path, tasks="contrastChangeDetection").wanted(listings)
    assert [len(of_one.files) for of_one in wanted.values()] == [0, 2]


def test_an_object_named_as_a_folder_of_recordings_is_left_alone(tmp_path: Path) -> None:
    """As some tools mark folders; and a file that is still being written is not wanted."""
    recording = "sub-1/eeg/sub-1_task-x_eeg.bdf"
    paths = ["sub-1/eeg", recording, f"{recording}.tmp", "sub-1"]
    (wanted,) = BidsSource(tmp_path).wanted({"R1": paths}).values()
    assert wanted.files == (recording,)
