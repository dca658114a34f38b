"""Recordings in loose files and in folders of them.

This module decides which files are recordings and what they are called. How the signal is
read is left to ``mne_raw.py``; a folder in BIDS order is better read by ``bids.py``, which
knows subjects and events.tsv.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from engram.errors import InputError, SourceError
from engram.recordings.mne_raw import (
    FORMATS,
    Folder,
    RawRecording,
    beside,
    first_part,
    format_of,
    format_problem,
    make_entry,
    open_entry,
    unpacked,
)
from engram.recordings.recording import Entry, Refusal

__all__ = ["FileSource"]

_UNREAD = (".cnt", ".ds", ".gdf", ".mefd", ".mff", ".nwb", ".nxe", ".xdf")
"""Ends of recordings in formats that are not read here: refused rather than overlooked, as compressed
recordings are."""

_PARTS = {".dat": ".vhdr", ".eeg": ".vhdr", ".fdt": ".set", ".vmrk": ".vhdr"}
"""Files that hold a part of a recording, and the file beside it that opens it."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """Recordings in files, and in folders with everything below them.

    A recording in a folder is named by its path from that folder, a file given by itself by
    its name. The suffix is kept: a file that comes later renames no other. Files of other
    kinds are passed over, and folders that lead back to a folder above them.

    Raises
    ------
    InputError
        On listing: if a path does not exist or may not be listed, two recordings have the same
        id, or there is no recording at all.

    Examples
    --------
    >>> FileSource([Path("pilot.bdf"), Path("patients")]).paths[0].suffix
    '.bdf'
    """

    paths: str | Path | Sequence[str | Path]
    """One file or folder, or several; held as a tuple of absolute paths."""

    def __post_init__(self) -> None:
        paths = [self.paths] if isinstance(self.paths, str | Path) else self.paths
        # Absolute, since a job may run in a process that was started in another folder.
        object.__setattr__(self, "paths", tuple(Path(path).absolute() for path in paths))

    def entries(self) -> tuple[Entry, ...]:
        """List the recordings, sorted by id, without opening a file."""
        return self._listing()[0]

    def refusals(self) -> tuple[Refusal, ...]:
        """List files of known recording formats that cannot be used."""
        return self._listing()[1]

    def open(self, entry: Entry) -> RawRecording:
        """Open a recording; its events are its annotations.

        Raises
        ------
        SourceError
            If it cannot be read.
        """
        return RawRecording(open_entry(entry))

    def _listing(self) -> tuple[tuple[Entry, ...], tuple[Refusal, ...]]:
        assert isinstance(self.paths, tuple), "made one when the source was"
        entries: dict[str, Entry] = {}
        refusals: list[Refusal] = []
        for item in (item for path in self.paths for item in _search(Path(path))):
            if isinstance(item, Refusal):
                refusals.append(item)
                continue
            other = entries.setdefault(item.id, item)
            if other is not item:
                raise InputError(
                    f"{other.files[0].path} and {item.files[0].path} would both be called {item.id!r}. "
                    "Rename one of them, or leave it out."
                )
        if not entries and not refusals:
            raise InputError(
                f"There is no recording in {', '.join(map(str, self.paths))}. "
                f"Name files ending in {', '.join(sorted(FORMATS))}, or folders with such files."
            )
        return tuple(entries[name] for name in sorted(entries)), tuple(sorted(refusals, key=lambda r: r.id))


def _search(path: Path) -> Iterator[Entry | Refusal]:
    if not path.exists():
        raise InputError(f"{path} does not exist. Correct the path.")
    is_folder = path.is_dir() and not path.name.lower().endswith(_UNREAD)
    try:
        folder = Folder.at(path if is_folder else path.parent)
    except SourceError as error:
        raise InputError(str(error)) from error
    if is_folder:
        yield from _in_folder(folder, PurePath(), (path.resolve(),))
        return
    item = _look_at(path.name, folder, PurePath(path.name))
    if item is None:
        raise InputError(
            f"{path} does not open a recording. Name a file ending in {', '.join(sorted(FORMATS))}, "
            "and of a recording in parts the first."
        )
    yield item


def _in_folder(folder: Folder, place: PurePath, above: tuple[Path, ...]) -> Iterator[Entry | Refusal]:
    for name in (*folder.sizes, *folder.folders):
        item = _look_at(name, folder, place / name)
        if item is not None:
            yield item
        elif name in folder.folders and (target := (folder.path / name).resolve()) not in above:
            try:
                inner = Folder.at(folder.path / name)
            except SourceError as error:
                yield Refusal((place / name).as_posix(), "files", str(error))
                continue
            yield from _in_folder(inner, place / name, (*above, target))


def _look_at(name: str, folder: Folder, place: PurePath) -> Entry | Refusal | None:
    """Tell what a name is: a recording, one that cannot be used, or none of its own."""
    suffix = PurePath(name).suffix.lower()
    stem, inner = PurePath(name).stem, unpacked(name)
    if inner.lower().endswith(_UNREAD) or (inner != name and format_of(inner)):
        return Refusal(place.as_posix(), "format", format_problem(name))
    # .dat can be anything
    if suffix in _PARTS and suffix != ".dat" and not beside(stem, _PARTS[suffix], folder.sizes):
        problem = f"{name} holds a part of a recording without its {stem}{_PARTS[suffix]}. "
        return Refusal(place.as_posix(), "files", f"{problem}Put both into one folder.")
    if format_of(name) is None or name in folder.folders or first_part(name) in folder.sizes:
        return None
    try:
        return make_entry(place.as_posix(), folder, name, {})
    except SourceError as error:
        return Refusal(place.as_posix(), "files", str(error))
