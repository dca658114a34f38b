"""Fingerprints: what a stored recording was made of, so that nothing is done twice or kept stale.

A fingerprint has three parts, so that a difference has a name: the bytes of the source's
files, its descriptive fields, and the steps with the precision. It holds no path, time
or host: the same corpus copied elsewhere has the same fingerprints.

To know that gigabytes of files have not changed, Git's way is taken: a note beside each
checksum of the file's size, inode and times of change. While these are the same, the file
is not read again. The notes are kept per store in the user's cache folder, never in the
store; deleting them costs one reading of the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram.errors import SourceError
from engram.recordings.recording import Entry, Source
from engram.store.crc import crc32c, file_crc32c

__all__ = ["FileNotes", "Fingerprint", "fingerprint", "steps_hash"]

logger = logging.getLogger("engram")

PREPARE_VERSION = 1
"""Raised when the same source and steps would give other samples than before."""

_READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a recording in a store was made of.

    Examples
    --------
    >>> old, new = Fingerprint("aa", "bb", "cc"), Fingerprint("aa", "bb", "dd")
    >>> str(old), Fingerprint.parse(str(old)) == old, new.difference(old)
    ('aa-bb-cc', True, 'steps or precision changed')
    """

    files: str
    """Hash of names, sizes and CRC32C of the files, or of the samples where there are none."""
    fields: str
    """Hash of the descriptive fields."""
    steps: str
    """Hash of steps, precision and ``PREPARE_VERSION``."""

    def __str__(self) -> str:
        return f"{self.files}-{self.fields}-{self.steps}"

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Read what ``str`` wrote."""
        return cls(*text.split("-"))

    def difference(self, old: Fingerprint) -> str:
        """Say in words what is not as it was; empty if nothing."""
        changes = {
            "its files changed": self.files != old.files,
            "its descriptive fields changed": self.fields != old.fields,
            "steps or precision changed": self.steps != old.steps,
        }
        return ", ".join(reason for reason, is_so in changes.items() if is_so)


@dataclass(slots=True)
class FileNotes:
    """CRC32C of files, remembered for as long as a file's size, inode and times are the same."""

    notes: dict[str, list[int]] = field(default_factory=dict)
    """Absolute path -> size, mtime_ns, ctime_ns, inode, CRC32C."""

    def crc32c(self, path: Path) -> int:
        """Give the CRC32C of a file, reading it only if it is new or changed."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        note = self.notes.get(str(path.absolute()))
        if note is None or note[:4] != state:
            note = [*state, file_crc32c(path)]
            self.notes[str(path.absolute())] = note
        return note[4]

    @classmethod
    def load(cls, store: Path) -> FileNotes:
        """Load the notes on the sources of a store; none if there are none yet."""
        try:
            notes = json.loads(_notes_path(store).read_text())
        except (OSError, ValueError, RuntimeError):
            notes = {}  # none yet, not to be read, or no home: the files are then read again
        return cls(notes if isinstance(notes, dict) else {})

    def save(self, store: Path) -> None:
        """Save the notes in the user's cache folder, if it can be written."""
        try:
            path = _notes_path(store)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.notes))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            # The store is complete without them: the next call reads the source's files once more.
            logger.warning("notes on the source's files are not kept: %s", error)


def _notes_path(store: Path) -> Path:
    """Follow the XDG base directory specification."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:16]
    return cache / "engram" / f"files-{name}.json"


def _hash(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # NaN, a NumPy scalar, half a surrogate pair
        raise SourceError(f"Its fields or events cannot be written as JSON: {error}.") from error
    return hashlib.sha256(text).hexdigest()[:16]


def steps_hash(steps: Mapping[str, Sequence[Mapping[str, Any]]], precision: Mapping[str, str]) -> str:
    """Hash the settings of all steps, the precision and the version of this code."""
    return _hash([PREPARE_VERSION, {k: list(v) for k, v in steps.items()}, dict(precision)])


def fingerprint(source: Source, entry: Entry, steps: str, notes: FileNotes) -> Fingerprint:
    """Take the fingerprint of a listed recording.

    Raises
    ------
    SourceError
        If a recording without files cannot be read.
    OSError
        If a file cannot be read.
    """
    if entry.files:
        files = _hash([[f.path.name, f.path.stat().st_size, notes.crc32c(f.path)] for f in entry.files])
    else:
        files = _hash(list(_sample_crcs(source, entry)))
    return Fingerprint(files, _hash(dict(entry.fields)), steps)


def _sample_crcs(source: Source, entry: Entry) -> Iterator[Any]:
    """Walk through the samples of a recording that has no files: arrays and objects in memory."""
    with source.open(entry) as recording:
        events = recording.events
        yield [list(events.onset_s), list(events.duration_s), list(events.description), dict(events.extras)]
        for signal in recording.signals:
            crc = 0
            block_bytes = max(_READ_BYTES, signal.array.sample_bytes)
            for _, x in recording.blocks(signal.name, block_bytes):
                crc = crc32c(x, crc)
            yield [
                signal.name,
                list(signal.array.shape),
                signal.array.dtype,
                signal.rate_hz,
                signal.start_s,
                crc,
            ]
