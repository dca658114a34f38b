"""The default backend: byte ranges of uncompressed Zarr shards, by ``pread``.

Nothing is mapped: a mapped file makes RSS grow, and one that is cut short under a reader
kills the process with SIGBUS, where a short ``pread`` is an error that can be told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.errors import StoreDamaged
from engram.store.backend import OpenFile, Part, check_read
from engram.store.format import MANIFEST, FileStamp, Manifest

__all__ = ["ZarrBackend"]

_MAX_OPEN_FILES = 256
"""A quarter of the usual limit of 1,024 descriptors: two loaders and the rest still fit."""


class ZarrBackend:
    """Reads shard files where they lie.

    Parameters
    ----------
    root
        The store's folder.
    stamps
        What the store's manifest says of every file.

    Notes
    -----
    Threads share descriptors without a lock: ``preadv`` has no file offset to share, dict
    operations are atomic, and an evicted file stays open until its last reader is done. A file
    that is open is served to the end, whatever is renamed over it; one that is opened after the
    store was prepared anew must be the one that its manifest named.
    """

    def __init__(self, root: Path, stamps: Mapping[str, FileStamp]) -> None:
        self._root, self._stamps = root, stamps
        self._files: dict[tuple[str, bool], OpenFile] = {}
        self._manifest: tuple[int, ...] | None = _identity(root)
        self._listed = stamps

    def read_into(self, part: Part, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with samples [start, start + len(out)); see ``Backend.read_into``."""
        check_read(part, start, out)
        if out.size == 0:
            return
        file = self._open(part)
        view = out.reshape(-1).view(np.uint8).data
        offset = start * part.grid.sample_bytes
        while view:
            n_bytes = _read_at(file.descriptor, view, offset)
            if n_bytes == 0:
                size_bytes = os.fstat(file.descriptor).st_size
                raise StoreDamaged(
                    f"{part.file} ends at byte {size_bytes}, it should have {part.grid.file_bytes}. "
                    "Run engram verify."
                )
            view, offset = view[n_bytes:], offset + n_bytes

    def files(self, parts: Sequence[Part], *, is_direct: bool = False) -> Sequence[OpenFile]:
        """Give the shard files; see ``Backend.files``."""
        opened = self._files.get
        return [opened((part.path, is_direct)) or self._open(part, is_direct=is_direct) for part in parts]

    def close(self) -> None:
        """Close every file. A later read opens them again."""
        self._files.clear()

    def __getstate__(self) -> tuple[Path, Mapping[str, FileStamp]]:
        return self._root, self._stamps

    def __setstate__(self, state: tuple[Path, Mapping[str, FileStamp]]) -> None:
        # Nothing is known of the manifest in this process: the first file that is opened looks at it.
        self._root, self._stamps = state
        self._files, self._manifest, self._listed = {}, (), {}

    def _open(self, part: Part, *, is_direct: bool = False) -> OpenFile:
        file = self._files.get((part.path, is_direct))
        if file is None:
            file = self._find(part, is_direct=is_direct)
            if hasattr(os, "posix_fadvise") and not is_direct:
                # The order knows better than the kernel what is read next: without this it reads
                # 128 KiB and more around every window.
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            while len(self._files) >= _MAX_OPEN_FILES:
                # A copy of the keys, since another thread may be opening or closing.
                self._files.pop(next(iter(list(self._files)), ("", False)), None)
            self._files[part.path, is_direct] = file
        return file

    def _find(self, part: Part, *, is_direct: bool) -> OpenFile:
        """Open the file that the tables describe, and no other."""
        try:
            file = OpenFile(self._root / part.file, is_direct=is_direct)
        except FileNotFoundError as error:
            self._check_manifest(part)
            raise StoreDamaged(f"{part.file} is missing. Run engram verify.") from error
        self._check_manifest(part)
        size_bytes = os.fstat(file.descriptor).st_size
        if size_bytes != part.grid.file_bytes:
            raise StoreDamaged(
                f"{part.file} ends at byte {size_bytes}, it should have {part.grid.file_bytes}. "
                "Run engram verify."
            )
        return file

    def _check_manifest(self, part: Part) -> None:
        """Refuse a part that the manifest no longer describes as it did."""
        if (identity := _identity(self._root)) != self._manifest:
            # Recordings were appended, or all was prepared anew.
            self._listed, self._manifest = _read_stamps(self._root), identity
        if self._listed.get(part.file) != self._stamps.get(part.file):
            raise StoreDamaged(f"{self._root} was prepared anew since it was opened. Open it again.")


def _identity(root: Path) -> tuple[int, int, int] | None:
    """Tell one manifest from the one that replaces it, without reading them."""
    try:
        found = (root / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read_stamps(root: Path) -> Mapping[str, FileStamp]:
    try:
        return Manifest.from_bytes((root / MANIFEST).read_bytes()).files
    except FileNotFoundError as error:
        raise StoreDamaged(f"{root} holds no store any more (no {MANIFEST}). Prepare it again.") from error


_POSITION = Lock()


def _read_at(descriptor: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    # Windows: a descriptor has one position, which threads must share.
    with _POSITION, open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.readinto(out) or 0
