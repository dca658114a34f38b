"""Splits: training, validation and test by any column, and the proof that they are apart.

A score on people that the model has seen says little about people that it has not. So no
subject may be on two sides unless that is said (``within_subject``), and no two sides share a
sample. Which windows there are, ``index`` decides; their order, ``order``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError
from engram.windows.index import WindowIndex
from engram.windows.spec import check_names

__all__ = ["Side", "Sides", "Split", "split_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Which groups of windows a side takes: a fraction of them, or some by name.

    Raises
    ------
    InputError
        If not exactly one of ``fraction`` and ``values`` is given, or a number is out of range.

    Examples
    --------
    >>> Side(fraction=0.2).by, Side(by="release", values=("R5",)).values
    ('subject', ('R5',))
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    by: str = "subject"
    """The column whose values are the groups; or ``"block"``, which always means stretches of time."""
    fraction: float | None = None
    """Part of the groups that are left to this side; the nearest whole number of them, at least one."""
    values: tuple[str, ...] = ()
    """Names of the groups; blocks are named ``"0"``, ``"1"``, ... in time."""
    n_blocks: int = 10
    """For ``by="block"``: every recording's windows are cut in time into so many blocks, of equally
    many windows to within one. Block 0 of one recording and of another are one group."""

    def __post_init__(self) -> None:
        check_names("values", self.values)
        if (self.fraction is None) == (not self.values):
            raise InputError(
                f"A side takes a fraction or values, not fraction={self.fraction} and values={self.values}. "
                "Give one of the two."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InputError(f"fraction is {self.fraction}, and must be above 0 and at most 1. Use 0.2.")
        if self.n_blocks < 2:
            raise InputError(f"n_blocks is {self.n_blocks}, and must be at least 2. Use 10.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What the sides take, in the order test, valid, train.

    A fraction is of the groups in an order of their own: by a hash of seed, column and name. Two
    groups keep that order whatever other groups there are. So when recordings are added, a
    group changes sides only where the end of a side passes over it; values by name never do.

    Raises
    ------
    InputError
        If a side is no `Side`, or the gap is negative or not finite.

    Examples
    --------
    >>> Split(test=Side(by="release", values=("R5",)), valid=Side(fraction=0.1)).train is None
    True
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    test: Side | None = None
    """What the model is scored on, or None."""
    valid: Side | None = None
    """What training is stopped and models are chosen by, or None."""
    train: Side | None = None
    """What the model is fitted to, or None for all the rest."""
    seed: int = 0
    """Which groups a fraction takes."""
    within_subject: bool = False
    """True to allow a subject on two sides: the score then says nothing about unseen people."""
    gap_s: float = 0.0
    """Seconds that two sides stay apart within a recording."""

    def __post_init__(self) -> None:
        for name in ("test", "valid", "train"):
            side = getattr(self, name)
            if not isinstance(side, Side | None):
                raise InputError(f"{name}={side!r} is no side. Write for example {name}=Side(fraction=0.2).")
        if not 0 <= self.gap_s < math.inf:
            raise InputError(f"gap_s is {self.gap_s}, and must be a finite time from 0 up. Use 0.")


@dataclass(frozen=True, slots=True, eq=False)
class Sides(Mapping[str, WindowIndex]):
    """The sides of a split: a mapping of those that there are, train first."""

    train: WindowIndex
    """What the model is fitted to."""
    valid: WindowIndex | None
    """What training is stopped and models are chosen by."""
    test: WindowIndex | None
    """What the model is scored on."""
    unused: Mapping[str, int]
    """Windows on no side, by reason: ``"gap"`` (too near to a side that goes first) and ``"not
    named"`` (taken by no side)."""
    within_subject: bool
    """True if there is a subject on two sides."""
    n_subjects: Mapping[str, int]
    """Subjects on each side."""

    def __getitem__(self, side: str) -> WindowIndex:
        index = {"train": self.train, "valid": self.valid, "test": self.test}.get(side)
        if index is None:
            raise KeyError(side)
        return index

    def __iter__(self) -> Iterator[str]:
        return (side for side in ("train", "valid", "test") if getattr(self, side) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


_TAKEN = ("test", "valid", "train")
"""The order in which sides take their windows; one that is nearer to the front keeps what is shared."""

_LEFT, _GAP = -1, -2


def split_index(index: WindowIndex, split: Split) -> Sides:
    """Share out windows among training, validation and test.

    Windows of one recording that share a sample of any signal, or lie less than ``gap_s`` apart,
    are never on two sides: train gives way to valid, and both to test. Windows with no value in
    a column are in none of its groups.

    Parameters
    ----------
    index
        The windows.
    split
        What each side takes.

    Returns
    -------
    Sides
        The windows of each side, numbered anew, and how many are on none.

    Raises
    ------
    InputError
        If there is no such column or group, a side is left without windows, or a subject is on
        two sides and ``within_subject`` is False.

    Examples
    --------
    >>> import numpy as np, pyarrow as pa
    >>> from engram.windows import FixedWindows, SignalTable, Tables
    >>> from engram.windows.index import build_index
    >>> eeg = SignalTable(
    ...     present=np.ones(5, bool),
    ...     n_samples=np.full(5, 1000),
    ...     rate_hz=np.full(5, 100.0),
    ...     start_s=np.zeros(5),
    ...     form=np.zeros(5, np.int32),
    ...     forms=("2 channels (C3, C4), float16",),
    ... )
    >>> events = pa.table({"recording": [], "onset_s": [], "duration_s": [], "description": []})
    >>> ids = ("a", "b", "c", "d", "e")
    >>> tables = Tables(ids, ids, {"subject": ids}, {"eeg": eeg}, events)
    >>> index = build_index(tables, FixedWindows(signal="eeg", window_size_s=1.0))
    >>> sides = split_index(index, Split(test=Side(values=("b",)), valid=Side(fraction=0.25)))
    >>> {name: len(side) for name, side in sides.items()}
    {'train': 30, 'valid': 10, 'test': 10}
    """
    side_of = np.full(len(index), _LEFT, np.int8)
    for number, name in enumerate(_TAKEN):
        side: Side | None = getattr(split, name)
        is_left = side_of == _LEFT
        if side is not None:
            side_of[is_left & _belongs(index, side, split.seed, is_left)] = number
        elif name == "train":
            side_of[is_left] = number
    _leave_gaps(index, side_of, split.gap_s)

    taken = {name: index.take(side_of == number) for number, name in enumerate(_TAKEN)}
    for name, windows in taken.items():
        if not len(windows) and (name == "train" or getattr(split, name) is not None):
            raise InputError(_nothing_left(name, side_of))
    subjects = {name: _subjects_of(windows) for name, windows in taken.items()}
    shared = _shared(subjects)
    if shared and not split.within_subject:
        raise InputError(_on_two_sides(shared, subjects))
    return Sides(
        train=taken["train"],
        valid=taken["valid"] if split.valid else None,
        test=taken["test"] if split.test else None,
        unused={"gap": int((side_of == _GAP).sum()), "not named": int((side_of == _LEFT).sum())},
        within_subject=bool(shared),
        n_subjects={name: len(subjects[name]) for name in reversed(_TAKEN) if len(taken[name])},
    )


def _belongs(index: WindowIndex, side: Side, seed: int, is_left: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which windows are of the groups that a side takes."""
    codes, names = _groups(index, side)
    if side.values:
        present = {names[code] for code in np.unique(codes)} - {None}
        if unknown := [value for value in side.values if value not in present]:
            some = ", ".join(itertools.islice(sorted(filter(None, present)), 10))
            raise InputError(
                f"No window has {side.by} {unknown[0]!r}. Name some of its {len(present)} values: {some}."
            )
        named = set(side.values)
        wanted = [code for code, name in enumerate(names) if name in named]
    else:
        left = [int(code) for code in np.unique(codes[is_left]) if names[code] is not None]
        left.sort(key=lambda code: _place(seed, side.by, names[code]))
        assert side.fraction is not None
        # Halves go up, as wherever Engram rounds.
        wanted = left[: max(1, math.floor(side.fraction * len(left) + 0.5))]
    is_wanted = np.zeros(len(names), np.bool_)
    is_wanted[wanted] = True
    return is_wanted[codes]


def _place(seed: int, by: str, name: str | None) -> bytes:
    """Give a group's place in the order of the groups: a hash, the same wherever it is computed."""
    return hashlib.blake2b(repr((int(seed), by, name)).encode(), digest_size=16).digest()


def _groups(index: WindowIndex, side: Side) -> tuple[NDArray[np.int32], tuple[str | None, ...]]:
    """Give each window's group, and the groups' names."""
    if side.by == "block":
        return _blocks(index, side.n_blocks), tuple(str(block) for block in range(side.n_blocks))
    column = index.subjects() if side.by == "subject" else index.column(side.by)
    return column.codes, column.values


def _blocks(index: WindowIndex, n_blocks: int) -> NDArray[np.int32]:
    """Give each window's block of its recording; windows are numbered by recording, then time."""
    codes = index.column("recording").codes
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    sizes = np.diff(np.append(begins, len(codes)))
    places = np.arange(len(codes)) - np.repeat(begins, sizes)
    blocks: NDArray[np.int64] = places * n_blocks // np.repeat(sizes, sizes)
    return blocks.astype(np.int32)


_TICKS_HZ = 1_000_000
"""Times are compared in whole microseconds.

Fine for signals up to 500 kHz, and coarse enough that two windows of which one ends where the
other begins do so in either's arithmetic, to within one.
"""

_CHUNK = 1 << 18
"""Windows that are located at once: some MiB."""


def _leave_gaps(index: WindowIndex, side_of: NDArray[np.int8], gap_s: float) -> None:
    """Mark the windows that share samples with, or lie too near to, a side that goes first."""
    codes = index.column("recording").codes
    if not len(codes):
        return
    is_present = np.zeros((int(codes.max()) + 1, len(_TAKEN)), np.bool_)
    for number in range(len(_TAKEN)):
        is_present[codes[side_of == number], number] = True
    # Split by subject, no recording is on two sides, and nothing has to be compared.
    numbers = np.flatnonzero((is_present.sum(axis=1) > 1)[codes] & (side_of != _LEFT))
    if not len(numbers):
        return
    gap = round(gap_s * _TICKS_HZ)
    start, stop = _on_one_line(codes[numbers], *_extents(index, numbers), gap)
    sides = side_of[numbers]
    is_kept = sides == 0
    for number in range(1, len(_TAKEN)):
        mine = np.flatnonzero(sides == number)
        near = _is_near(start[mine], stop[mine], start[is_kept], stop[is_kept], gap)
        side_of[numbers[mine[near]]] = _GAP
        is_kept[mine[~near]] = True


def _extents(index: WindowIndex, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give where windows start and stop on their recordings' clocks, shifted at most, in ticks."""
    start = np.empty(len(numbers), np.int64)
    stop = np.empty(len(numbers), np.int64)
    for first in range(0, len(numbers), _CHUNK):
        part = slice(first, first + _CHUNK)
        located = index.locate(numbers[part])
        starts, stops = [], []
        for name in index.spec.signals:
            signal, samples = index.tables.signals[name], located.starts[name]
            rate_hz, start_s = signal.rate_hz[located.recording], signal.start_s[located.recording]
            shift_s = index.spec.shift_s or (index.spec.shift_samples or 0) / rate_hz
            starts.append(start_s + samples / rate_hz - shift_s)
            stops.append(start_s + (samples + located.lengths[name]) / rate_hz + shift_s)
        start[part] = np.rint(np.min(starts, axis=0) * _TICKS_HZ)
        # One tick less, since two windows that touch may seem to share one.
        stop[part] = np.rint(np.max(stops, axis=0) * _TICKS_HZ) - 1
    return start, stop


def _on_one_line(
    codes: NDArray[np.int32], start: NDArray[np.int64], stop: NDArray[np.int64], gap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay recordings one after another, more than a gap apart, so that one comparison does for all."""
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    first, last = np.minimum.reduceat(start, begins), np.maximum.reduceat(stop, begins)
    steps = last - first + gap + 1
    moves = np.cumsum(steps) - steps - first
    moved = np.repeat(moves, np.diff(np.append(begins, len(codes))))
    return start + moved, stop + moved


def _is_near(
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    other_start: NDArray[np.int64],
    other_stop: NDArray[np.int64],
    gap: int,
) -> NDArray[np.bool_]:
    """Tell which stretches overlap any of some others, or lie less than a gap from one."""
    if not len(other_start):
        return np.zeros(len(start), np.bool_)
    by_start = np.argsort(other_start, kind="stable")
    reach = np.maximum.accumulate(other_stop[by_start])
    n_before = np.searchsorted(other_start[by_start], stop + gap)
    return (n_before > 0) & (reach[n_before - 1] > start - gap)


def _subjects_of(windows: WindowIndex) -> frozenset[str | None]:
    """Name the subjects of some windows."""
    column = windows.subjects()
    return frozenset(column.values[code] for code in np.unique(column.codes))


def _shared(subjects: Mapping[str, frozenset[str | None]]) -> list[str | None]:
    """Name the subjects that are on two sides."""
    pairs = itertools.combinations(subjects.values(), 2)
    return sorted(frozenset[str | None]().union(*(one & other for one, other in pairs)), key=str)


def _on_two_sides(shared: list[str | None], subjects: Mapping[str, frozenset[str | None]]) -> str:
    """Say which subjects are on which sides."""
    some = [
        f"{subject} ({', '.join(name for name in reversed(_TAKEN) if subject in subjects[name])})"
        for subject in shared[:3]
    ]
    more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
    return (
        f"On two sides: {', '.join(some)}{more}. A score would not show how well people are predicted "
        "that the model has not seen. If that is meant, set within_subject = true."
    )


def _nothing_left(name: str, side_of: NDArray[np.int8]) -> str:
    """Say where the windows are that a side has none of."""
    counts = [f"{other} {int((side_of == number).sum())}" for number, other in enumerate(_TAKEN)]
    return (
        f"No window is left for {name}: of {len(side_of)} windows, {', '.join(counts)}, too near "
        f"{int((side_of == _GAP).sum())}, not named {int((side_of == _LEFT).sum())}. Give the others less."
    )
