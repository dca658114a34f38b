"""Datasets: windows for PyTorch's own ``DataLoader``, skorch and braindecode.

This module decides what one item is (braindecode's: samples, target, place in the trial) and how
worker processes share an order. Batches in order and within a budget, without workers, are
``engram.batches.loader``'s.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from engram.batches.batch import Batch
from engram.batches.engine import Engine, Sizes
from engram.batches.loader import Share, check_place, check_settings
from engram.batches.reading import Dtype
from engram.windows.cutting import Located
from engram.windows.order import Order, whole_number

if TYPE_CHECKING:
    from engram.batches.windows import Windows

__all__ = ["Item", "WindowDataset", "WindowStream"]

_N_SLOTS = 3
"""Batches that each worker holds: in use, ready, and in work. DataLoader holds more of them on its own."""

Item: TypeAlias = tuple[Any, Any, list[int]]
"""X, y and [i_window_in_trial, i_start_in_trial, i_stop_in_trial]; see ``WindowDataset``."""


class WindowDataset(Dataset[Item]):
    """Windows by number, as braindecode's windowed datasets give them.

    Items are ``(X, y, [i_window_in_trial, i_start_in_trial, i_stop_in_trial])``: X float32
    (channel, time), or a dict of such arrays by signal where there are several; y an int for
    classification, float32 (1,) for regression (so that a batch of them has the shape of a
    model's output), a signal's float32 samples, or -1 without a target. The interval is of the
    main signal's samples within its recording.

    Parameters
    ----------
    windows
        What is read. Their store stays the caller's to close.

    Notes
    -----
    Safe in workers of a ``DataLoader`` that fork or spawn. ``__getitems__`` reads a whole batch
    at once; the stock ``DataLoader`` calls it.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> eeg = engram.ArraySignal(np.ones((1000, 4), "float32"), 100.0)
    >>> source = engram.ArraySource({"a": engram.ArrayRecording({"eeg": eeg})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     dataset = store.windows(FixedWindows(signal="eeg", window_size_s=1.0)).dataset()
    ...     X, y, place = dataset[2]
    ...     store.close()
    >>> len(dataset), X.shape, X.dtype, place
    (10, (4, 100), dtype('float32'), [2, 200, 300])
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        """What is read."""

    def __len__(self) -> int:
        return len(self.windows)

    def __repr__(self) -> str:
        return f"WindowDataset({self.windows!r})"

    def __getitem__(self, number: int) -> Item:
        """Read one window; negative numbers count from the end."""
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            # IndexError ends ``for item in dataset``.
            raise IndexError(f"There is no window {number} among {len(self)}. Count from 0.")
        return self.__getitems__([number % len(self)])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """Read many windows at once."""
        wanted = np.asarray(numbers)
        located = self.windows.index.place(wanted)
        main = self.windows.index.spec.signal
        starts, stops = located.starts[main], located.starts[main] + located.lengths[main]
        places = np.stack([located.i_window_in_trial, starts, stops], axis=1).tolist()
        items: dict[int, Item] = {}
        # Windows of one length together: items are not padded.
        for rows in _by_length(located):
            batch = self.windows.read(wanted[rows])
            items |= {row: self._item(batch, i, places[row]) for i, row in enumerate(rows.tolist())}
        return [items[row] for row in range(len(wanted))]

    def _item(self, batch: Batch, row: int, place: list[int]) -> Item:
        arrays = {name: _float32(tensor[row]) for name, tensor in batch.signals.items()}
        X = arrays if len(arrays) > 1 else next(iter(arrays.values()))  # noqa: N806 - braindecode's word
        if batch.y is None:
            return X, -1, place
        return X, int(batch.y[row]) if self.windows.classes else _float32(batch.y[row]), place


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.numpy().astype(np.float32, copy=False)


def _by_length(located: Located) -> Iterator[NDArray[np.int64]]:
    lengths = np.stack(list(located.lengths.values()), axis=1)
    _, group = np.unique(lengths, axis=0, return_inverse=True)
    for number in range(int(group.max(initial=-1)) + 1):
        yield np.flatnonzero(group == number)


class WindowStream(IterableDataset[Batch]):
    """Whole batches in order, for a ``DataLoader`` with any number of workers.

    Use ``DataLoader(stream, batch_size=None, num_workers=n)``: the batches are those of the
    loader, in the same order, whatever n.

    Parameters
    ----------
    windows
        What is read. Their store stays the caller's to close.
    order
        Which windows each batch holds.
    dtype
        As for ``Loader``.
    rank, world
        This process's number among those that share every batch, and how many there are.

    Raises
    ------
    InputError
        If the order is not of these windows, or there is no such rank or dtype.

    Notes
    -----
    Safe in workers that fork or spawn. Every pass is of epoch 0 until ``set_epoch`` is called
    before a pass, as with PyTorch's ``DistributedSampler``.
    """

    def __init__(
        self,
        windows: Windows,
        order: Order,
        *,
        dtype: Dtype | None = None,
        rank: int = 0,
        world: int = 1,
        is_drawn: bool = False,
    ) -> None:
        check_place(windows, order, rank, world)
        check_settings(dtype, None, None)
        self.windows = windows
        """What is read."""
        self.order = order
        """Which windows each batch holds."""
        self.rank, self.world = rank, world
        """This process's number, and how many share every batch."""
        self.dtype = dtype
        """What a model is given, if not what is stored."""
        self.is_drawn = is_drawn
        """Whether crops and shifts are drawn anew in every pass."""
        # In shared memory, for workers that live on from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch's

    def __len__(self) -> int:
        return self.order.n_batches

    def __repr__(self) -> str:
        return f"WindowStream({self.order!r})"

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # DataLoader takes one batch of each worker in turn, so in turn they share the batches.
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = Share(
            self.windows,
            self.order,
            int(self._epoch),
            self.rank,
            self.world,
            self.dtype,
            is_drawn=self.is_drawn,
        )
        n_rows = -(-min(self.order.batch_size, self.order.n_windows) // self.world)
        sizes = Sizes(_N_SLOTS, self.windows.batch_bytes(n_rows, self.dtype), n_threads=1)
        yield from Engine(share, range(first, len(self), step), sizes)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the passes that begin from now on.

        Parameters
        ----------
        epoch
            From 0.

        Raises
        ------
        InputError
            If it is no whole number, or below 0.
        """
        self._epoch.fill_(whole_number("epoch", epoch))
