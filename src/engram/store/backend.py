"""What a backend of a store is: something that fills a caller's buffer with samples.

This module decides the protocol and the table of known backends. Which backend serves a
store is the caller's choice; what a sample means is left to ``engram.store.reader``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from numpy.typing import NDArray

from engram.errors import InputError
from engram.store.format import FileStamp
from engram.store.grid import Grid

__all__ = ["BACKENDS", "Backend", "OpenFile", "Part", "open_backend"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a store: where it is, and what its samples look like on disk."""

    path: str
    """Folder relative to the store, a Zarr group."""
    signal: str
    """Name of the array in it."""
    grid: Grid
    """Samples, blocks and bytes."""

    @property
    def file(self) -> str:
        """The shard file, relative to the store."""
        return f"{self.path}/{self.signal}/{self.grid.chunk_name}"


class OpenFile:
    """A file open for reading, which closes when the last reader lets go of it.

    Parameters
    ----------
    path
        The file.
    is_direct
        Whether it is read past the page cache: in whole blocks, into memory that begins at one.

    Raises
    ------
    FileNotFoundError
        If there is none.
    OSError
        If the file system cannot read past the page cache.
    """

    __slots__ = ("descriptor",)

    def __init__(self, path: Path, *, is_direct: bool = False) -> None:
        self.descriptor = os.open(
            path,
            os.O_RDONLY
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
            | (os.O_DIRECT if is_direct else 0),
        )

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # An argument: when the interpreter ends, this module's names may be gone first.
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class Backend(Protocol):
    """Fills buffers with stored samples.

    A backend may be used by several threads at once, survives ``fork`` (no shared file
    offset, no lock held while reading), and pickles: an unpickled backend opens its files
    anew. Reading twice gives the same bytes.
    """

    def read_into(self, part: Part, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with samples [start, start + len(out)) as stored.

        Parameters
        ----------
        part
            The part to read.
        start
            First sample.
        out
            (n, \\*sample shape) C-contiguous, of the part's dtype. Belongs to the caller;
            it is filled and not kept.

        Raises
        ------
        InputError
            If the samples are not all within the part, or ``out`` has another form.
        StoreDamaged
            If the file is missing or ends too early.
        """
        ...

    def files(self, parts: Sequence[Part], *, is_direct: bool = False) -> Sequence[OpenFile] | None:
        """Give the files whose bytes are the parts' samples from byte 0, or None where there are none.

        Whoever has them may read them at any offset, and not move their file position. They stay
        open for as long as they are held.

        Parameters
        ----------
        parts
            Whose files.
        is_direct
            Whether they are read past the page cache, as ``OpenFile`` says.

        Raises
        ------
        StoreDamaged
            If a file is missing, of another size, or not the one that the store was opened with.
        OSError
            If the file system cannot read past the page cache.
        """
        ...

    def close(self) -> None:
        """Close every file. A later read opens them again."""
        ...


BACKENDS: MappingProxyType[str, str] = MappingProxyType(
    {"zarr": "engram.store.zarr_backend:ZarrBackend", "ram": "engram.store.ram_backend:RamBackend"}
)
"""Known backends: name -> module and class, imported on use."""


def open_backend(name: str, root: Path, files: Mapping[str, FileStamp]) -> Backend:
    """Open a backend over a store's folder.

    Parameters
    ----------
    name
        Its name in ``BACKENDS``.
    root
        The store's folder.
    files
        What its manifest says of every file.

    Raises
    ------
    InputError
        If there is no backend of that name.
    """
    if name not in BACKENDS:
        raise InputError(f"Unknown backend {name!r}. Use one of: {', '.join(sorted(BACKENDS))}.")
    module, kind = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), kind)(root, files)
    return backend


def check_read(part: Part, start: int, out: NDArray[Any]) -> None:
    """Check a read at the border, so that backends can trust it.

    Raises
    ------
    InputError
        If the samples are not all within the part, or ``out`` has another form.
    """
    grid = part.grid
    if not 0 <= start <= start + len(out) <= grid.n_samples:
        raise InputError(
            f"Samples [{start}, {start + len(out)}) are not all within {part.path}, which has "
            f"{grid.n_samples}. Ask for a range inside it."
        )
    if out.shape[1:] != grid.sample_shape or out.dtype.name != grid.dtype or not out.flags.c_contiguous:
        raise InputError(
            f"The buffer is {out.dtype.name} {out.shape[1:]}, contiguous: {out.flags.c_contiguous}; "
            f"{part.path} holds {grid.dtype} {grid.sample_shape}. Give a C-contiguous buffer of that form."
        )
