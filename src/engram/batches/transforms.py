"""Transforms: noise, dropped channels and masked stretches, drawn for every window of every pass.

This module decides what is drawn; when, its caller does (``engram.training.learner``, or a loop of
your own). Every draw is a function of (seed, epoch, window): the same in whichever batch, process or
order a window comes, and the same after a training was resumed; a window that comes twice in a pass, as in
the mode ``balanced``, is changed twice alike. Crops and shifts in time are no
transforms: a window is read from another place, see ``FixedWindows.crop_s`` and ``shift_s``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram.windows.order import whole_number

__all__ = ["Draws", "add_noise", "drop_channels", "mask_time"]

_NOISE, _CHANNELS, _TIME = range(3)
"""What is drawn: each has random numbers of its own."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Where random numbers of a batch come from.

    NumPy's Philox counts instead of remembering: key (seed, epoch), counter (what is drawn, window).

    Examples
    --------
    >>> X = torch.ones(2, 4, 5)
    >>> one = drop_channels(X, 0.5, Draws(0, 0, torch.tensor([7, 3])))
    >>> other = drop_channels(X, 0.5, Draws(0, 0, torch.tensor([3, 9])))
    >>> torch.equal(one[1], other[0])
    True

    References
    ----------
    Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """

    seed: int
    """Of the training."""
    epoch: int
    """From 0."""
    numbers: Tensor
    """(window,) int64 numbers of the windows, on any device."""

    def generators(self, what: int) -> Iterator[np.random.Generator]:
        """Give a generator for each window.

        Parameters
        ----------
        what
            Is drawn; others have other numbers.
        """
        key = np.array([self.seed, self.epoch], np.uint64)
        for number in self.numbers.tolist():
            counter = np.array([0, 0, what, number], np.uint64)
            yield np.random.Generator(np.random.Philox(counter=counter, key=key))


def add_noise(X: Tensor, deviation: float, draws: Draws) -> Tensor:  # noqa: N803 - braindecode's word
    """Add Gaussian noise.

    Parameters
    ----------
    X
        (window, ...) floating point, in the signal's unit.
    deviation
        Of the noise, in the same unit.
    draws
        Of these windows.

    Returns
    -------
    Tensor
        A new one, of the same shape, type and device.
    """
    drawn = np.empty(X.shape, np.float32)
    for row, generator in enumerate(draws.generators(_NOISE)):
        generator.standard_normal(dtype=np.float32, out=drawn[row])
    return X + deviation * torch.from_numpy(drawn).to(X)


def drop_channels(X: Tensor, probability: float, draws: Draws) -> Tensor:  # noqa: N803 - braindecode's word
    """Set channels to zero, each with the same probability.

    Parameters
    ----------
    X
        (window, channel, time) floating point.
    probability
        With which a channel of a window is dropped.
    draws
        Of these windows.

    Returns
    -------
    Tensor
        A new one, of the same shape, type and device.
    """
    keep = np.empty(X.shape[:2], bool)
    for row, generator in enumerate(draws.generators(_CHANNELS)):
        keep[row] = generator.random(X.shape[1]) >= probability
    return X * torch.from_numpy(keep).to(X)[:, :, None]


def mask_time(X: Tensor, longest_samples: int, draws: Draws) -> Tensor:  # noqa: N803 - braindecode's word
    """Set one stretch of every window to zero, in all channels.

    Parameters
    ----------
    X
        (window, channel, time) floating point.
    longest_samples
        Most samples of a stretch. Every length from 0 on is as likely as another, and every place at which
        it is all within the window.
    draws
        Of these windows.

    Returns
    -------
    Tensor
        A new one, of the same shape, type and device.

    Raises
    ------
    InputError
        If ``longest_samples`` is no whole number, or below 0.
    """
    longest_samples = whole_number("longest_samples", longest_samples, 0, 2**62)
    n_times = X.shape[2]
    keep = np.ones((len(X), 1, n_times), bool)
    for row, generator in enumerate(draws.generators(_TIME)):
        length = int(generator.integers(min(longest_samples, n_times) + 1))
        first = int(generator.integers(n_times - length + 1))
        keep[row, :, first : first + length] = False
    return X * torch.from_numpy(keep).to(X)
