"""Reader: what a library has to do here, and what several of them do alike.

A reader writes the corpus in its own form, once, and then hands out batches. It may choose any
settings that its documentation offers. What it may not choose: 64 windows in a batch; float32
tensors (window, channel, time), contiguous, in memory of their own; float16 on disk (one reader
cannot, and says so); a new order of all windows in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, WINDOW_SAMPLES, Corpus
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""Numbers of the windows (window,) int64, and their samples (window, channel, time) float32."""

Kind: TypeAlias = Literal["engram", "as usual", "one by one", "whole batches", "no loader", "own loader"]
"""How a reader is asked: ``one by one`` by PyTorch's ``DataLoader``, window by window, and converts in a
``collate_fn`` of ours, or ``as usual``, with PyTorch's own; by ``DataLoader`` too for ``whole batches``, by
one call each; by a loop with ``no loader``; or it is a loader of its own."""


Regime: TypeAlias = Literal["warm", "capped", "overlap"]
"""``warm``: all in the page cache; ``capped``: memory for a sixth of it, and a cold cache; ``overlap``:
as capped, with windows at half a window's stride."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a reader is asked for."""

    folder: Path
    """Where its form of the corpus is."""
    starts: NDArray[np.int64]
    """(window,) first sample of every window in the corpus."""
    numbers: NDArray[np.int64]
    """(batch, row) numbers of windows: the order, epoch after epoch. Who has an order of his own
    shuffles as he can."""
    workers: int
    """Worker processes; 0: the reader works in the process that asks, or in threads of its own."""
    stride_samples: int = WINDOW_SAMPLES
    """From one window's start to the next one's."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One library with one set of settings."""

    name: str
    """What rows are called."""
    kind: Kind
    """How it is asked for windows."""
    settings: str
    """In a line: what is stored, and how it is read."""
    distribution: str
    """Whose version counts."""
    libraries: tuple[str, ...]
    """Modules that it needs; imported before the clock starts."""
    form: str
    """Folder of its store; readers of one form read the same files."""
    prepare: Callable[[Corpus, Path], None]
    """Write the corpus into a folder, which exists and is empty."""
    batches: Callable[[Request], Iterator[Batch]]
    """Hand out batches until the order ends."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes that it is measured with."""
    shuffle: str = "global"
    """What order the windows come in."""
    regimes: tuple[Regime, ...] = ("warm", "capped")
    """Where it is measured: ``overlap`` is for those that cut windows from recordings."""


def to_batch(windows: NDArray[np.float16]) -> Tensor:
    """Turn pre-cut windows (window, channel, time) into what is delivered."""
    import torch

    return _empty_batch(len(windows)).copy_(torch.from_numpy(windows))


def to_batch_transposed(windows: NDArray[np.float16]) -> Tensor:
    """Turn windows cut from recordings (window, time, channel) into what is delivered.

    One pass that converts and transposes: of seven ways in NumPy and PyTorch the fastest.
    """
    import torch

    return _empty_batch(len(windows)).copy_(torch.from_numpy(windows).transpose(1, 2))


def _empty_batch(n_windows: int) -> Tensor:
    """Make room for a batch; in a worker in shared memory, through which it leaves.

    So does PyTorch's ``default_collate``, whose lines these are. A batch that is made elsewhere is
    copied once more, and the worker grows to hundreds of megabytes.
    """
    import torch
    from torch.utils.data import get_worker_info

    shape = (n_windows, N_CHANNELS, WINDOW_SAMPLES)
    if get_worker_info() is None:
        return torch.empty(shape)
    out = torch.empty(0)
    storage = out._typed_storage()._new_shared(math.prod(shape), device=out.device)  # type: ignore[no-untyped-call]  # noqa: SLF001 - see above
    return out.new(storage).resize_(shape)


Item: TypeAlias = tuple[int, NDArray[np.float16]]


def collate(items: Sequence[Item]) -> Batch:
    """Stack pre-cut windows."""
    return _numbers(items), to_batch(np.stack([window for _, window in items]))


def collate_transposed(items: Sequence[Item]) -> Batch:
    """Stack windows cut from recordings."""
    return _numbers(items), to_batch_transposed(np.stack([window for _, window in items]))


def _numbers(items: Sequence[Item]) -> Tensor:
    import torch

    return torch.tensor([number for number, _ in items])


@dataclass(frozen=True, slots=True)
class Rows:
    """The numbers of each batch as a list, one after another: what a ``DataLoader`` takes as an order.

    One long order, so that nobody pays for the beginning of an epoch.
    """

    numbers: NDArray[np.int64]

    def __iter__(self) -> Iterator[list[int]]:
        return map(np.ndarray.tolist, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def load_with_torch(dataset: Any, request: Request, collate_fn: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Read a dataset window by window with PyTorch's ``DataLoader``, in the order asked for.

    Workers convert: handing over float16, for the process that asks to convert, is slower.
    """
    from torch.utils.data import DataLoader

    order = Rows(request.numbers)
    return iter(DataLoader(dataset, batch_sampler=order, num_workers=request.workers, collate_fn=collate_fn))


def load_batches_with_torch(dataset: Any, request: Request) -> Iterator[Batch]:
    """Read a dataset that takes the numbers of a whole batch, as ``load_with_torch``."""
    from torch.utils.data import DataLoader

    order = Rows(request.numbers)
    return iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=request.workers))


def forever(epoch: Callable[[int], Iterable[Batch]]) -> Iterator[Batch]:
    """Begin epoch after epoch: for loaders that make their own order."""
    for number in count():
        yield from epoch(number)
