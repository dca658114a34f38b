"""The default backend: byte ranges of uncompressed Zarr shards, by ``pread``.

Nothing is mapped: a mapped file makes RSS grow, and one that is cut short under a reader
kills the process with SIGBUS, where a short ``pread`` is an error that can be told.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.errors import StoreDamaged
from engram.store.backend import Part, check_read

__all__ = ["ZarrBackend"]

_MAX_OPEN_FILES = 256
"""A quarter of the usual limit of 1,024 descriptors: two loaders and the rest still fit."""


class _File:
    """A descriptor that closes when the last reader lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ZarrBackend:
    """Reads shard files where they lie.

    Parameters
    ----------
    root
        The store's folder.

    Notes
    -----
    Threads share descriptors without a lock: ``preadv`` has no file offset to share, dict
    operations are atomic, and an evicted file stays open until its last reader is done.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, _File] = {}

    def read_into(self, part: Part, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with samples [start, start + len(out)); see ``Backend.read_into``."""
        check_read(part, start, out)
        if out.size == 0:
            return
        file = self._open(part)
        view = out.reshape(-1).view(np.uint8).data
        offset = start * part.grid.sample_bytes
        while view:
            n_bytes = os.preadv(file.descriptor, [view], offset)
            if n_bytes == 0:
                raise StoreDamaged(
                    f"{part.file} ends at byte {offset}, it should have {part.grid.file_bytes}. "
                    "Run engram verify."
                )
            view, offset = view[n_bytes:], offset + n_bytes

    def hint(self, part: Part, start: int, stop: int) -> None:
        """Let the kernel read [start, stop) ahead, where it can be told to."""
        if hasattr(os, "posix_fadvise"):
            first, last = part.grid.byte_range(start, stop)
            os.posix_fadvise(self._open(part).descriptor, first, last - first, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every file. A later read opens them again."""
        self._files.clear()

    def __getstate__(self) -> Path:
        return self._root

    def __setstate__(self, root: Path) -> None:
        self._root = root
        self._files = {}

    def _open(self, part: Part) -> _File:
        file = self._files.get(part.file)
        if file is None:
            try:
                file = _File(self._root / part.file)
            except FileNotFoundError as error:
                raise StoreDamaged(f"{part.file} is missing. Run engram verify.") from error
            while len(self._files) >= _MAX_OPEN_FILES:
                # A copy of the keys, since another thread may be opening or closing.
                self._files.pop(next(iter(list(self._files)), ""), None)
            self._files[part.file] = file
        return file
