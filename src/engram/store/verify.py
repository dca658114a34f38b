"""Verify: find every byte of a store that is not as it was written, and say where it is.

Every file is compared with its size and CRC32C in the manifest, the manifest with its
own. Damage within a part is located to the block, and from there to the recordings and
the seconds that it spoils; damage within a table to its row group and column.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engram.errors import StoreDamaged, StoreFormatError
from engram.store.backend import Part
from engram.store.crc import crc32c, file_crc32c
from engram.store.format import BUILDING, LOCK, MANIFEST, FileStamp, call_of
from engram.store.reader import Extent, Store

__all__ = ["Damage", "Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One place where a store is not as it was written."""

    path: str
    """The file, relative to the store."""
    kind: str
    """``"missing"``, ``"size"`` or ``"content"``."""
    where: str
    """What of it is spoiled, in words: bytes, samples, recordings and seconds, rows and columns."""
    recordings: tuple[str, ...] = ()
    """Ids of the recordings that are spoiled, where the damage is in samples."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found."""

    n_files: int
    """Files that were compared."""
    n_bytes: int
    """Bytes that were read."""
    damages: tuple[Damage, ...]
    """What is damaged; empty for a sound store."""
    unlisted: tuple[str, ...]
    """Files in the folder that the manifest does not list; harmless, removed by the next prepare."""

    @property
    def is_sound(self) -> bool:
        """True if nothing is damaged."""
        return not self.damages


def verify(
    path: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    calls: Container[int] | None = None,
) -> Verification:
    """Compare every file of a store with its checksum.

    Parameters
    ----------
    path
        The store's folder.
    progress
        Called with bytes done and bytes in all, after every file.
    calls
        Numbers of the ``prepare`` calls whose files are compared; None for all.

    Raises
    ------
    StoreMissing
        If there is no store.
    StoreFormatError
        If it is of another format version.
    """
    root = Path(path)
    try:
        store = Store(root)
    except StoreDamaged as error:
        return Verification(1, 0, (Damage(MANIFEST, "content", str(error)),), ())
    locator = _Locator(store)
    damages: list[Damage] = []
    files = {
        name: stamp
        for name, stamp in store.manifest.files.items()
        if calls is None or (call := call_of(name)) is None or call in calls
    }
    total = sum(stamp.size_bytes for stamp in files.values())
    done = 0
    # Tables first: parts are located by what the tables say.
    for name, stamp in sorted(files.items(), key=lambda item: not item[0].startswith("tables/")):
        damages += _check_file(locator, name, stamp)
        done += stamp.size_bytes
        if progress is not None:
            progress(done, total)
    unlisted = tuple(sorted(_unlisted(root, store)))
    return Verification(len(files) + 1, done, tuple(damages), unlisted)


def _check_file(locator: _Locator, name: str, stamp: FileStamp) -> list[Damage]:
    path = locator.store.path / name
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return [Damage(name, "missing", *locator.whole(name))]
    if size_bytes != stamp.size_bytes:
        where, recordings = locator.within(name, size_bytes)
        text = f"{size_bytes} bytes, {stamp.size_bytes} were written; {where}"
        return [Damage(name, "size", text, recordings)]
    if file_crc32c(path) != stamp.crc32c:
        where, recordings = locator.within(name, size_bytes)
        return [Damage(name, "content", where, recordings)]
    return []


def _unlisted(root: Path, store: Store) -> Iterator[str]:
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        is_listed = name in store.manifest.files or name in (MANIFEST, LOCK)
        if path.is_file() and not is_listed and not name.startswith(f"{BUILDING}/"):
            yield name


class _Locator:
    """Says in a reader's words what a damaged file spoils."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def whole(self, name: str) -> tuple[str, tuple[str, ...]]:
        part = self._parts.get(name)
        if part is None:
            return "the whole file", ()
        return self._samples(part, 0, part.grid.n_samples)

    def within(self, name: str, size_bytes: int) -> tuple[str, tuple[str, ...]]:
        path = self.store.path / name
        if name.endswith(".parquet"):
            return _table_damage(path), ()
        part = self._parts.get(name)
        if part is None:
            return "metadata", ()
        try:
            blocks = list(self._bad_blocks(path, part))
        except StoreDamaged:
            return "not located: the table of checksums is damaged too", ()
        if not blocks:
            return f"the shard's index, from byte {part.grid.data_bytes}", ()
        texts: list[str] = []
        recordings: list[str] = []
        for first, last in _runs(blocks):
            start, stop = part.grid.samples_of(first)[0], part.grid.samples_of(last)[1]
            text, spoiled = self._samples(part, start, stop)
            texts.append(f"blocks {first} to {last}: {text}" if last > first else f"block {first}: {text}")
            recordings += spoiled
        return "; ".join(texts), tuple(dict.fromkeys(recordings))

    def _bad_blocks(self, path: Path, part: Part) -> Iterator[int]:
        with path.open("rb") as file:
            for block, crc in enumerate(self._checksums_of(part)):
                if crc32c(file.read(part.grid.block_bytes)) != crc:
                    yield block

    def _samples(self, part: Part, start: int, stop: int) -> tuple[str, tuple[str, ...]]:
        """Name the recordings that hold samples [start, stop) of a part, with their seconds."""
        spoiled = [e for e in self._by_part.get(part.path, ()) if e.start < stop and start < e.stop]
        text = ", ".join(_seconds(extent, start, stop) for extent in spoiled)
        return text or "no recording in use", tuple(extent.recording for extent in spoiled)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """Parts by their shard file; empty if the tables that say so are damaged themselves."""
        return {extent.part.file: extent.part for extent in self._extents}

    @cached_property
    def _by_part(self) -> dict[str, list[Extent]]:
        parts: dict[str, list[Extent]] = {}
        for extent in self._extents:
            parts.setdefault(extent.part.path, []).append(extent)
        return parts

    @cached_property
    def _extents(self) -> list[Extent]:
        try:
            names = sorted(set(self.store.signals["signal"].to_pylist()))
            return [extent for name in names for extent in self.store.extents(name)]
        except (StoreDamaged, StoreFormatError):
            return []  # reported as the table's own damage; parts are then named without recordings

    def _checksums_of(self, part: Part) -> list[int]:
        """Give the CRC32C of every block of a part, in order."""
        table = self._checksums
        own = table.filter(pc.equal(table["part"], part.path)).sort_by("block")
        crcs: list[int] = own["crc32c"].to_pylist()
        return crcs

    @cached_property
    def _checksums(self) -> pa.Table:
        return self.store.table("checksums")


def _seconds(extent: Extent, start: int, stop: int) -> str:
    first = (max(start, extent.start) - extent.start) / extent.rate_hz + extent.start_s
    last = (min(stop, extent.stop) - extent.start) / extent.rate_hz + extent.start_s
    return f"{extent.recording} {extent.part.signal} {first:.2f}-{last:.2f} s"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Join neighbouring numbers: [1, 2, 5] gives (1, 2), (5, 5)."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number > last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _table_damage(path: Path) -> str:
    """Name the row groups and columns of a Parquet file that no longer read."""
    found: list[str] = []
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                found += [f"row group {group}, column {c}" for c in _bad_columns(file, group)]
    except (OSError, pa.ArrowException):
        return "the table's footer"
    return "; ".join(found) if found else "between the table's pages"


def _bad_columns(file: Any, group: int) -> Iterator[str]:
    for column in file.schema_arrow.names:
        try:
            file.read_row_group(group, columns=[column])
        except (OSError, pa.ArrowException):
            yield column
