"""The words of this room: Source, Entry, Recording, Signal, Channel, Events, Refusal.

This module decides what a recording is to the rest of Engram: named signals on one clock,
a table of events and descriptive fields. How a file is read is left to the sources, one
per file beside this one; what becomes of the samples is left to ``engram.preparation``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import DoesNotFit, InputError, SourceError

__all__ = [
    "Channel",
    "Entry",
    "Events",
    "Field",
    "Gap",
    "Recording",
    "Refusal",
    "Signal",
    "Source",
    "SourceFile",
    "check_range",
    "read_blocks",
    "signal_named",
]

Field = str | int | float
"""Value of a descriptive field: text or a number. A missing field is absent."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel (or unit, or voxel) of a signal."""

    name: str
    """Name as the recording gives it, such as ``"E17"``."""
    type: str = "eeg"
    """MNE's channel type: ``"eeg"``, ``"eog"``, ``"stim"``, ``"misc"``, ..."""
    unit: str = "uV"
    """Unit of the stored numbers; ``""`` where there is none."""
    position_m: tuple[float, float, float] | None = None
    """Position in MNE's head frame in metres, where known."""
    bad: bool = False
    """True if the recording's makers marked it bad (BIDS ``status``, MNE ``info["bads"]``)."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch [start, stop) of samples, in a signal's own samples, that was not measured.

    A gap of length zero is a joint: the samples on both sides are not neighbours in time.
    Filters do not reach over either.
    """

    start: int
    """First sample of the gap."""
    stop: int
    """One past the last sample of the gap; equal to ``start`` at a joint."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One stream of a recording, without its samples.

    Raises
    ------
    InputError
        If the name cannot be a folder's, the rate is not positive, or channels and last axis
        differ in number.
    """

    name: str
    """Name within the recording: ``"eeg"``, ``"stim"``, ``"robs"``, ``"betas"``."""
    array: ArraySpec
    """Shape, dtype and axes; the first axis is time, frame or trial."""
    rate_hz: float
    """Samples per second of the recording's clock."""
    start_s: float = 0.0
    """Time of the first sample on the recording's clock, in seconds."""
    channels: tuple[Channel, ...] = ()
    """One per index of the last axis, or none where they have no names."""
    gaps: tuple[Gap, ...] = ()
    """Stretches that were not measured, sorted."""
    bank: str | None = None
    """Name of the bank whose rows the values of this signal number, or None."""

    def __post_init__(self) -> None:
        if not self.rate_hz > 0 or not np.isfinite(self.rate_hz):
            raise InputError(f"Signal {self.name!r} has rate {self.rate_hz} Hz. Give a rate above zero.")
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"A signal cannot be named {self.name!r}: the name is a folder's in a store. "
                "Use up to 64 letters, digits, '_' and '-', beginning with a letter or digit."
            )
        if self.channels and len(self.channels) != self.array.shape[-1]:
            raise InputError(
                f"Signal {self.name!r} names {len(self.channels)} channels for {self.array.shape[-1]} "
                "columns. Name every column once, or none."
            )

    @property
    def n_samples(self) -> int:
        """Length of the first axis."""
        return self.array.n_samples

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.n_samples / self.rate_hz


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that an entry is made of."""

    path: Path
    """Where it lies now; never written into a store."""
    size_bytes: int
    """Its size when it was listed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing: what is known of a recording before it is opened."""

    id: str
    """Unique within the source and stable over machines: BIDS entities or the relative path."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """subject, session, task, run, release, and every column of participants.tsv."""
    files: tuple[SourceFile, ...] = ()
    """The files it is made of (signal files first, then sidecars); none for arrays."""
    size_bytes: int = 0
    """Bytes of signal data in its native form, which decide parts and progress."""
    resident_bytes: int = 0
    """Bytes that the reader holds in memory while the recording is open, beyond one block."""
    is_bank: bool = False
    """True for a bank: samples shared by many recordings, without a clock of their own."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A recording that was left out, and why. Counted and listed, never silent."""

    id: str
    """The entry's id, or the relative path of a file that is no entry."""
    reason: str
    """A short name to count by: ``"unreadable"``, ``"precision"``, ``"empty"``, ..."""
    detail: str
    """What happened, the value beside the rule, and one remedy."""


@dataclass(frozen=True, slots=True)
class Events:
    """The events of a recording, as columns of equal length.

    Raises
    ------
    InputError
        If columns differ in length.

    Examples
    --------
    >>> feedback = {"feedback": (None, "smiley_face")}
    >>> events = Events((1.0, 2.5), (0.0, 0.0), ("left_target", "left_buttonPress"), feedback)
    >>> len(events), events.extras["feedback"][1]
    (2, 'smiley_face')
    """

    onset_s: tuple[float, ...] = ()
    """Onset on the recording's clock, in seconds."""
    duration_s: tuple[float, ...] = ()
    """Duration in seconds; 0 where none is given."""
    description: tuple[str, ...] = ()
    """What happened: BIDS ``trial_type`` or ``value``, or the annotation's description."""
    extras: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    """Every other column of events.tsv, as the text it holds; ``n/a`` is None."""

    def __post_init__(self) -> None:
        lengths = {len(self.onset_s), len(self.duration_s), len(self.description)}
        lengths |= {len(column) for column in self.extras.values()}
        if len(lengths) > 1:
            raise InputError(
                f"Columns of events differ in length: {sorted(lengths)}. Give one value per event."
            )

    def __len__(self) -> int:
        return len(self.onset_s)


class Recording(Protocol):
    """One continuous measurement on one clock, open for reading.

    A recording belongs to the process and thread that opened it; it is neither pickled nor
    shared. It is a context manager; leaving it closes every file. Reading the same range
    again gives the same values.
    """

    @property
    def signals(self) -> Sequence[Signal]:
        """The signals, at least one, in a stable order."""
        ...

    @property
    def events(self) -> Events:
        """The events, sorted by onset."""
        ...

    @property
    def whole(self) -> Any:
        """The library's own object for the whole recording (``mne.io.Raw``), or None.

        Only steps that are callables on that object use it; it may load everything.
        """
        ...

    def read(self, signal: str, start: int, stop: int) -> NDArray[Any]:
        """Read samples [start, stop) of one signal.

        Returns
        -------
        ndarray
            (stop - start, \\*sample shape) of the signal's dtype, in the channels' units.
            Owned by the caller. Memory order is free (MNE's data come as a transposed view).

        Raises
        ------
        SourceError
            If the file does not hold these samples, or cannot be read.
        """
        ...

    def blocks(self, signal: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Walk through a signal once, in order, in blocks of at most ``max_bytes``.

        Most recordings return ``read_blocks(self, signal, max_bytes)``. One whose file
        punishes reading piece by piece (NSD betas, chunks (750, 1, 1, 1)) reads it in as
        few full passes as ``max_bytes`` allows.

        Yields
        ------
        tuple of int and ndarray
            Number of the block's first sample, and the samples as ``read`` gives them.

        Raises
        ------
        DoesNotFit
            If one sample alone is larger than ``max_bytes``.
        """
        ...

    def close(self) -> None:
        """Close every file. Closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class Source(Protocol):
    """A place that recordings come from.

    A source is pickled to the jobs that read it, so it holds paths and options, not open
    files. Listing twice gives the same entries in the same order.
    """

    def entries(self) -> Sequence[Entry]:
        """List the recordings, sorted by id, without opening a signal file."""
        ...

    def refusals(self) -> Sequence[Refusal]:
        """List what was found and left out while listing, and why."""
        ...

    def open(self, entry: Entry) -> Recording:
        """Open one recording for reading.

        Raises
        ------
        SourceError
            If it cannot be read.
        """
        ...


def read_blocks(recording: Recording, signal: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Walk through a signal by ``Recording.read``: what most sources call for ``blocks``.

    Raises
    ------
    InputError
        If the recording has no such signal.
    DoesNotFit
        If one sample alone is larger than ``max_bytes``.
    """
    spec = signal_named(recording.signals, signal)
    step = max_bytes // max(spec.array.sample_bytes, 1)
    if step == 0 and spec.n_samples:
        raise DoesNotFit(
            f"One sample of signal {signal!r} does not fit a block. Raise the memory budget.",
            resource="memory",
            needed_bytes=spec.array.sample_bytes,
            allowed_bytes=max_bytes,
        )
    for start in range(0, spec.n_samples, max(step, 1)):
        yield start, recording.read(signal, start, min(start + step, spec.n_samples))


def check_range(signal: Signal, start: int, stop: int) -> None:
    """Hold samples [start, stop) to what a signal has.

    Raises
    ------
    SourceError
        If they are not all there, or start comes after stop.
    """
    if not 0 <= start <= stop <= signal.n_samples:
        raise SourceError(
            f"Samples [{start}, {stop}) of {signal.name!r} were asked for; it holds [0, {signal.n_samples})."
        )


def signal_named(signals: Sequence[Signal], name: str) -> Signal:
    """Find a signal by name.

    Raises
    ------
    InputError
        If there is none of that name; the message lists those there are.
    """
    for signal in signals:
        if signal.name == name:
            return signal
    names = ", ".join(signal.name for signal in signals)
    raise InputError(f"There is no signal {name!r} here. Use one of: {names}.")
