"""Noise, dropped channels and masked stretches, drawn of seed, epoch and window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.batches.transforms import Draws, add_noise, drop_channels, mask_time
from engram.errors import InputError

TRANSFORMS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "noise": lambda x, draws: add_noise(x, 2.0, draws),
    "channels": lambda x, draws: drop_channels(x, 0.25, draws),
    "time": lambda x, draws: mask_time(x, 30, draws),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_drawn_is_of_seed_epoch_and_window_alone(name: str) -> None:
    """Whatever else is in the batch and in which row; another pass, seed or window has other draws."""
    transform = TRANSFORMS[name]
    x = torch.ones(40, 8, 100)
    numbers = torch.arange(1000, 1040)
    drawn = transform(x, Draws(3, 5, numbers))
    some = torch.tensor([17, 2, 30])
    assert torch.equal(transform(x[:3], Draws(3, 5, numbers[some])), drawn[some])
    for seed, epoch, shift in ((3, 6, 0), (4, 5, 0), (3, 5, 40)):
        assert not torch.equal(transform(x, Draws(seed, epoch, numbers + shift)), drawn)
    assert len({row.numpy().tobytes() for row in drawn}) > 20
    assert torch.equal(x, torch.ones(40, 8, 100))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_type_and_shape_stay(name: str, dtype: torch.dtype) -> None:
    """Of any floating type."""
    x = torch.ones(3, 5, 40, dtype=dtype)
    out = TRANSFORMS[name](x, Draws(0, 0, torch.arange(3)))
    assert (out.shape, out.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_windows_are_no_matter(name: str) -> None:
    """As a rank may have none of a short batch."""
    out = TRANSFORMS[name](torch.ones(0, 5, 40), Draws(0, 0, torch.arange(0)))
    assert out.shape == (0, 5, 40)


@pytest.mark.parametrize("longest", [-1, 2.5])
def test_a_stretch_is_of_samples(longest: Any) -> None:
    """A whole number of them."""
    with pytest.raises(InputError, match=f"longest_samples is {longest}, and must be a whole number from 0"):
        mask_time(torch.ones(1, 5, 40), longest, Draws(0, 0, torch.arange(1)))


def test_noise_has_its_deviation_and_no_pattern() -> None:
    """Normal, of mean zero, independent over windows, channels and times."""
    noise = add_noise(torch.zeros(200, 20, 50), 2.0, Draws(0, 0, torch.arange(200))).double().numpy()
    n = noise.size
    assert abs(noise.mean()) < 4 * 2.0 / np.sqrt(n)
    assert abs(noise.std() - 2.0) < 4 * 2.0 / np.sqrt(2 * n)
    assert abs((np.abs(noise) < 2.0).mean() - 0.6827) < 0.005
    for axis in range(3):
        pairs = (
            np.take(noise, range(noise.shape[axis] - 1), axis),
            np.take(noise, range(1, noise.shape[axis]), axis),
        )
        assert abs(np.corrcoef(pairs[0].ravel(), pairs[1].ravel())[0, 1]) < 0.01


def test_channels_are_dropped_with_their_probability() -> None:
    """Whole channels, each by itself; the others stay as they were."""
    x = torch.arange(1.0, 1 + 500 * 40 * 3).reshape(500, 40, 3)
    out = drop_channels(x, 0.25, Draws(0, 0, torch.arange(500)))
    is_dropped = (out == 0).all(dim=2)
    assert torch.equal(out, x * ~is_dropped[:, :, None])
    assert abs(float(is_dropped.float().mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 20_000)
    assert torch.equal(drop_channels(x, 0.0, Draws(0, 0, torch.arange(500))), x)
    assert not drop_channels(x, 1.0, Draws(0, 0, torch.arange(500))).any()


@pytest.mark.parametrize("longest", [0, 1, 30, 50, 80])
def test_one_stretch_is_masked(longest: int) -> None:
    """In all channels, of any length up to the longest or the window, anywhere within it."""
    x = torch.ones(3000, 2, 50)
    out = mask_time(x, longest, Draws(0, 0, torch.arange(3000)))
    assert torch.equal(out[:, 0], out[:, 1])
    is_masked = out[:, 0] == 0
    lengths = is_masked.sum(dim=1)
    assert set(lengths.tolist()) == set(range(min(longest, 50) + 1))
    # One stretch: it is begun once at most.
    begun = is_masked[:, 0].int() + (is_masked[:, 1:] & ~is_masked[:, :-1]).sum(dim=1)
    assert torch.equal(begun, (lengths > 0).int())
    if longest:
        assert is_masked.any(dim=0).all()
