"""A backend that holds parts in memory: for stores that fit, and as a model in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.store.backend import Part, check_read
from engram.store.zarr_backend import ZarrBackend

__all__ = ["RamBackend"]


class RamBackend:
    """Reads each part once, whole, and serves it from memory.

    Parameters
    ----------
    root
        The store's folder.

    Notes
    -----
    Memory is that of the parts read so far and is held until ``close``; after ``fork``
    parent and child share it. Pickling leaves the memory behind.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._arrays: dict[str, NDArray[Any]] = {}

    def read_into(self, part: Part, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with samples [start, start + len(out)); see ``Backend.read_into``."""
        check_read(part, start, out)
        out[...] = self._load(part)[start : start + len(out)]

    def hint(self, part: Part, start: int, stop: int) -> None:
        """Load the part now."""
        self._load(part)

    def close(self) -> None:
        """Let go of the memory. A later read loads the part again."""
        self._arrays.clear()

    def __getstate__(self) -> Path:
        return self._root

    def __setstate__(self, root: Path) -> None:
        self._root = root
        self._arrays = {}

    def _load(self, part: Part) -> NDArray[Any]:
        array = self._arrays.get(part.path)
        if array is None:
            array = np.empty((part.grid.n_samples, *part.grid.sample_shape), part.grid.dtype)
            files = ZarrBackend(self._root)
            files.read_into(part, 0, array)
            files.close()
            self._arrays[part.path] = array
        return array
