"""Batch: what a loader hands to a training step, as tensors with names.

This module decides the shape of a batch and nothing else: which windows are in it is the
order's, where their samples come from ``engram.batches.reading``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some windows, side by side.

    May be unpacked as braindecode's batches are: ``for X, y, numbers in loader``.

    Examples
    --------
    >>> eeg = torch.zeros(2, 3, 100)
    >>> batch = Batch({"eeg": eeg}, {"eeg": torch.tensor([100, 80])}, torch.zeros(2, 1), torch.arange(2), 2)
    >>> len(batch), batch.X.shape, batch.lengths["eeg"].tolist()
    (2, torch.Size([2, 3, 100]), [100, 80])
    >>> X, y, numbers = batch
    """

    signals: Mapping[str, Tensor]
    """What the model is given, by signal: (window, channel, time) where the stored axes are (time,
    channel), else (window, time, \\*sample shape); float32 in the signal's unit, or the stored
    integers. Shorter windows are followed by zeros. The signal that is the target is ``y``."""
    lengths: Mapping[str, Tensor]
    """(window,) int64 by signal, the target's too: samples of each window, without the zeros."""
    y: Tensor | None
    """Target: (window, 1) float32 for regression, (window,) int64 for classification, a signal
    laid out like ``signals`` where that is the target, None where there is none."""
    numbers: Tensor
    """(window,) int64 numbers of the windows in their index."""
    n_global: int
    """Windows of the whole batch over all ranks; ``len(batch)`` are this rank's."""
    y_time_axis: int = 1
    """Which axis of ``y`` is time, where a signal is the target: 2 where channels come before it."""

    @property
    def X(self) -> Tensor | dict[str, Tensor]:  # noqa: N802 - braindecode's and scikit-learn's word
        """The tensor of the one signal, or all of them by name where there are several."""
        if len(self.signals) == 1:
            return next(iter(self.signals.values()))
        return dict(self.signals)

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor] | None]:
        return iter((self.X, self.y, self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.signals.values(), *self.lengths.values(), self.numbers]
        return sum(tensor.nbytes for tensor in (*tensors, *([] if self.y is None else [self.y])))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy to a device.

        Parameters
        ----------
        device
            Where to, such as ``"cuda"``.
        non_blocking
            Do not wait for copies from pinned memory.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory, from which a GPU copies without the CPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            {name: change(tensor) for name, tensor in self.signals.items()},
            {name: change(tensor) for name, tensor in self.lengths.items()},
            None if self.y is None else change(self.y),
            change(self.numbers),
            self.n_global,
            self.y_time_axis,
        )
