"""Loader: the batches of an order, one after another, within a memory budget.

This module decides how much a loader holds, and where it is in its order. What is read ahead of
the caller, ``engram.batches.engine`` decides.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from engram.batches.batch import Batch
from engram.batches.engine import AHEAD_BATCHES, SPARE_SLOTS, Engine, Sizes
from engram.batches.reading import Dtype, Reads
from engram.errors import DoesNotFit, InputError
from engram.memory import binding_limit, read_usage
from engram.memory.budget import Budget
from engram.store.gather import Ranges, hint, is_cached
from engram.units import format_bytes
from engram.windows.order import Cursor, Order, whole_number

if TYPE_CHECKING:
    from engram.batches.windows import Windows

__all__ = ["Check", "Loader", "shared_budget"]

Check: TypeAlias = Literal["crc"]
"""What is compared while windows are read: every block that is touched with its CRC32C."""


_PLACED_WINDOWS, _PLACED_BATCHES, _PLACED_BYTES = 2048, 64, 256
"""Windows whose numbers and places are computed at once, in so many batches at most, where eight batches have
fewer: NumPy takes hardly longer for 2,048 than for 512. And what is known of each per signal meanwhile."""

_FAR_LARGER = 4
"""Times what memory leaves: of less data, the page cache has much again in the next epoch."""


class Loader:
    """Batches of windows, epoch after epoch.

    Iterating gives the batches of one epoch; iterating again gives those of the next, or, where
    the last pass was broken off, the same epoch from its start. After ``load_state_dict`` the
    next pass goes on where that state was taken.

    Parameters
    ----------
    windows
        What is read. Their store stays the caller's to close.
    order
        Which windows each batch holds.
    budget
        What the loader may hold; None: ``shared_budget`` of what there is.
    dtype
        What a model is given: ``"float32"`` or ``"bfloat16"``; None: float32 where floats are stored,
        else the stored integers. A target keeps its own.
    check
        ``"crc"``: compare every block of 128 KiB that a window touches with its checksum first; None:
        trust the disk.
    threads
        How many read; None: as many as there are cores for this process, at most 4; two past the page
        cache even on one core.
    rank, world
        This process's number among those that share every batch, and how many there are: rank r
        gets rows r, r + world, ... of each batch.
    is_drawn
        Whether crops and shifts of windows are drawn anew in every pass, as in training
        (``FixedWindows.crop_s``, ``shift_s``); False: their middles, not shifted.
    is_direct
        Whether windows are read past the page cache, which ``check`` cannot be; None: where they are far
        more than memory leaves, and it can be done.

    Raises
    ------
    DoesNotFit
        If index, order and two batches take more than the budget leaves.
    InputError
        If the order is not of these windows, there is no such rank, or a setting is out of range.

    Notes
    -----
    The same batches in the same order in every process and after ``fork`` or pickling, whatever
    the budget and the number of threads. A batch owns its memory: hold on to it for as long as
    you like; what is held beyond the one in use and the one before it is beside the budget. Several
    loaders of the same windows do not disturb each other; one loader is for one thread. An error
    of the store is raised in the place of the batch that could not be read.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> source = engram.ArraySource({"a": engram.ArrayRecording({"eeg": eeg})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=1.0))
    ...     loader = windows.loader(batch_size=4)
    ...     shapes = [tuple(X.shape) for X, y, numbers in loader]
    ...     store.close()
    >>> len(loader), shapes
    (3, [(4, 4, 100), (4, 4, 100), (2, 4, 100)])
    """

    def __init__(
        self,
        windows: Windows,
        order: Order,
        *,
        budget: Budget | None = None,
        dtype: Dtype | None = None,
        check: Check | None = None,
        threads: int | None = None,
        rank: int = 0,
        world: int = 1,
        is_drawn: bool = False,
        is_direct: bool | None = None,
    ) -> None:
        check_place(windows, order, rank, world)
        check_settings(dtype, check, threads)
        if is_direct and check is not None:
            raise InputError(f"check={check!r} reads through the page cache. Leave is_direct out.")
        self.windows = windows
        """What is read."""
        self.order = order
        """Which windows each batch holds."""
        self.rank, self.world = rank, world
        """This process's number, and how many share every batch."""
        self.dtype = dtype
        """What a model is given, if not what is stored."""
        self.check = check
        """What is compared while windows are read."""
        self.is_drawn = is_drawn
        """Whether crops and shifts are drawn anew in every pass."""
        self.is_direct = (
            check is None and _is_cache_useless(windows, order) and windows.can_be_read_directly()
            if is_direct is None
            else is_direct
        )
        """Whether windows are read past the page cache."""
        budget = budget or shared_budget(None, windows, order)
        try:
            plan = _plan(self, budget, threads)
        except DoesNotFit:
            if is_direct or not self.is_direct:
                raise
            self.is_direct = False  # it wants some megabytes more
            plan = _plan(self, budget, threads)
        self.sizes, self.budget = plan
        """How many batches are held and how many threads read; what was allowed, and the lines that
        the loader plans to hold."""
        self._place = 0, 0  # epoch, and batches of it handed out
        self._is_loaded = False
        self._n_set = 0  # how often the place was
        self._hits: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.order.n_batches

    def __repr__(self) -> str:
        return f"Loader({len(self)} batches of {self.order.batch_size}, {self.order.mode}; {self.windows!r})"

    def __iter__(self) -> Iterator[Batch]:
        # A generator: its first lines run when its first batch is asked for. Lightning makes
        # iterators that it never uses, and they must not use up a place that was loaded.
        epoch, n_batches = self._place
        first, self._is_loaded = n_batches if self._is_loaded else 0, False
        n_set = self._n_set
        share = Share(
            self.windows,
            self.order,
            epoch,
            self.rank,
            self.world,
            self.dtype,
            self.check,
            self.is_direct,
            self.is_drawn,
            self._hits,
        )
        numbers = range(first, len(self))
        batches = iter(Engine(share, numbers, self.sizes))
        for number in numbers:
            # No name for the batch: its memory is used again once the caller lets go of it.
            yield self._moved(n_set, epoch, number, next(batches))

    def _moved(self, n_set: int, epoch: int, number: int, batch: Batch) -> Batch:
        """Move the cursor past a batch, before it is handed out, unless it was set since the pass began.

        Nobody may ask again after the last one: Lightning, which knows the length, does not.
        """
        is_last = number + 1 == len(self)
        if n_set == self._n_set:
            self._place = (epoch + 1, 0) if is_last else (epoch, number + 1)
        return batch

    def _set(self, epoch: int, n_batches: int, *, is_loaded: bool) -> None:
        self._place, self._is_loaded = (epoch, n_batches), is_loaded
        self._n_set += 1

    @property
    def cursor(self) -> Cursor:
        """The place after the last batch handed out; after an epoch's last batch, the next epoch.

        After ``set_epoch`` or ``load_state_dict``, passes that were under way move it no more.
        """
        return Cursor(self.order.fingerprint, *self._place)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens if the cursor is within it.

        Parameters
        ----------
        epoch
            From 0.

        Raises
        ------
        InputError
            If it is no whole number, or below 0.
        """
        epoch = whole_number("epoch", epoch)
        if epoch != self._place[0]:
            self._set(epoch, 0, is_loaded=False)

    def state_dict(self) -> dict[str, str | int]:
        """Give the cursor as a plain dict of text and whole numbers."""
        return self.cursor.to_dict()

    def load_state_dict(self, state: Mapping[str, str | int]) -> None:
        """Go on from where a state was taken.

        Parameters
        ----------
        state
            What ``state_dict`` gave.

        Raises
        ------
        InputError
            If it belongs to another order: other windows, batch size, mode or seed.
        """
        cursor = Cursor.from_dict(state)
        self.order.check(cursor)
        if cursor.n_batches == len(self):  # as who counts the batches alone says of a whole epoch
            self._set(cursor.epoch + 1, 0, is_loaded=True)
        else:
            self._set(cursor.epoch, cursor.n_batches, is_loaded=True)


def _is_cache_useless(windows: Windows, order: Order) -> bool:
    """Say whether large pieces are read at random, each once, of far more data than memory could keep."""
    return (
        order.mode in ("shuffled", "groups", "lengths")  # the others read on, or the same again
        # Without what SLURM allows: nobody bounds the page cache by it.
        and windows.stored_bytes > _FAR_LARGER * binding_limit(env={}).free_bytes
        and windows.is_in_large_pieces
    )


def check_place(windows: Windows, order: Order, rank: int, world: int) -> None:
    """Refuse an order of other windows, and a rank that there is not.

    Raises
    ------
    InputError
        If either is the case.
    """
    if order.index_fingerprint != windows.index.fingerprint:
        raise InputError(
            f"The order is of {order.n_windows} windows ({order.index_fingerprint}), not of these "
            f"{len(windows)} ({windows.index.fingerprint}). Make it with windows.order(...)."
        )
    world = whole_number("world", world, 1, 2**31)
    whole_number("rank", rank, 0, world - 1)


def check_settings(dtype: Dtype | None, check: Check | None, threads: int | None) -> None:
    """Refuse settings that there are not.

    Raises
    ------
    InputError
        If one is none.
    """
    for name, value, choices in (("dtype", dtype, get_args(Dtype)), ("check", check, get_args(Check))):
        if value is not None and value not in choices:
            raise InputError(f"There is no {name}={value!r}. Use None or one of: {', '.join(choices)}.")
    if threads is not None:
        whole_number("threads", threads, 1, 2**10)


_ENOUGH_HITS, _HITS_APART = 256, 8
"""Windows in a row that have to be found in the page cache: where one in fifty is not there, that happens
once in 180 times. And from then on, how many pieces apart one is looked at: to look is a tenth of a batch's
Python."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's rows of the batches of one epoch: what an engine reads from."""

    windows: Windows
    """What is read."""
    order: Order
    """Which windows each batch holds."""
    epoch: int
    """Of the order."""
    rank: int = 0
    """This process's number among those that share every batch."""
    world: int = 1
    """How many they are."""
    dtype: Dtype | None = None
    """What a model is given, if not what is stored."""
    check: Check | None = None
    """What is compared while windows are read."""
    is_direct: bool = False
    """Whether windows are read past the page cache."""
    is_drawn: bool = False
    """Whether crops and shifts are drawn anew in every pass."""
    hits: Counter[str] = field(default_factory=Counter)
    """By signal, from pass to pass: pieces in a row, each of what is read at once, that the page cache had,
    or is taken to have."""

    def find(self, numbers: Sequence[int]) -> Iterator[Reads]:
        """Say what has to be read for batches, ascending; of some there may be no row for this rank."""
        n_global, mine = [], []
        for whole in self.order.batches(self.epoch, numbers):
            n_global.append(len(whole))
            mine.append(whole[self.rank :: self.world].copy())  # or the other ranks' rows are held, too
        index, offset = self.windows.index, None
        if self.is_drawn and index.is_drawn:
            offset = index.draw(np.concatenate(mine), self.order.seed, self.epoch)
        yield from self.windows.find_each(mine, n_global, dtype=self.dtype, offset=offset)

    def hint(self, ranges: Ranges) -> None:
        """Let the kernel read some of it ahead, if the page cache is used and does not seem to have it."""
        backend = self.windows.store.backend
        if self.is_direct:
            return
        # Asking for what is there already takes a sixteenth of all the processor time.
        # By signal: else every eighth piece might always be of the same one.
        signal = ranges.first.signal
        is_known = self.hits[signal] > _ENOUGH_HITS and self.hits[signal] % _HITS_APART != 0
        is_there = is_known or (self.check is None and is_cached(backend, ranges))
        self.hits[signal] = self.hits[signal] + 1 if is_there else 0
        if self.hits[signal] <= _ENOUGH_HITS:
            hint(backend, ranges, is_checked=self.check is not None)

    def fill(self, reads: Reads, buffer: NDArray[np.uint8], progress: Callable[[Ranges], None]) -> Batch:
        """Read a batch into a buffer."""
        return self.windows.fill(
            reads,
            buffer,
            is_checked=self.check is not None,
            is_direct=self.is_direct,
            progress=progress,
        )


def shared_budget(memory: int | str | None, windows: Windows, order: Order) -> Budget:
    """Make a budget of the whole process tree, with a line for what it holds already.

    Parameters
    ----------
    memory
        What the tree may hold, as bytes or text such as ``"2 GB"``; None: 80 % of what there is.
    windows, order
        Of the loader: they and the store's tables are held already, and are lines of its own.

    Raises
    ------
    DoesNotFit
        If the process holds more than that without a loader.
    """
    own_bytes = windows.tables_bytes + windows.index.n_bytes + order.n_bytes
    held_bytes = read_usage().unreclaimable_bytes - own_bytes
    return Budget.of(memory).spend("this process", max(0, held_bytes))


def _plan(loader: Loader, budget: Budget, threads: int | None) -> tuple[Sizes, Budget]:
    """Choose how much is read ahead; if two batches are too many, name the batch size that fits."""
    windows, order = loader.windows, loader.order
    n_rows = -(-min(order.batch_size, order.n_windows) // loader.world)
    n_signals = len(windows.index.spec.signals)
    # Beside the signals: numbers, target and lengths; and what was found out about it beforehand.
    row_bytes, found_bytes = 8 * (2 + n_signals), windows.found_bytes
    slot_bytes = windows.batch_bytes(n_rows, loader.dtype)
    scratch_bytes = windows.scratch_bytes(
        loader.dtype, is_checked=loader.check is not None, is_direct=loader.is_direct
    )
    held = {"tables of the store": windows.tables_bytes}
    held |= {"index of windows": windows.index.n_bytes, "order": order.n_bytes}
    if loader.check is not None:
        held["checksums"] = sum(checksums.nbytes for checksums in windows.store.checksums.values())
    if scales_bytes := windows.scales_bytes:
        held["scales of int16"] = scales_bytes
    placed_bytes = n_signals * _PLACED_BYTES * min(_PLACED_WINDOWS, order.n_windows)
    left_bytes = budget.left_bytes - sum(held.values()) - placed_bytes - AHEAD_BATCHES * n_rows * found_bytes
    of_slot = _with_pages(slot_bytes + n_rows * row_bytes)
    # Past the page cache two at least: while one waits for its last windows, the other's are read.
    n_threads = threads or max(1 + loader.is_direct, min(4, _count_cores()))
    while (n_slots := (left_bytes - n_threads * scratch_bytes) // of_slot) <= n_threads and n_threads > 1:
        n_threads -= 1
    sizes = Sizes(
        max(2, min(n_slots, n_threads + SPARE_SLOTS, order.n_batches)),
        slot_bytes,
        n_threads,
        max(AHEAD_BATCHES, min(_PLACED_WINDOWS // n_rows, _PLACED_BATCHES)),
    )
    held["windows looked up ahead"] = placed_bytes + AHEAD_BATCHES * n_rows * found_bytes
    held[f"{sizes.n_slots} batches of {n_rows} windows"] = sizes.n_slots * of_slot
    held[f"buffers of {n_threads} threads"] = n_threads * scratch_bytes
    if n_slots < 2:

        def needed_bytes(n: int) -> int:
            signals_bytes = windows.batch_bytes(n, loader.dtype)
            return AHEAD_BATCHES * n * found_bytes + 2 * _with_pages(signals_bytes + n * row_bytes)

        for_rows = left_bytes + AHEAD_BATCHES * n_rows * found_bytes - scratch_bytes
        n_fitting = bisect_right(range(1, n_rows), for_rows, key=needed_bytes)
        raise _does_not_fit(budget, held, n_fitting * loader.world)
    for name, n_bytes in held.items():
        budget = budget.spend(name, n_bytes)
    return sizes, budget


def _with_pages(n_bytes: int) -> int:
    """Count the page table's entries too: 8 bytes for a page of 4 KiB."""
    return n_bytes + n_bytes // 512


def _count_cores() -> int:
    """Count the cores that this process may use: a SLURM job has some of a node's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _does_not_fit(budget: Budget, lines: Mapping[str, int], batch_size: int) -> DoesNotFit:
    lines = {**{line.name: line.n_bytes for line in budget.spendings}, **lines}
    needed_bytes = sum(lines.values())
    shown = ", ".join(f"{name} {format_bytes(n_bytes)}" for name, n_bytes in lines.items())
    remedy = (
        f"Use batch_size={batch_size} or less"
        if batch_size > 0
        # Megabytes, rounded up: a figure that can be typed in.
        else f"Raise the memory budget to at least {-(-needed_bytes // 10**6)} MB"
    )
    return DoesNotFit(
        f"The loader does not fit: {shown}. {remedy}",
        resource="memory",
        needed_bytes=needed_bytes,
        allowed_bytes=budget.allowed_bytes,
    )
