"""Loader: the batches of an order, one after another, within a memory budget.

This module decides what a loader holds and where it is in its order. It reads a batch when it
is asked for one, in the caller's process: nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from engram.batches.batch import Batch
from engram.errors import DoesNotFit, InputError
from engram.memory import read_usage
from engram.memory.budget import Budget
from engram.units import format_bytes
from engram.windows.order import Cursor, Order

if TYPE_CHECKING:
    from engram.batches.windows import Windows

__all__ = ["Loader", "shared_budget"]


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
    rank, world
        This process's number among those that share every batch, and how many there are: rank r
        gets rows r, r + world, ... of each batch.

    Raises
    ------
    DoesNotFit
        If index, order and batches take more than the budget leaves.
    InputError
        If the order is not of these windows, or there is no such rank.

    Notes
    -----
    The same batches in the same order in every process and after ``fork`` or pickling. Several
    loaders of the same windows do not disturb each other; one loader is for one thread.

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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_place(windows, order, rank, world)
        self.windows = windows
        """What is read."""
        self.order = order
        """Which windows each batch holds."""
        self.rank, self.world = rank, world
        """This process's number, and how many share every batch."""
        self.budget = _plan(windows, order, budget or shared_budget(None, windows, order), world)
        """What was allowed, and the lines that the loader plans to hold."""
        self._cursor = Cursor(order.fingerprint)
        self._is_loaded = False

    def __len__(self) -> int:
        return self.order.n_batches

    def __repr__(self) -> str:
        return f"Loader({len(self)} batches of {self.order.batch_size}, {self.order.mode}; {self.windows!r})"

    def __iter__(self) -> Iterator[Batch]:
        # A generator: its first lines run when its first batch is asked for. Lightning makes
        # iterators that it never uses, and they must not use up a place that was loaded.
        cursor = self._cursor if self._is_loaded else replace(self._cursor, n_batches=0)
        self._is_loaded, epoch = False, cursor.epoch
        for number in range(cursor.n_batches, len(self)):
            batch = read_share(self.windows, self.order, epoch, number, rank=self.rank, world=self.world)
            # Moved before the batch is handed out: nobody may ask again after the last one
            # (Lightning, which knows the length, does not).
            is_last = number + 1 == len(self)
            place = (epoch + 1, 0) if is_last else (epoch, number + 1)
            self._cursor = Cursor(self.order.fingerprint, *place)
            yield batch

    @property
    def cursor(self) -> Cursor:
        """The place after the last batch handed out; after an epoch's last batch, the next epoch."""
        return self._cursor

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens if the cursor is within it.

        Parameters
        ----------
        epoch
            From 0.

        Raises
        ------
        InputError
            If it is below 0.
        """
        if epoch < 0:
            raise InputError(f"There is no epoch {epoch}. Epochs count from 0.")
        if epoch != self._cursor.epoch:
            self._cursor, self._is_loaded = Cursor(self.order.fingerprint, epoch), False

    def state_dict(self) -> dict[str, str | int]:
        """Give the cursor as a plain dict of text and whole numbers."""
        return self._cursor.to_dict()

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
            cursor = Cursor(cursor.fingerprint, cursor.epoch + 1)
        self._cursor, self._is_loaded = cursor, True


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
    if not 0 <= rank < world:
        raise InputError(f"There is no rank {rank} among {world}. Use 0 <= rank < world.")


def read_share(windows: Windows, order: Order, epoch: int, number: int, *, rank: int, world: int) -> Batch:
    """Read one rank's rows of one batch of an order; there may be none."""
    whole = order.batch(epoch, number)
    return replace(windows.read(whole[rank::world]), n_global=len(whole))


def shared_budget(memory: int | str | None, windows: Windows, order: Order) -> Budget:
    """Make a budget of the whole process tree, with a line for what it holds already.

    Parameters
    ----------
    memory
        What the tree may hold, as bytes or text such as ``"2 GB"``; None: 80 % of what there is.
    windows, order
        Of the loader: they are held already, and are lines of its own.

    Raises
    ------
    DoesNotFit
        If the process holds more than that without a loader.
    """
    held_bytes = read_usage().unreclaimable_bytes - windows.index.n_bytes - order.n_bytes
    return Budget.of(memory).spend("this process", max(0, held_bytes))


def _plan(windows: Windows, order: Order, budget: Budget, world: int) -> Budget:
    """Spend the lines of a loader; what does not fit names the batch size that does."""
    n_rows = -(-min(order.batch_size, order.n_windows) // world)
    batch_bytes, scratch_bytes = windows.batch_bytes(n_rows)
    lines = {
        "index of windows": windows.index.n_bytes,
        "order": order.n_bytes,
        f"two batches of {n_rows} windows": 2 * batch_bytes,  # one is read while the last is in use
        "buffers while one is read": scratch_bytes,
    }
    needed_bytes = sum(lines.values())
    if needed_bytes > budget.left_bytes:
        per_batch_bytes = 2 * batch_bytes + scratch_bytes
        left_bytes = budget.left_bytes - (needed_bytes - per_batch_bytes)
        n_fitting = left_bytes * n_rows // per_batch_bytes
        raise _does_not_fit(budget, lines, n_fitting * world)
    for name, n_bytes in lines.items():
        budget = budget.spend(name, n_bytes)
    return budget


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
