"""Networks and layers of Engram's own: what braindecode does not have, or not fast enough for a CPU.

This module decides nothing about training. It imports PyTorch alone and uses nothing younger than
PyTorch 2.2, so that its text can go into a submission that runs where Engram is not installed.

Shapes: B windows, C channels, T samples of a window, F filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "BandPowerNet",
    "Bounded",
    "ChannelScaling",
    "Downsample",
    "InUnit",
    "MeanOf",
    "MultiScaleNet",
    "PatchAttentionNet",
    "ShiftedMean",
    "TimeLocalizer",
    "WindowScaling",
]


class WindowScaling(nn.Module):
    """Scale each channel of each window to mean zero and deviation one.

    Parameters
    ----------
    epsilon
        Added to the deviation, in the unit of the input: a channel that carries no signal, as the
        recording reference does, stays at zero.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, C, T)."""
        centred = X - X.mean(2, keepdim=True)
        deviation = centred.square().mean(2, keepdim=True).sqrt()
        return centred / (deviation + self.epsilon)


class ChannelScaling(nn.Module):
    """Scale each channel by constants that were found on the training windows.

    Parameters
    ----------
    center, scale
        (C,) such as median and interquartile range; a scale of zero is taken for one.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, center: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("center", center.float()[:, None])
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)).float()[:, None])

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, C, T)."""
        return (X - self.center) / self.scale


class Downsample(nn.Module):
    """Keep every n-th sample, after a filter against aliasing.

    Parameters
    ----------
    factor
        n. The filter is a symmetric FIR of 20 n + 1 taps, Hamming window, cut-off at the new Nyquist
        frequency, as ``scipy.signal.decimate`` uses for ``ftype="fir"``; edges are reflected.

    Notes
    -----
    The result is a tensor of its own: a strided view would keep the input alive.
    """

    taps: Tensor

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        n = torch.arange(-10 * factor, 10 * factor + 1, dtype=torch.float64)
        taps = torch.sinc(n / factor) * torch.hamming_window(len(n), periodic=False, dtype=torch.float64)
        self.register_buffer("taps", (taps / taps.sum()).float()[None, None])

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, C, ceil(T / factor)); T above 10 factors."""
        flat = X.reshape(-1, 1, X.shape[2])
        reach = 10 * self.factor
        filtered = functional.conv1d(
            functional.pad(flat, (reach, reach), mode="reflect"), self.taps, stride=self.factor
        )
        return filtered.reshape(X.shape[0], X.shape[1], -1)


class Bounded(nn.Module):
    """Let a network depart from a constant by so much at most.

    Where a target can hardly be predicted, the best predictor is nearly the mean of the training
    targets, and a network that is free to leave it does worse than the mean.

    Parameters
    ----------
    network
        From windows to (B, 1).
    center
        The constant.
    reach
        Farthest departure, in the target's unit; what the network says near the constant stays as it is.
    """

    center: Tensor

    def __init__(self, network: nn.Module, center: float, reach: float) -> None:
        super().__init__()
        self.network = network
        self.reach = reach
        self.register_buffer("center", torch.tensor(float(center)))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, 1)."""
        departure = torch.tanh((self.network(X) - self.center) / self.reach)
        out: Tensor = self.center + self.reach * departure
        return out

    def extra_repr(self) -> str:
        """Tell what no weight shows."""
        return f"reach={self.reach}"


class ShiftedMean(nn.Module):
    """Average what a network says of a window and of the same window moved in time.

    Parameters
    ----------
    network
        From windows to (B, 1).
    shifts
        Samples by which the window is moved, 0 for where it is; in training it stays there. Edges are held.
    seconds_per_sample
        What a shift by one sample adds to the prediction, and is taken away again: 1 / rate where the
        prediction is a time after the window's beginning; 0 where it does not depend on time.
    """

    seconds_per_sample: Tensor

    def __init__(self, network: nn.Module, shifts: Sequence[int], *, seconds_per_sample: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.shifts = tuple(shifts)
        self.register_buffer("seconds_per_sample", torch.tensor(float(seconds_per_sample)))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, 1)."""
        times = torch.arange(X.shape[2], device=X.device)
        out = []
        for shift in (0,) if self.training else self.shifts:
            moved = X[:, :, (times - shift).clamp(0, X.shape[2] - 1)]
            out.append(self.network(moved) - shift * self.seconds_per_sample)
        return torch.stack(out).mean(0)

    def extra_repr(self) -> str:
        """Tell what no weight shows."""
        return f"shifts={self.shifts}"


class MeanOf(nn.Module):
    """Average what several networks say.

    Parameters
    ----------
    networks
        From windows to (B, outputs).
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, outputs)."""
        return torch.stack([network(X) for network in self.networks]).mean(0)


class InUnit(nn.Module):
    """Multiply windows by a constant first: volts, for a network that was trained on microvolts.

    Parameters
    ----------
    network
        From windows in its own unit to (B, outputs).
    factor
        How many of its unit are one of the input's.
    """

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network = network
        self.factor = factor

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, outputs)."""
        out: Tensor = self.network(X * self.factor)
        return out


class _Separable(nn.Module):
    """A convolution over time of each filter, then of all filters at each time, beside its input."""

    def __init__(self, n_filters: int, kernel: int, dilation: int, drop_prob: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(n_filters, n_filters, kernel, padding="same", dilation=dilation, groups=n_filters),
            nn.BatchNorm1d(n_filters),
            nn.GELU(),
            nn.Conv1d(n_filters, n_filters, 1),
            nn.BatchNorm1d(n_filters),
            nn.Dropout(drop_prob),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional.gelu(x + self.layers(x))
        return out


class TimeLocalizer(nn.Module):
    """Predict when something happens: a softmax over the times of the window, and its mean.

    The head that the winners of challenge 1 of the EEG Foundation Challenge 2025 used: where in the
    window the response lies is what the network says, and the time follows.

    Parameters
    ----------
    n_chans, n_times, sfreq, n_outputs
        Of the windows, in braindecode's words; one output.
    n_filters
        Spatial filters, and filters of every layer.
    n_blocks
        Layers over time; each looks twice as far as the one before.
    kernel
        Taps of a layer.
    drop_prob
        Of dropout.
    start_s
        Seconds from the event to the window's first sample.

    Notes
    -----
    The mean of times within the window lies within it: between ``start_s`` and ``start_s`` plus the
    window's length, without clamping.
    """

    times: Tensor

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        sfreq: float,
        n_outputs: int = 1,
        *,
        n_filters: int = 32,
        n_blocks: int = 4,
        kernel: int = 9,
        drop_prob: float = 0.2,
        start_s: float = 0.5,
    ) -> None:
        super().__init__()
        if n_outputs != 1:
            raise ValueError(f"a time is one output, not {n_outputs}")
        self.spatial = nn.Sequential(nn.Conv1d(n_chans, n_filters, 1), nn.BatchNorm1d(n_filters), nn.GELU())
        self.temporal = nn.Sequential(
            *(_Separable(n_filters, kernel, 2**block, drop_prob) for block in range(n_blocks))
        )
        self.head = nn.Conv1d(n_filters, 1, 1, bias=False)  # a softmax does not see a bias
        self.start_s = start_s
        self.register_buffer("times", start_s + (torch.arange(n_times) + 0.5) / sfreq)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, 1), seconds after the event."""
        likely = self.head(self.temporal(self.spatial(X))).softmax(2)  # (B, 1, T)
        out: Tensor = (likely * self.times).sum(2)
        return out

    def extra_repr(self) -> str:
        """Tell what no weight shows."""
        return f"start_s={self.start_s}"


class _MultiScale(nn.Module):
    """Convolutions of several lengths side by side, beside their input."""

    def __init__(self, n_filters: int, kernels: Sequence[int], drop_prob: float) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Conv1d(n_filters, n_filters, kernel, padding="same", groups=n_filters) for kernel in kernels
        )
        self.join = nn.Sequential(
            nn.BatchNorm1d(n_filters * len(kernels)),
            nn.GELU(),
            nn.Conv1d(n_filters * len(kernels), n_filters, 1),
            nn.BatchNorm1d(n_filters),
            nn.Dropout(drop_prob),
        )

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.cat([scale(x) for scale in self.scales], 1)
        out: Tensor = functional.gelu(x + self.join(scales))
        return out


class MultiScaleNet(nn.Module):
    """A residual network that looks at several lengths of time at once.

    Spatial filters first, then blocks of depthwise convolutions of several lengths with a skip
    connection, each followed by pooling over two samples; the mean over time is read out.

    Parameters
    ----------
    n_chans, n_times, n_outputs
        Of the windows, in braindecode's words.
    n_filters
        Spatial filters, and filters of every block.
    n_blocks
        Blocks; each halves the samples.
    kernels
        Taps of the convolutions of a block.
    drop_prob
        Of dropout.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        n_outputs: int,
        *,
        n_filters: int = 32,
        n_blocks: int = 3,
        kernels: Sequence[int] = (3, 9, 27),
        drop_prob: float = 0.3,
    ) -> None:
        super().__init__()
        if n_times >> n_blocks < 1:
            raise ValueError(f"{n_times} samples are halved {n_blocks} times: none are left")
        self.spatial = nn.Sequential(nn.Conv1d(n_chans, n_filters, 1), nn.BatchNorm1d(n_filters))
        blocks: list[nn.Module] = []
        for _ in range(n_blocks):
            blocks += [_MultiScale(n_filters, kernels, drop_prob), nn.AvgPool1d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Linear(n_filters, n_outputs)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, outputs)."""
        out: Tensor = self.readout(self.blocks(self.spatial(X)).mean(2))
        return out


class BandPowerNet(nn.Module):
    """Read out how strong the signal is in several bands: the logarithm of its power, by a linear map.

    Spatial filters, several temporal filters of each, their mean square over the window. For a target that
    is a trait of whoever is recorded, and no event in time.

    Parameters
    ----------
    n_chans, n_times, n_outputs
        Of the windows, in braindecode's words.
    n_filters
        Spatial filters.
    n_bands
        Temporal filters of each.
    kernel
        Taps of a temporal filter.
    drop_prob
        Of dropout.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        n_outputs: int,
        *,
        n_filters: int = 12,
        n_bands: int = 4,
        kernel: int = 25,
        drop_prob: float = 0.5,
    ) -> None:
        super().__init__()
        if kernel > n_times:
            raise ValueError(f"{n_times} samples are fewer than the {kernel} taps of a filter")
        self.spatial = nn.Conv1d(n_chans, n_filters, 1, bias=False)
        self.temporal = nn.Conv1d(n_filters, n_filters * n_bands, kernel, groups=n_filters, bias=False)
        self.norm = nn.BatchNorm1d(n_filters * n_bands)
        self.readout = nn.Sequential(nn.Dropout(drop_prob), nn.Linear(n_filters * n_bands, n_outputs))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, outputs)."""
        power = self.temporal(self.spatial(X)).square().mean(2)
        out: Tensor = self.readout(self.norm((power + 1e-6).log()))
        return out


class PatchAttentionNet(nn.Module):
    """A small transformer over patches of time.

    Each patch of all channels becomes one token by a linear map; attention between the tokens, their
    mean is read out.

    Parameters
    ----------
    n_chans, n_times, n_outputs
        Of the windows, in braindecode's words.
    patch_samples
        Samples of a patch; those that fill no patch are left out.
    width
        Numbers of a token.
    n_heads, n_blocks
        Of the transformer.
    drop_prob
        Of dropout.
    """

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        n_outputs: int,
        *,
        patch_samples: int = 10,
        width: int = 64,
        n_heads: int = 4,
        n_blocks: int = 2,
        drop_prob: float = 0.2,
    ) -> None:
        super().__init__()
        n_patches = n_times // patch_samples
        if not n_patches:
            raise ValueError(f"{n_times} samples have no patch of {patch_samples}")
        self.n_heads = n_heads
        self.embed = nn.Conv1d(n_chans, width, patch_samples, stride=patch_samples)
        self.places = nn.Parameter(torch.randn(n_patches, width) / math.sqrt(width))
        block = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, drop_prob, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, n_blocks, enable_nested_tensor=False)
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_outputs))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - braindecode's word
        """(B, C, T) -> (B, outputs)."""
        tokens = self.embed(X).transpose(1, 2) + self.places
        out: Tensor = self.readout(self.blocks(tokens).mean(1))
        return out

    def extra_repr(self) -> str:
        """Tell what no weight shows."""
        return f"n_heads={self.n_heads}"
