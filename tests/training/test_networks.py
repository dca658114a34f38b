"""Engram's own layers and networks."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor, nn

from engram.training import networks
from engram.training.networks import (
    Bounded,
    ChannelScaling,
    Downsample,
    MeanOf,
    MultiScaleNet,
    PatchAttentionNet,
    ShiftedMean,
    TimeLocalizer,
    WindowScaling,
)

NETWORKS: dict[str, Any] = {
    "TimeLocalizer": lambda: TimeLocalizer(5, 100, 100.0, n_filters=8),
    "MultiScaleNet": lambda: MultiScaleNet(5, 100, 1, n_filters=8),
    "PatchAttentionNet": lambda: PatchAttentionNet(5, 100, 1, width=16),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mean(nn.Module):
    """The mean of a window, (B, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean((1, 2))[:, None]


def test_the_text_needs_pytorch_alone() -> None:
    """It goes into submissions, where nothing else may be installed."""
    tree = ast.parse(inspect.getsource(networks))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"__future__", "collections.abc", "math", "torch", "torch.nn"}


def test_windows_are_scaled_by_themselves() -> None:
    """To mean zero and deviation one in each channel; one without a signal stays zero."""
    x = 50 * noise(3, 4, 500) + 20
    x[:, 2] = 7.0
    out = WindowScaling(epsilon=0.1)(x).numpy()
    numbers = x.numpy().astype(np.float64)
    expected = (numbers - numbers.mean(2, keepdims=True)) / (numbers.std(2, keepdims=True) + 0.1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert np.abs(out[:, 2]).max() < 1e-4


def test_channels_are_scaled_by_constants() -> None:
    """A scale of zero is taken for one; the constants are part of what is saved."""
    layer = ChannelScaling(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    x = torch.tensor([[[3.0, 5.0], [0.0, 4.0]]])
    assert layer(x).tolist() == [[[1.0, 2.0], [0.0, 4.0]]]
    assert set(layer.state_dict()) == {"center", "scale"}
    assert not list(layer.parameters())


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("n_times", [200, 201])
def test_samples_are_kept_after_a_filter(factor: int, n_times: int) -> None:
    """SciPy's filter and phase; what the new rate cannot hold is gone; the result owns its memory."""
    layer = Downsample(factor)
    x = noise(2, 3, n_times)
    out = layer(x)
    assert out.shape == (2, 3, -(-n_times // factor))
    taps = signal.firwin(20 * factor + 1, 1 / factor, window="hamming")
    np.testing.assert_allclose(layer.taps[0, 0].numpy(), taps, atol=1e-7)
    filtered = signal.convolve(x.numpy(), taps[None, None], mode="same")[:, :, ::factor]
    inside = slice(11, n_times // factor - 11)
    np.testing.assert_allclose(out.numpy()[:, :, inside], filtered[:, :, inside], atol=1e-5)
    times = torch.arange(n_times)
    fast = torch.sin(2 * torch.pi * times * 0.98 / 2)[None, None]
    slow = torch.cos(2 * torch.pi * times * 0.05 / factor)[None, None]
    assert layer(fast)[..., inside].abs().max() < 0.01
    np.testing.assert_allclose(layer(slow)[..., inside], slow[..., ::factor][..., inside], atol=0.01)
    assert out.untyped_storage().nbytes() == out.nbytes


def test_a_bounded_network_stays_near_its_constant() -> None:
    """Whatever the network says, and the constant where it says nothing."""
    near = Bounded(Mean(), center=0.3, reach=0.2)
    x = 1000 * noise(50, 2, 10)
    assert (near(x) - 0.3).abs().max() <= 0.2 + 1e-6
    assert near(x).min() < 0.15
    assert near(x).max() > 0.45
    assert near(torch.full((2, 2, 10), 0.301)).tolist() == [[pytest.approx(0.301, abs=1e-5)]] * 2
    assert "center" in near.state_dict()


def test_shifted_windows_are_averaged_where_it_is_not_training() -> None:
    """Edges are held, and what a shift adds to a time is taken away."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, -1:]

    x = torch.arange(10.0).reshape(1, 1, 10)
    averaged = ShiftedMean(Last(), (-3, 0, 2), seconds_per_sample=0.5)
    assert averaged.train()(x).item() == 9.0
    assert averaged.eval()(x).item() == pytest.approx(np.mean([9 + 1.5, 9, 7 - 1.0]))


def test_networks_are_averaged() -> None:
    """Their outputs, with all their weights in one state."""
    first, second = (MultiScaleNet(3, 40, 2, n_filters=4).eval() for _ in range(2))
    mean = MeanOf([first, second])
    x = noise(4, 3, 40)
    torch.testing.assert_close(mean(x), (first(x) + second(x)) / 2)
    assert len(mean.state_dict()) == 2 * len(first.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_trained_and_windows_do_not_meet(name: str) -> None:
    """Gradients reach all of a network; at scoring a window's output does not depend on its batch."""
    network = NETWORKS[name]()
    x = noise(6, 5, 100)
    network(x).square().sum().backward()
    for weight_name, weight in network.named_parameters():
        assert weight.grad is not None, weight_name
        assert torch.isfinite(weight.grad).all()
    network.eval()
    with torch.inference_mode():
        together = network(x)
        alone = torch.cat([network(x[i : i + 1]) for i in range(6)])
    assert together.shape == (6, 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_time_is_found_where_it_is() -> None:
    """The output lies within the window's time, and learns where a pulse is."""
    torch.manual_seed(0)
    network = TimeLocalizer(4, 100, 50.0, n_filters=8, n_blocks=2, drop_prob=0.0, start_s=0.5)
    with torch.no_grad():
        out = network(100 * noise(20, 4, 100))
    assert out.min() > 0.5
    assert out.max() < 2.5
    places = torch.randint(10, 90, (256,), generator=torch.Generator().manual_seed(1))
    x = 0.3 * noise(256, 4, 100, seed=2)
    x += torch.exp(-((torch.arange(100) - places[:, None]) ** 2) / 18.0)[:, None]
    y = 0.5 + (places[:, None] + 0.5) / 50.0
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        (network(x[:192]) - y[:192]).square().mean().backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        error = (network(x[192:]) - y[192:]).square().mean().sqrt()
    assert error < 0.15 * y.std()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TimeLocalizer(4, 100, 100.0, 2), "one output, not 2"),
        (lambda: MultiScaleNet(4, 7, 1), "halved 3 times"),
        (lambda: PatchAttentionNet(4, 9, 1), "no patch of 10"),
    ],
)
def test_windows_that_a_network_cannot_take_are_refused(make: Any, said: str) -> None:
    """With the figures."""
    with pytest.raises(ValueError, match=said):
        make()
