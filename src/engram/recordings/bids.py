"""Recordings of a BIDS dataset, or of a folder of them (one per release).

This module decides what a BIDS folder says about a recording: its entities, the columns of
participants.tsv, its release, its events and the types of its channels. Listing reads
folders and participants.tsv only. How the signal is read is left to ``mne_raw.py``.

It reads the sidecars that lie beside a recording under the same entities; it does not
inherit events.tsv or channels.tsv from a folder above, and leaves electrodes.tsv alone,
whose coordinates are in one of many frames.

References
----------
https://bids-specification.readthedocs.io/en/stable/modality-specific-files/electroencephalography.html
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from engram.errors import InputError, SourceError
from engram.recordings.mne_raw import (
    Folder,
    RawRecording,
    first_part,
    format_of,
    format_problem,
    make_entry,
    open_entry,
    unpacked,
)
from engram.recordings.recording import Entry, Events, Field, Refusal

if TYPE_CHECKING:
    from mne.io import BaseRaw

__all__ = ["BidsSource", "Wanted", "release_in"]

_LOG = logging.getLogger(__name__)

N_MINI = 20
"""Subjects per release of ``mini``, as many as the mini releases of HBN-EEG hold."""

_ENTITY_NAMES = {"sub": "subject", "ses": "session"}
"""Entities whose field has a longer name; the others are named as in the file."""

_RELEASE = re.compile(r"(?:^|[_-])R([0-9]+)(?:[_-]|$)")
"""Folder names such as R5, R5_L100_bdf, R5_mini_L100_bdf and cmi_bids_R5."""

_RELEASE_NUMBER = re.compile(
    r"\s*(?:HBN[-_ ]?)?(?:R|Release)?[-_ ]*0?([0-9]{1,2})(?:\.0)?(?:_mini)?\s*", re.IGNORECASE
)
"""Spellings of a release in ``release_number``: R5, r5, R05, 5, 5.0, Release 5, HBN-R5, R5_mini; no date."""

_SIDECARS = ("_events.tsv", "_channels.tsv")
_DESCRIPTIONS = (".json", ".tsv")

_MNE_TYPES = {
    "EEG": "eeg",
    "EOG": "eog",
    "VEOG": "eog",
    "HEOG": "eog",
    "ECG": "ecg",
    "EMG": "emg",
    "ECOG": "ecog",
    "SEEG": "seeg",
    "DBS": "dbs",
    "TRIG": "stim",
    "RESP": "resp",
    "GSR": "gsr",
    "TEMP": "temperature",
    "EYEGAZE": "eyegaze",
    "PUPIL": "pupil",
}
"""MNE's type for BIDS's, as MNE-BIDS 0.19 maps them; all others become ``misc``."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a source would read of one dataset."""

    ids: frozenset[str]
    """Its recordings, also those that would be refused."""
    files: tuple[str, ...]
    """Paths below the dataset's folder, sorted: the recordings, what describes them, and the
    tables and JSON files at the top. None where the filters leave no recording."""
    filters: Mapping[str, tuple[str, ...]]
    """Options of ``BidsSource`` that choose the same recordings in this dataset alone."""


@dataclass(frozen=True, slots=True)
class BidsSource:
    """EEG (or iEEG, or MEG) recordings of one BIDS dataset, or of several in one folder.

    Every filter takes one value or several, without the entity's prefix ("rest", not
    "task-rest"); None takes all.

    Raises
    ------
    InputError
        If fewer than one subject is asked for. On listing: if there is no dataset here, a filter
        names what is not there, or recordings in two folders have the same entities.

    Examples
    --------
    >>> source = BidsSource(Path("HBN"), tasks="contrastChangeDetection", releases=["R1", "R2"])
    >>> source.releases
    ('R1', 'R2')
    """

    root: Path
    """The folder with dataset_description.json, or the folder above several of those."""
    subjects: int | str | Sequence[str] | None = None
    """Labels; or how many of the sorted subjects that have a recording left by the other filters."""
    sessions: str | Sequence[str] | None = None
    """Labels of sessions."""
    tasks: str | Sequence[str] | None = None
    """Labels of tasks."""
    runs: int | str | Sequence[int | str] | None = None
    """Numbers of runs; 1 and "01" are the same."""
    releases: str | Sequence[str] | None = None
    """Names of releases, such as "R5"."""
    datatype: str = "eeg"
    """Folder and suffix of the recordings: "eeg", "ieeg" or "meg"."""
    mini: bool = False
    """Only the first 20 subjects of each release (of each dataset that tells none), in sorted
    order, for a first try.

    These are not the 20 of HBN-EEG's own mini releases; to get those, take the mini folders.
    """

    def __post_init__(self) -> None:
        if isinstance(self.subjects, int) and self.subjects < 1:
            raise InputError(f"subjects={self.subjects} asks for no subject. Ask for 1 or more, or for None.")
        # Absolute, since a job may run in a process that was started in another folder.
        object.__setattr__(self, "root", Path(self.root).absolute())
        for name in ("subjects", "sessions", "tasks", "runs", "releases"):
            values = getattr(self, name)
            if values is not None and not isinstance(values, int | str):
                object.__setattr__(self, name, tuple(values))  # a list could not be hashed

    def entries(self) -> tuple[Entry, ...]:
        """List the recordings, sorted by id, without opening a signal file or a sidecar."""
        return self._listing().entries

    def refusals(self) -> tuple[Refusal, ...]:
        """List recordings of unknown formats, without all their files, in two formats or of two releases."""
        return self._listing().refusals

    def open(self, entry: Entry) -> RawRecording:
        """Open a recording, with types and bad channels from channels.tsv and events from events.tsv.

        Rows of events.tsv whose onset is n/a are left out with a line in the log.

        Raises
        ------
        SourceError
            If the signal, or a table beside it, cannot be read.
        """
        raw = open_entry(entry)
        tables = {file.path.name.rpartition("_")[2]: file.path for file in entry.files[1:]}
        if "channels.tsv" in tables:
            _apply_channels(raw, tables["channels.tsv"])
        events = _read_events(tables["events.tsv"]) if "events.tsv" in tables else None
        return RawRecording(raw, events)

    def _listing(self) -> _Listing:
        found = {root.name: list(_walk(root, self.datatype)) for root in _roots(self.root)}
        if not any(found.values()):
            raise InputError(
                f"There is no {self.datatype} recording in {self.root}. Name a dataset with sub-* folders."
            )
        return _sorted(self._chosen(found))

    def _chosen(self, datasets: Mapping[str, Sequence[_Found]]) -> list[_Found]:
        found = [each for of_one in datasets.values() for each in of_one]
        if self.mini:
            found = _of_first_subjects(datasets, N_MINI)
        for name, wanted in self._filters().items():
            found = _matching(found, name, wanted)
        if isinstance(self.subjects, int):
            labels = sorted({str(each.fields["subject"]) for each in found})
            found = _matching(found, "subject", set(labels[: self.subjects]))
        return found

    def wanted(self, datasets: Mapping[str, Collection[str]]) -> dict[str, Wanted]:
        """Choose what this source would read of datasets that are known by a listing only.

        Parameters
        ----------
        datasets
            Name of a dataset's folder -> path of each file below it. They stand for all that
            ``root`` would hold; nothing on the disk is looked at.

        Returns
        -------
        dict of Wanted
            One for each dataset, in the same order.

        Raises
        ------
        InputError
            If there is no recording, a filter names what none of the datasets has, or recordings in
            two of them have the same entities.
        """
        datasets = {  # hidden files are left out, as on the disk, and so is what is still being written
            name: [path for path in paths if "/." not in f"/{path}" and not path.endswith(".tmp")]
            for name, paths in datasets.items()
        }
        found = {name: _listed(name, paths, self.datatype) for name, paths in datasets.items()}
        if not any(found.values()):
            raise InputError(
                f"There is no {self.datatype} recording in {', '.join(datasets)}. "
                "Name a dataset with sub-* folders."
            )
        left = self._chosen(found)
        _sorted(left)  # no two are the same recording
        chosen = {id(each) for each in left}
        return {
            name: self._wanted([each for each in found[name] if id(each) in chosen], paths)
            for name, paths in datasets.items()
        }

    def _wanted(self, found: Sequence[_Found], paths: Collection[str]) -> Wanted:
        files = [path for path in paths if "/" not in path and path.endswith(_DESCRIPTIONS)]
        files += _files_of(found, paths, self.datatype)
        labels = {
            name: sorted({_comparable(name, each.fields.get(name, "")) for each in found})
            for name in ("subject", *self._filters())
        }
        filters = {f"{name}s": tuple(values) for name, values in labels.items()}
        return Wanted(
            frozenset(each.item.id for each in found), tuple(sorted(files)) if found else (), filters
        )

    def _filters(self) -> dict[str, set[str]]:
        given = {
            "release": self.releases,
            "subject": None if isinstance(self.subjects, int) else self.subjects,
            "session": self.sessions,
            "task": self.tasks,
            "run": self.runs,
        }
        return {
            name: {_comparable(name, value) for value in _several(values)}
            for name, values in given.items()
            if values is not None
        }


@dataclass(frozen=True, slots=True)
class _Found:
    """One recording in the folder, usable or not, with the fields to filter by."""

    fields: Mapping[str, Field]
    item: Entry | Refusal
    is_folder: bool = False
    """True for a folder that may not be listed: it may hold what a filter asks for."""


@dataclass(frozen=True, slots=True)
class _Listing:
    entries: tuple[Entry, ...]
    refusals: tuple[Refusal, ...]


def _sorted(found: Sequence[_Found]) -> _Listing:
    entries: dict[str, Entry] = {}
    for entry in sorted((each.item for each in found if isinstance(each.item, Entry)), key=lambda e: e.id):
        other = entries.setdefault(entry.id, entry)
        if other is not entry:
            raise InputError(
                f"{other.files[0].path} and {entry.files[0].path} are both {entry.id}. Leave one of them out."
            )
    refusals = [each.item for each in found if isinstance(each.item, Refusal)]
    return _Listing(tuple(entries.values()), tuple(sorted(refusals, key=lambda r: r.id)))


def _several(values: int | str | Sequence[int | str]) -> Sequence[int | str]:
    return [values] if isinstance(values, int | str) else values


def _comparable(name: str, value: Field) -> str:
    text = str(value)
    return str(int(text)) if name == "run" and text.isdecimal() else text


def _matching(found: Sequence[_Found], name: str, wanted: set[str]) -> list[_Found]:
    labels = [_comparable(name, each.fields.get(name, "")) for each in found]
    if missing := sorted(wanted - set(labels)):
        there = ", ".join(sorted(set(labels) - {""})[:20])
        raise InputError(
            f"There is no {name} {missing[0]!r} among these recordings. "
            f"{f'Use one of: {there}' if there else 'Leave this filter out'}."
        )
    return [
        each
        for each, label in zip(found, labels, strict=True)
        if label in wanted or (each.is_folder and not label)
    ]


def _of_first_subjects(datasets: Mapping[str, Sequence[_Found]], n_subjects: int) -> list[_Found]:
    """Take the first subjects of each release, and of each dataset that tells none."""
    grouped: dict[Field, dict[str, list[_Found]]] = {}
    for name, found in datasets.items():
        for each in found:
            subjects = grouped.setdefault(each.fields.get("release", name), {})
            subjects.setdefault(str(each.fields["subject"]), []).append(each)
    return [
        each
        for subjects in grouped.values()
        for label in sorted(subjects)[:n_subjects]
        for each in subjects[label]
    ]


# -- listing -----------------------------------------------------------------------------


def _roots(root: Path) -> list[Path]:
    """Find the datasets: this folder, or the folders in it."""
    if not root.is_dir():
        raise InputError(f"{root} is no folder. Name a folder with dataset_description.json.")
    if (root / "dataset_description.json").is_file():
        return [root]
    names = _top(root).folders
    roots = [root / name for name in names if (root / name / "dataset_description.json").is_file()]
    if not roots:
        raise InputError(
            f"Neither {root} nor a folder in it has dataset_description.json. Name the root of a dataset."
        )
    return roots


def _top(root: Path) -> Folder:
    try:
        return Folder.at(root)
    except SourceError as error:
        raise InputError(str(error)) from error


def _walk(root: Path, datatype: str) -> Iterator[_Found]:
    people = _read_participants(root / "participants.tsv")
    release = _release_of(root)
    for subject in _top(root).folders:
        if subject.startswith("sub-"):
            columns = {**release, **people.get(subject.removeprefix("sub-"), {})}
            found = _in_folder(root, PurePath(subject), datatype, columns)
            is_of_two = bool(release) and columns["release"] != release["release"]
            yield from _of_two_releases(found, release) if is_of_two else found


def _of_two_releases(found: Iterator[_Found], release: Mapping[str, Field]) -> Iterator[_Found]:
    """Refuse the recordings of a subject whom the table gives another release than the folder's name."""
    for each in found:
        says = f"participants.tsv says {each.fields['release']}, the folder's name {release['release']}"
        refusal = Refusal(each.item.id, "release", f"{says}. Mend the table, or rename the folder.")
        item = refusal if isinstance(each.item, Entry) else each.item
        yield replace(each, fields={**each.fields, **release}, item=item)


def _in_folder(root: Path, place: PurePath, datatype: str, columns: Mapping[str, Field]) -> Iterator[_Found]:
    """Look into the folder of a subject, a session or a datatype."""
    try:
        folder = Folder.at(root / place)
    except SourceError as error:
        fields = {**columns, **_entity_fields("_".join(place.parts))}
        yield _Found(fields, Refusal(place.as_posix(), "files", str(error)), is_folder=True)
        return
    if place.name == datatype:
        yield from _recordings(folder, columns)
        return
    for name in folder.folders:
        if name == datatype or name.startswith("ses-"):
            yield from _in_folder(root, place / name, datatype, columns)


def _recordings(folder: Folder, columns: Mapping[str, Field]) -> Iterator[_Found]:
    heads = _heads(folder)
    n_of = Counter(heads.values())
    taken: dict[str, str] = {}
    for name, recording_id in heads.items():
        fields = {**columns, **_entity_fields(recording_id)}
        sidecars = [recording_id + end for end in _SIDECARS if recording_id + end in folder.sizes]
        refused_id = recording_id if n_of[recording_id] == 1 else name
        try:
            if format_of(name) is None or name in folder.folders:
                item: Entry | Refusal = Refusal(refused_id, "format", format_problem(name))
            elif recording_id in taken:
                problem = f"{name} is the same recording as {taken[recording_id]}, which is taken."
                item = Refusal(refused_id, "duplicate", f"{problem} Remove one of them.")
            else:
                item = make_entry(recording_id, folder, name, fields, sidecars)
                taken[recording_id] = name
        except SourceError as error:
            item = Refusal(refused_id, "files", str(error))
        yield _Found(fields, item)


def _listed(name: str, paths: Collection[str], datatype: str) -> list[_Found]:
    """Find the recordings of a dataset that is known by a listing only."""
    release = release_in(name)
    columns = {"release": release} if release else {}
    folders = _listed_folders(Path(name), paths, datatype)
    return [each for folder in folders for each in _recordings(folder, columns)]


def _listed_folders(root: Path, paths: Collection[str], datatype: str) -> Iterator[Folder]:
    """Give the folders of recordings as if they were on the disk, with files of no bytes."""
    inside: dict[Path, list[str]] = {}
    for path in sorted(paths):
        if place := _recording_place(path, datatype):
            inside.setdefault(place, []).append(Path(path).relative_to(place).as_posix())
    for place, names in inside.items():
        folders = {name.partition("/")[0] for name in names if "/" in name}
        files = dict.fromkeys((name for name in names if "/" not in name), 0)
        yield Folder(root / place, files, tuple(sorted(folders)))


def _recording_place(path: str, datatype: str) -> Path | None:
    """Name the folder of recordings that a listed file lies in."""
    subject, *below = Path(path).parent.parts or ("",)
    n_parts = 3 if below and below[0].startswith("ses-") else 2
    parts = (subject, *below)[:n_parts]
    return Path(*parts) if subject.startswith("sub-") and parts[-1] == datatype else None


def _files_of(found: Sequence[_Found], paths: Collection[str], datatype: str) -> Iterator[str]:
    """Choose of a listing the files of these recordings, and those that describe one."""
    recordings: dict[Field, list[dict[str, Field]]] = {}
    for each in found:
        entities = {name: value for name, value in each.fields.items() if name != "release"}
        recordings.setdefault(entities.get("subject", ""), []).append(entities)
    for path in paths:
        if place := _recording_place(path, datatype):
            name = Path(path).relative_to(place).parts[0]
            own = _entity_fields(_entities_text(name, f"_{datatype}"))
            others = recordings.get(own.get("subject", ""), [])
            # What describes several recordings of a folder leaves out the entities in which they differ.
            is_shared = path.endswith(_DESCRIPTIONS)
            if any(own == other or (is_shared and own.items() <= other.items()) for other in others):
                yield path


def _heads(folder: Folder) -> dict[str, str]:
    """Find the files and folders that open a recording, or should, with the recording's id."""
    suffix = f"_{folder.path.name}"
    names = (*folder.sizes, *folder.folders)
    ids = {name: _entities_text(name, suffix) for name in names if _stem(name).endswith(suffix)}
    usable = {ids[name] for name in ids if format_of(name)}
    return {
        name: recording_id
        for name, recording_id in ids.items()
        if (format_of(unpacked(name)) or recording_id not in usable)
        and first_part(name) not in folder.sizes
        and not unpacked(name).endswith((".json", ".tsv"))
    }


def _stem(name: str) -> str:
    return PurePath(unpacked(name)).stem


def _entities_text(name: str, suffix: str) -> str:
    return re.sub(r"_split-[0-9]+(?=_|$)", "", _stem(name).removesuffix(suffix))


def _entity_fields(recording_id: str) -> dict[str, Field]:
    pairs = [part.partition("-") for part in recording_id.split("_")]
    return {_ENTITY_NAMES.get(key, key): value for key, dash, value in pairs if dash}


def _release_of(root: Path) -> dict[str, Field]:
    """Read the release off the folder's name, or the name of the folder above."""
    place = root.resolve()
    release = release_in(place.name) or release_in(place.parent.name)
    return {"release": release} if release else {}


def release_in(name: str) -> str | None:
    """Read the release off a folder's name.

    Examples
    --------
    >>> release_in("R5_mini_L100_bdf"), release_in("cmi_bids_R5"), release_in("ds005505")
    ('R5', 'R5', None)
    """
    match = _RELEASE.search(name)
    return f"R{int(match[1])}" if match else None


def _release_numbered(text: str) -> str:
    """Name the release that ``release_number`` tells; text without its number stays as it is.

    Examples
    --------
    >>> [_release_numbered(text) for text in ("R5", "r05", "5", "Release 5", "2017-05-01")]
    ['R5', 'R5', 'R5', 'R5', '2017-05-01']
    """
    match = _RELEASE_NUMBER.fullmatch(text)
    return f"R{int(match[1])}" if match else text


def _read_participants(path: Path) -> dict[str, dict[str, Field]]:
    """Read participants.tsv: all columns as text, n/a left out, release_number also named as release."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a link to a file that is not here. Fetch it, for example with datalad get."
        )
    if not path.is_file():
        return {}
    try:
        table = _read_table(path)
    except SourceError as error:
        raise InputError(str(error)) from error
    if "participant_id" not in table:
        raise InputError(
            f"{path} has no column participant_id, only {', '.join(table)}. Name the column of subjects so."
        )
    people: dict[str, dict[str, Field]] = {}
    for row in _rows(table):
        label = (row.pop("participant_id") or "").removeprefix("sub-")
        fields: dict[str, Field] = {name: value for name, value in row.items() if value is not None}
        if told := fields.get("release_number", fields.get("release")):
            fields["release"] = _release_numbered(str(told))
        if not label or people.setdefault(label, fields) != fields:
            raise InputError(
                f"{path} has a row without a participant, or two that differ for {label!r}. "
                "Give each participant one row."
            )
    return people


# -- tables ------------------------------------------------------------------------------

_Table = dict[str, list[str | None]]


def _read_table(path: Path) -> _Table:
    """Read a BIDS table as columns of text; ``n/a`` and empty cells are None.

    BIDS tables are UTF-8, separated by tabs, without quotes; some begin with a byte order mark.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read ({type(error).__name__}). Fetch it again.") from error
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()]
    names = rows[0] if rows else []
    for number, row in enumerate(rows, 1):
        if len(row) != len(names) or len(set(names)) != len(names):
            raise SourceError(
                f"{path.name} has {len(row)} cells in row {number} for {len(set(names))} named columns. "
                "Mend the table, or fetch it again."
            )
    if not names:
        raise SourceError(f"{path.name} is empty, without even the names of its columns. Fetch it again.")
    return {
        name: [None if row[i] in {"n/a", ""} else row[i] for row in rows[1:]] for i, name in enumerate(names)
    }


def _rows(table: _Table) -> list[dict[str, str | None]]:
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def _read_events(path: Path) -> Events:
    """Read events.tsv with all its columns, sorted by onset.

    The description is ``trial_type``, where that is n/a ``value``, where both are ``event``.
    """
    table = _read_table(path)
    if "onset" not in table:
        raise SourceError(f"{path.name} has no column onset, only {', '.join(table)}. Mend the table.")
    onsets = [_seconds(text, "onset", path) for text in table["onset"]]
    if missing := [number for number, onset in enumerate(onsets, 2) if onset is None]:
        _LOG.warning(
            "%s: %d events without an onset are left out (rows %s)", path.name, len(missing), missing
        )
    placed = sorted((onset, row) for row, onset in enumerate(onsets) if onset is not None)
    order = [row for _, row in placed]
    nothing: list[str | None] = [None] * len(onsets)
    kinds, values = table.get("trial_type", nothing), table.get("value", nothing)
    durations = table.get("duration", nothing)
    shown = {"onset", "duration", "trial_type" if "trial_type" in table else "value"}
    return Events(
        onset_s=tuple(onset for onset, _ in placed),
        duration_s=tuple(_seconds(durations[row], "duration", path) or 0.0 for row in order),
        description=tuple(kinds[row] or values[row] or "event" for row in order),
        extras={
            name: tuple(column[row] for row in order) for name, column in table.items() if name not in shown
        },
    )


def _seconds(text: str | None, column: str, path: Path) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise SourceError(
            f"{path.name} has {text!r} in column {column}, which is no number. Mend the table."
        ) from None
    if math.isinf(seconds):
        raise SourceError(f"{path.name} has {text!r} in column {column}. Mend the table.")
    return None if math.isnan(seconds) else seconds


def _apply_channels(raw: BaseRaw, path: Path) -> None:
    """Set types and bad channels as channels.tsv says; MEG types, finer than BIDS's, stay MNE's."""
    table = _read_table(path)
    if "name" not in table:
        raise SourceError(f"{path.name} has no column name, only {', '.join(table)}. Mend the table.")
    names = table["name"]
    if unknown := sorted({str(name) for name in names} - set(raw.ch_names)):
        _LOG.warning(
            "%s: %d of %d channels are not in the recording: %s",
            path.name,
            len(unknown),
            len(names),
            ", ".join(unknown[:10]),
        )
    rows = [row for row in _rows(table) if row["name"] in raw.ch_names]
    types = {
        row["name"]: _MNE_TYPES.get(kind, "misc")
        for row in rows
        if (kind := (row.get("type") or "").upper()) and not kind.startswith(("MEG", "HLU"))
    }
    raw.set_channel_types(types, on_unit_change="ignore", verbose="ERROR")
    if "status" in table:
        raw.info["bads"] = [row["name"] for row in rows if row["status"] == "bad"]
