"""Writing a file whole or not at all: a kill, a full disk or a power cut leaves the one before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["replacing", "sync_folder"]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, which takes its name only once all of it is on the disk.

    Parameters
    ----------
    path
        The file; its folder exists.

    Raises
    ------
    OSError
        If the disk refuses; nothing of the new file is left then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.txt")
    ...     with replacing(path) as file:
    ...         _ = file.write(b"whole")
    ...     path.read_bytes()
    b'whole'
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename within a folder survive a power cut."""
    if os.name == "nt":
        return  # Windows opens no folder; its rename is journalled
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
