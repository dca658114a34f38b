"""The error tree, sorted by what the person who catches one does next.

::

    EngramError
    ├── InputError (ValueError)            fix the argument, option or file named
    ├── SourceError (Exception)            fix or skip this recording
    ├── StoreMissing (FileNotFoundError)   prepare it, or correct the path
    ├── StoreFormatError (ValueError)      not a store this version reads: upgrade, or prepare again
    ├── StoreDamaged (Exception)           run ``engram verify``; restore or prepare anew what it names
    ├── StoreLocked (BlockingIOError)      wait for the other builder
    ├── StoreNotWritable (OSError)         write elsewhere, or mend the disk
    ├── DoesNotFit (Exception)             change the budget, or free memory or disk
    ├── MemoryExceeded (MemoryError)       resume with a larger budget or fewer jobs
    ├── WorkerLost (RuntimeError)          run the same again; with fewer jobs if memory is short
    └── MissingExtra (ImportError)         install the extra named

Every class also derives from the built-in that people already catch. Numbers that a
message shows are attributes too, so that no caller has to parse text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from engram.units import format_bytes

__all__ = [
    "DoesNotFit",
    "EngramError",
    "InputError",
    "MemoryExceeded",
    "MissingExtra",
    "SourceError",
    "StoreDamaged",
    "StoreFormatError",
    "StoreLocked",
    "StoreMissing",
    "StoreNotWritable",
    "WorkerLost",
]


class EngramError(Exception):
    """Any error that Engram raises on purpose."""


class InputError(EngramError, ValueError):
    """An argument, option or configuration file breaks a rule."""


class SourceError(EngramError):
    """A recording cannot be read or may not be stored as it is."""


class StoreMissing(EngramError, FileNotFoundError):
    """There is no store at this path, or it does not hold what was asked for."""


class StoreFormatError(EngramError, ValueError):
    """This is a store, but not of a format version that this Engram reads."""


class StoreDamaged(EngramError):
    """Bytes of a store are not the bytes that were written."""


class StoreLocked(EngramError, BlockingIOError):
    """Another process is building this store."""


class StoreNotWritable(EngramError, OSError):
    """The disk refuses to be written: read-only, no permission, or failing."""


class DoesNotFit(EngramError):
    """What was asked for needs more of a resource than there is.

    Parameters
    ----------
    message
        What does not fit, and the remedy.
    resource
        ``"memory"`` or ``"disk"``.
    needed_bytes, allowed_bytes
        The two figures that were compared.

    Examples
    --------
    >>> str(DoesNotFit("one block", resource="memory", needed_bytes=3 << 20, allowed_bytes=1 << 20))
    'one block (memory: needs 3.0 MiB, allowed 1.0 MiB)'
    """

    def __init__(self, message: str, *, resource: str, needed_bytes: int, allowed_bytes: int) -> None:
        self.message = message
        self.resource = resource
        self.needed_bytes = needed_bytes
        self.allowed_bytes = allowed_bytes
        figures = f"needs {format_bytes(needed_bytes)}, allowed {format_bytes(allowed_bytes)}"
        super().__init__(f"{message} ({resource}: {figures})")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from their text alone, which loses the figures between processes.
        figures = {"needed_bytes": self.needed_bytes, "allowed_bytes": self.allowed_bytes}
        return partial(type(self), self.message, resource=self.resource, **figures), ()


class MemoryExceeded(EngramError, MemoryError):
    """Measured memory passed the budget; work stopped at a safe point.

    Parameters
    ----------
    message
        Where it happened, and the remedy.
    used_bytes, allowed_bytes
        The two figures that were compared.
    """

    def __init__(self, message: str, *, used_bytes: int, allowed_bytes: int) -> None:
        self.message = message
        self.used_bytes = used_bytes
        self.allowed_bytes = allowed_bytes
        figures = f"uses {format_bytes(used_bytes)}, allowed {format_bytes(allowed_bytes)}"
        super().__init__(f"{message} ({figures})")

    def __reduce__(self) -> tuple[Any, ...]:
        figures = {"used_bytes": self.used_bytes, "allowed_bytes": self.allowed_bytes}
        return partial(type(self), self.message, **figures), ()


class WorkerLost(EngramError, RuntimeError):
    """A worker process was killed from outside, most often by the kernel for memory."""


class MissingExtra(EngramError, ImportError):
    """An optional library is needed and not installed.

    Parameters
    ----------
    library
        The module that could not be imported.
    extra
        The extra of ``engram`` that brings it.

    Examples
    --------
    >>> print(MissingExtra("mne", "eeg"))
    mne is not installed. Install it with: pip install "engram[eeg]"
    """

    def __init__(self, library: str, extra: str) -> None:
        self.library = library
        self.extra = extra
        super().__init__(f'{library} is not installed. Install it with: pip install "engram[{extra}]"')

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.library, self.extra)
