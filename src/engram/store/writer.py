"""Writing a store so that a kill at any moment loses nothing that was finished.

This module decides how bytes reach the disk. Every file is written under a temporary
name, fsynced, renamed, its folder fsynced. The order is parts, then tables, then the
manifest; until the manifest is renamed, readers see the old one. An unfinished
``prepare`` keeps its groups in ``building/``; a later one with the same plan takes them
over. What goes into a part is left to ``engram.preparation.ingest``.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from engram.atomic import replacing, sync_folder
from engram.errors import DoesNotFit, InputError, StoreLocked, StoreNotWritable
from engram.store.backend import Part
from engram.store.crc import crc32c, file_crc32c
from engram.store.format import (
    BUILDING,
    FORMAT_VERSION,
    LOCK,
    MANIFEST,
    ROOT_GROUP,
    Call,
    FileStamp,
    Manifest,
    array_metadata,
    call_folder,
    group_metadata,
    part_path,
)
from engram.store.grid import Grid
from engram.store.tables import TABLES, join_tables, rows_table, write_table

__all__ = [
    "GroupWriter",
    "PartForm",
    "check_free_space",
    "commit",
    "disk_errors",
    "finished_group",
    "group_table",
    "locked",
    "progress_file",
    "read_manifest",
    "sweep",
]

_RESULT = "group.json"
"""File of a group's folder in ``building`` that says: finished, and these are its files."""

_MAX_OPEN_PARTS = 64
"""Parts of one group whose files stay open; a corpus may have as many forms as recordings."""

FREE_SPACE_MARGIN = 1.2
"""Free space asked for, over the predicted size: predictions come from headers."""


_REFUSALS = frozenset(
    [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.ENOENT]
)
"""Errors by which a disk refuses to be written; ``EEXIST`` where a file has the name of a folder."""


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn the disk's refusals into errors that say what to do.

    Raises
    ------
    DoesNotFit
        If the disk is full, or a quota is.
    StoreNotWritable
        If it is read-only, forbidden or failing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"The disk of {root} is full. Finished parts are kept: free space and run the same again"
            )
            free = shutil.disk_usage(_existing(root)).free
            raise DoesNotFit(message, resource="disk", needed_bytes=free + 1, allowed_bytes=free) from error
        if error.errno in _REFUSALS:
            reason = os.strerror(error.errno)
            message = f"{root} cannot be written: {reason}. Choose another folder, or mend the disk."
            raise StoreNotWritable(message) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def check_free_space(root: Path, predicted_bytes: int) -> None:
    """Refuse to begin a build that the disk cannot hold, with a margin of 20 %.

    Raises
    ------
    DoesNotFit
        If less is free than 1.2 times the prediction.
    """
    free = shutil.disk_usage(_existing(root.absolute())).free
    needed = int(predicted_bytes * FREE_SPACE_MARGIN)
    if free < needed:
        message = f"{root.name} is predicted to take the disk's free space. Free some, or store elsewhere"
        raise DoesNotFit(message, resource="disk", needed_bytes=needed, allowed_bytes=free)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the one builder's lock of a store; the kernel lets go of it if we are killed.

    Raises
    ------
    InputError
        If this is a file, or a folder with something else in it.
    StoreLocked
        If another process builds this store.
    StoreNotWritable
        If the folder cannot be written.
    """
    with disk_errors(root):
        _check_folder(root)
        root.mkdir(parents=True, exist_ok=True)
        sync_folder(root.absolute().parent)
        lock = FileLock(root / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            message = f"Another process is building {root.name}. Wait until it has finished."
            raise StoreLocked(message) from error
    try:
        yield
    finally:
        lock.release()


_OURS = {"parts": r"\d{4,}-\d{5,}-.+", "tables": r"\d{4,}", BUILDING: r"\d{4,}-\d{5,}(\.\w+)?"}
"""What we name our folders; a builder touches nothing else in a store's folder."""


def _is_ours(path: Path) -> bool:
    """Say whether a child of ``parts``, ``tables`` or ``building`` is named as we name ours."""
    if path.name in (ROOT_GROUP, f"{ROOT_GROUP}.tmp"):
        return True
    return re.fullmatch(_OURS[path.parent.name], path.name) is not None


def _check_folder(root: Path) -> None:
    """Refuse a folder that is neither empty, nor a store, nor an unfinished one: it is somebody's."""
    if not root.exists() or (root / MANIFEST).exists():
        return
    if not root.is_dir():
        raise InputError(f"{root} is a file. Name a folder for the store.")
    known = {LOCK, ROOT_GROUP, f"{ROOT_GROUP}.tmp", f"{MANIFEST}.tmp", *_OURS}
    strange = [path for path in root.iterdir() if path.name not in known]
    strange += [path for name in _OURS for path in _children(root / name) if not _is_ours(path)]
    if strange:
        names = ", ".join(sorted(path.relative_to(root).as_posix() for path in strange)[:3])
        raise InputError(f"{root} is no store and is not empty: it holds {names}. Name a new folder.")


def read_manifest(root: Path) -> Manifest:
    """Read the manifest, or an empty one where nothing has been committed yet.

    Raises
    ------
    StoreDamaged, StoreFormatError
        As ``Manifest.from_bytes``.
    """
    try:
        data = (root / MANIFEST).read_bytes()
    except FileNotFoundError:
        return Manifest()
    return Manifest.from_bytes(data)


def write_file(path: Path, data: bytes) -> FileStamp:
    """Write a small file whole, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)
    return FileStamp(len(data), crc32c(data))


@dataclass(frozen=True, slots=True)
class PartForm:
    """What every sample of a part has in common: recordings of another form go to another part."""

    signal: str
    """Name of the signal."""
    sample_shape: tuple[int, ...]
    """Shape of one sample."""
    axes: tuple[str, ...]
    """Axis names, the first being time."""
    dtype: str
    """Stored dtype."""
    precision: str
    """How values are stored in it."""
    rate_hz: float
    """Samples per second."""


class _PartFile:
    """One shard file that grows at its end, and can be taken back to an earlier length."""

    def __init__(self, path: Path, form: PartForm) -> None:
        self.form = form
        self.n_samples = 0
        self.crcs: list[int] = []
        self._block_bytes = self.grid.block_bytes
        self._pending = b""
        self._crc = 0
        self._path = path
        self._open: io.FileIO | None = None
        path.touch()

    def append(self, samples: NDArray[Any]) -> None:
        self.n_samples += len(samples)
        data = np.ascontiguousarray(samples).reshape(-1).view(np.uint8).data
        if self._pending:
            missing = self._block_bytes - len(self._pending)
            self._pending += bytes(data[:missing])
            data = data[missing:]
            if len(self._pending) < self._block_bytes:
                return
            self._write_blocks(memoryview(self._pending))
        whole = len(data) - len(data) % self._block_bytes
        self._write_blocks(data[:whole])
        self._pending = bytes(data[whole:])

    def _write_blocks(self, data: memoryview) -> None:
        for start in range(0, len(data), self._block_bytes):
            self.crcs.append(crc32c(data[start : start + self._block_bytes]))
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._crc = crc32c(data, self._crc)
        view = memoryview(data)
        while view:
            # write(2), never a map: a full disk is then an error and not a SIGBUS.
            view = view[self._file.write(view) :]

    @property
    def _file(self) -> io.FileIO:
        if self._open is None:
            self._open = io.FileIO(self._path, "r+")
            self._open.seek(0, os.SEEK_END)
        return self._open

    def release(self) -> None:
        """Close the file until it is next written."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def mark(self) -> tuple[int, int, bytes, int]:
        """Remember this place, to come back to if the recording is refused."""
        return self.n_samples, len(self.crcs), self._pending, self._crc

    def rewind(self, mark: tuple[int, int, bytes, int]) -> None:
        self.n_samples, n_blocks, self._pending, self._crc = mark
        del self.crcs[n_blocks:]
        self._file.truncate(n_blocks * self._block_bytes)
        self._file.seek(n_blocks * self._block_bytes)

    def finish(self) -> FileStamp:
        """Pad the last block, write the index and its CRC32C, fsync, close."""
        if self._pending:
            self._write_blocks(memoryview(self._pending.ljust(self._block_bytes, b"\0")))
        index = self.grid.index()
        self._write(index + crc32c(index).to_bytes(4, "little"))
        os.fsync(self._file.fileno())
        self.release()
        return FileStamp(self.grid.file_bytes, self._crc)

    @property
    def grid(self) -> Grid:
        return Grid(self.n_samples, self.form.sample_shape, self.form.dtype)


class GroupWriter:
    """Writes the parts and table rows of one group of recordings, all or nothing.

    The parts take shape under ``building/``; ``finish`` moves them to ``parts/`` and then
    leaves a result folder with the group's tables, which says that the group is done.

    Parameters
    ----------
    root
        The store's folder, locked by the builder.
    call
        Number of the ``prepare`` call.
    group
        Number of the group within the call.
    key
        What this group is made of; ``finished_group`` compares it.

    Notes
    -----
    A worker whose builder was killed may still be at work when the build is resumed, so a
    lock per group makes the second one wait for the first.
    """

    def __init__(self, root: Path, call: int, group: int, key: str) -> None:
        self._root, self._call, self._group, self._key = root, call, group, key
        self._parts: list[tuple[str, _PartFile]] = []
        self._rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self._marks: list[tuple[int, int, bytes, int]] = []
        self._row_marks: dict[str, int] = {}
        self._layouts: set[str] = set()
        self._lock = FileLock(_group_folder(root, call, group).with_suffix(".lock"))
        self._work = _group_folder(root, call, group).with_suffix(".tmp")

    def __enter__(self) -> Self:
        with disk_errors(self._root):
            self._work.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            shutil.rmtree(self._work, ignore_errors=True)
            progress_file(self._root, self._call, self._group).unlink(missing_ok=True)
            self._work.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        for _, part in self._parts:
            part.release()
        shutil.rmtree(self._work, ignore_errors=True)
        self._lock.release()

    def begin_recording(self) -> None:
        """Mark the place that ``refuse_recording`` goes back to."""
        for _, part in self._parts[:-_MAX_OPEN_PARTS]:
            part.release()
        self._marks = [part.mark() for _, part in self._parts]
        self._row_marks = {name: len(rows) for name, rows in self._rows.items()}

    def refuse_recording(self) -> None:
        """Take back everything since ``begin_recording``."""
        for _, part in self._parts[len(self._marks) :]:
            part.rewind((0, 0, b"", 0))
        for (_, part), mark in zip(self._parts, self._marks, strict=False):
            part.rewind(mark)
        for name, n_rows in self._row_marks.items():
            del self._rows[name][n_rows:]
        self._layouts = {row["layout"] for row in self._rows["layouts"]}

    def part(self, form: PartForm) -> int:
        """Find or begin the part of this form, and give its number within the group."""
        for number, (_, part) in enumerate(self._parts):
            if part.form == form:
                return number
        number = len(self._parts)
        path = part_path(self._call, self._group, form.signal, number)
        folder = self._work / Path(path).name
        shard = folder / Part(path, form.signal, Grid(0, form.sample_shape, form.dtype)).file[len(path) + 1 :]
        with disk_errors(self._root):
            shard.parent.mkdir(parents=True)
            self._parts.append((path, _PartFile(shard, form)))
        return number

    def path_of(self, number: int) -> str:
        """Give a part's folder, relative to the store."""
        return self._parts[number][0]

    def n_samples(self, number: int) -> int:
        """Count the samples that a part has so far: where the next recording begins."""
        return self._parts[number][1].n_samples

    def append(self, number: int, samples: NDArray[Any]) -> None:
        """Append encoded samples to a part."""
        with disk_errors(self._root):
            self._parts[number][1].append(samples)

    def add_row(self, table: str, /, **columns: Any) -> None:
        """Add a row to one of the group's tables."""
        self._rows[table].append(columns)
        self._layouts.add(columns.get("layout", ""))

    def has_layout(self, layout: str) -> bool:
        """Say whether the group's table of layouts has this one."""
        return layout in self._layouts

    def finish(self, notes: Mapping[str, Any]) -> None:
        """Move the parts to their place and leave the result folder.

        Parameters
        ----------
        notes
            What a resumed build wants to know of this group; JSON, never part of the store.
        """
        with disk_errors(self._root):
            self._finish(notes)

    def _finish(self, notes: Mapping[str, Any]) -> None:
        result = self._work / "result"
        result.mkdir()
        stamps: dict[str, list[int]] = {}
        for folder, part in self._parts:
            if part.n_samples:
                stamps |= self._finish_part(folder, part)
        for name, rows in self._rows.items():
            table = rows_table(name, rows)
            write_table(result / f"{name}.parquet", [table], table.schema)
        outcome = {"key": self._key, "files": stamps, "notes": dict(notes)}
        (result / _RESULT).write_text(json.dumps(outcome))
        for path in result.iterdir():
            _sync_file(path)
        sync_folder(result)
        final = _group_folder(self._root, self._call, self._group)
        shutil.rmtree(final, ignore_errors=True)  # of another plan
        result.replace(final)
        sync_folder(final.parent)

    def _finish_part(self, path: str, part: _PartFile) -> dict[str, list[int]]:
        form, folder = part.form, self._work / Path(path).name
        attributes = {"engram": {"precision": form.precision, "rate_hz": form.rate_hz}}
        shard = f"{path}/{form.signal}/{part.grid.chunk_name}"
        stamps = {
            f"{path}/{ROOT_GROUP}": write_file(folder / ROOT_GROUP, group_metadata({})),
            f"{path}/{form.signal}/{ROOT_GROUP}": write_file(
                folder / form.signal / ROOT_GROUP, array_metadata(part.grid, form.axes, attributes)
            ),
            shard: part.finish(),
        }
        for inner in sorted((each for each in folder.rglob("*") if each.is_dir()), reverse=True):
            sync_folder(inner)
        sync_folder(folder)
        final = self._root / path
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # left by a kill between here and the result
        folder.replace(final)
        sync_folder(final.parent)
        self.add_row(
            "parts", part=path, signal=form.signal, n_samples=part.n_samples,
            sample_shape=list(form.sample_shape), axes=list(form.axes), dtype=form.dtype,
            precision=form.precision, rate_hz=form.rate_hz,
        )  # fmt: skip
        for block, crc in enumerate(part.crcs):
            self.add_row("checksums", part=path, block=block, crc32c=crc)
        return {name: [stamp.size_bytes, stamp.crc32c] for name, stamp in stamps.items()}


def _group_folder(root: Path, call: int, group: int) -> Path:
    return root / BUILDING / f"{call:04d}-{group:05d}"


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def finished_group(root: Path, call: int, group: int, key: str) -> Mapping[str, Any] | None:
    """Give the notes of this very group if an unfinished build has finished it, else None.

    Its parts have to be there, in their size: what is committed is trusted from then on.
    """
    try:
        result = json.loads((_group_folder(root, call, group) / _RESULT).read_text())
    except FileNotFoundError:
        return None
    sizes = {root / path: size_bytes for path, (size_bytes, _) in result["files"].items()}
    is_whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    notes: Mapping[str, Any] = result["notes"]
    return notes if result["key"] == key and is_whole else None


def progress_file(root: Path, call: int, group: int) -> Path:
    """Give the path of the file that a job appends to after every recording."""
    return _group_folder(root, call, group).with_suffix(".progress")


def group_table(root: Path, call: int, group: int, name: str) -> Path:
    """Give the path of a finished group's table."""
    return _group_folder(root, call, group) / f"{name}.parquet"


def commit(root: Path, manifest: Manifest, call: Call, n_groups: int, dropped: Sequence[int]) -> Manifest:
    """Join the groups of a call to tables, write the manifest, clear ``building/``.

    Parameters
    ----------
    root
        The store's folder, locked by the builder.
    manifest
        The manifest as it was.
    call
        What is added to it.
    n_groups
        Number of groups, all finished.
    dropped
        Numbers of calls whose recordings have all been replaced by this one.

    Returns
    -------
    Manifest
        The manifest as it is now.
    """
    files = {path: stamp for path, stamp in manifest.files.items() if _call_of(path) not in dropped}
    for group in range(n_groups):
        result = json.loads((_group_folder(root, call.number, group) / _RESULT).read_text())
        files |= {path: FileStamp(*stamp) for path, stamp in result["files"].items()}
    for name in TABLES:
        path = f"{call_folder(call.number)}/{name}.parquet"
        paths = [group_table(root, call.number, group, name) for group in range(n_groups)]
        files[path] = _write_joined(root / path, name, paths)
    files[ROOT_GROUP] = write_file(
        root / ROOT_GROUP, group_metadata({"engram": {"format_version": FORMAT_VERSION}})
    )
    files[f"parts/{ROOT_GROUP}"] = write_file(root / "parts" / ROOT_GROUP, group_metadata({}))
    calls = tuple(c for c in manifest.calls if c.number not in dropped)
    new = Manifest((*calls, call), files)
    write_file(root / MANIFEST, new.to_bytes())
    sweep(root, new)
    return new


def _write_joined(path: Path, name: str, paths: Sequence[Path]) -> FileStamp:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    join_tables(name, paths, temporary)
    _sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)
    return FileStamp(path.stat().st_size, file_crc32c(path))


def sweep(root: Path, manifest: Manifest, keep_call: int | None = None) -> None:
    """Remove what no manifest lists: an unfinished build, parts of a kill, replaced calls.

    Parameters
    ----------
    root
        The store's folder, locked by the builder.
    manifest
        The manifest in force.
    keep_call
        Number of the call whose unfinished groups are to be taken over, or None.
    """
    listed = {"/".join(path.split("/")[:2]) for path in manifest.files}
    for path in (path for name in _OURS for path in _children(root / name)):
        is_kept = keep_call is not None and path.name.split("-")[0] == f"{keep_call:04d}"
        if _is_ours(path) and not is_kept and f"{path.parent.name}/{path.name}" not in listed:
            _remove(path)
    if not _children(root / BUILDING):
        shutil.rmtree(root / BUILDING, ignore_errors=True)


def _children(folder: Path) -> list[Path]:
    # A link is somebody's own arrangement: what it leads to is not ours to clear.
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    # First what says that a group is finished: a kill in the middle then leaves an unfinished one.
    (path / _RESULT).unlink(missing_ok=True)
    shutil.rmtree(path)


def _call_of(path: str) -> int | None:
    """Read the number of the call that a file of ``parts`` or ``tables`` belongs to."""
    match = re.match(r"(?:parts|tables)/(\d{4,})(?:[-/]|$)", path)
    return int(match[1]) if match else None
