"""A backend that holds parts in memory: for stores that fit, and as a model in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.store.backend import Part, check_read
from engram.store.format import FileStamp
from engram.store.zarr_backend import ZarrBackend

__all__ = ["RamBackend"]


class RamBackend:
    """Reads each part once, whole, and serves it from memory.

    Parameters
    ----------
    root
        The store's folder.
    stamps
        What the store's manifest says of every file.

    Notes
    -----
    Memory is that of the parts read so far and is held until ``close``; after ``fork``
    parent and child share it. Pickling leaves the memory behind.
    """

    def __init__(self, root: Path, stamps: Mapping[str, FileStamp]) -> None:
        self._files = ZarrBackend(root, stamps)
        self._arrays: dict[str, NDArray[Any]] = {}

    def read_into(self, part: Part, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with samples [start, start + len(out)); see ``Backend.read_into``."""
        check_read(part, start, out)
        out[...] = self._load(part)[start : start + len(out)]

    def files(self, parts: Sequence[Part], *, is_direct: bool = False) -> None:
        """Give none: samples come from memory."""

    def close(self) -> None:
        """Let go of the memory. A later read loads the part again."""
        self._arrays.clear()

    def __getstate__(self) -> ZarrBackend:
        return self._files

    def __setstate__(self, files: ZarrBackend) -> None:
        self._files = files
        self._arrays = {}

    def _load(self, part: Part) -> NDArray[Any]:
        array = self._arrays.get(part.path)
        if array is None:
            array = np.empty((part.grid.n_samples, *part.grid.sample_shape), part.grid.dtype)
            self._files.read_into(part, 0, array)
            self._files.close()
            self._arrays[part.path] = array
        return array
