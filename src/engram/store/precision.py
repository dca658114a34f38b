"""Precision: how samples are narrowed for the disk, and what that costs, measured.

This module decides the stored dtype of a signal, encodes and decodes it, and measures the
error per channel while it is written. ``ErrorMeter.refusal`` says when an error is too
large: a recording is then refused with channel, figure and remedy, never stored badly in
silence.

=========== ============== ==========================================================
precision   stored dtype   what it keeps
=========== ============== ==========================================================
float32     float32        everything that float32 holds
float16     float16        11 bits from 6e-5 to 65504: 73 dB of a high-passed EEG
bfloat16    uint16         8 bits over float32's range: 55 dB of the same EEG
int16       int16          the channel's own range in 65,535 steps: 85 dB of the same EEG
exact       its own        integers and booleans as they come
=========== ============== ==========================================================

bfloat16 is stored as uint16 with an attribute, because zarr-python 3.1 cannot open it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError

__all__ = [
    "MIN_SNR_DB",
    "ChannelError",
    "ErrorMeter",
    "Precision",
    "Scaling",
    "check_precision",
    "decode",
    "default_precision",
    "encode",
    "parse_precision",
    "stored_dtype",
]

Precision = Literal["float32", "float16", "bfloat16", "int16", "exact"]
"""Name of a way to store samples; see the module's table."""

MIN_SNR_DB: Mapping[str, float] = MappingProxyType(
    {"float32": 60.0, "float16": 60.0, "bfloat16": 50.0, "int16": 60.0}
)
"""Smallest ratio of a channel's variance to the error's, in decibels, that is stored.

60 dB is an error of a thousandth of the signal's standard deviation, far below an EEG
amplifier's own noise. float16 reaches 73 dB on a real high-passed EEG; a DC offset of
half a millivolt takes it to 47-55 dB, where this rule speaks up. bfloat16 keeps 55 dB of
any signal without an offset: who asks for it has chosen that, and is told of an offset only.
"""

STRETCH_SAMPLES = 256
"""Samples over which a channel's variance is taken, one stretch after another.

Over the whole recording a drift of 20 mV, or a step, would count as signal and hide that
float16 rounds there to 16 microvolts. Half a second at 500 Hz still holds the EEG's rhythms.
The error counts about its own mean too: a square wave whose levels are off by a constant
has lost nothing.
"""

_INT16_STEPS = 32767
_FLOAT16_MAX = 65504.0
_PIECE_VALUES = 131_072


@dataclass(frozen=True, slots=True)
class Scaling:
    """int16's map per channel: ``value = offset + scale * stored``.

    The offset is the middle of the channel's range and not zero, so that a channel with a
    DC offset keeps all of its 65,535 steps.
    """

    scale: NDArray[np.float64]
    """(channel,) float64, the channel's unit per step; 1 where the channel is constant."""
    offset: NDArray[np.float64]
    """(channel,) float64, in the channel's unit."""

    @classmethod
    def of_range(cls, minimum: NDArray[np.float64], maximum: NDArray[np.float64]) -> Scaling:
        """Choose the map that spans [minimum, maximum] per channel, in the channel's unit."""
        scale = (maximum - minimum) / (2 * _INT16_STEPS)
        return cls(np.where(scale > 0, scale, 1.0), (maximum + minimum) / 2)


def default_precision(name: str, array: ArraySpec) -> Precision:
    """Choose the precision of a signal where the user did not.

    Integers are kept as they come; a signal named ``eeg`` is float16 in microvolts; any
    other float is float32, since the range of its numbers is not known.

    Examples
    --------
    >>> default_precision("eeg", ArraySpec((10, 2), "float64", ("time", "channel")))
    'float16'
    >>> default_precision("stim", ArraySpec((10, 8, 8), "uint8", ("frame", "y", "x")))
    'exact'
    """
    if not np.issubdtype(np.dtype(array.dtype), np.floating):
        return "exact"
    return "float16" if name == "eeg" else "float32"


def check_precision(text: str, signal: str) -> None:
    """Check the name of a precision.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    names = ["default", *get_args(Precision)]
    if text not in names:
        raise InputError(f"Unknown precision {text!r} for signal {signal!r}. Use one of: {', '.join(names)}.")


def parse_precision(text: str, signal: str, array: ArraySpec) -> Precision:
    """Check a precision that the user named, for one signal.

    Raises
    ------
    InputError
        If the name is unknown, narrows integers or keeps floats ``exact``, or the dtype is
        neither boolean, integer nor float.
    """
    if np.dtype(array.dtype).kind not in "biuf":
        raise InputError(f"Signal {signal!r} is {array.dtype}. Store booleans, integers or floats.")
    check_precision(text, signal)
    if text == "default":
        return default_precision(signal, array)
    is_float = np.issubdtype(np.dtype(array.dtype), np.floating)
    if is_float == (text == "exact"):
        rule = "float32, float16, bfloat16 or int16" if is_float else "exact"
        raise InputError(f"Signal {signal!r} is {array.dtype}; it cannot be stored as {text}. Use {rule}.")
    return text  # type: ignore[return-value]  # a member of Precision, checked above


def stored_dtype(precision: Precision, dtype: str) -> str:
    """Give NumPy's name of the dtype on disk for samples of ``dtype``."""
    return {"exact": dtype, "bfloat16": "uint16"}.get(precision, precision)


def encode(x: NDArray[Any], precision: Precision, scaling: Scaling | None = None) -> NDArray[Any]:
    """Narrow samples to what is stored, C-contiguous.

    float64 goes through float32 first: a store never promises more than float32, and the
    one rounding that is then left is to the nearest stored value of float32(x).

    Parameters
    ----------
    x
        (time, ...) samples in the signal's unit.
    precision
        How to store them.
    scaling
        The map of int16; None otherwise.
    """
    if precision == "exact":
        # A store is little-endian; NIfTI and HDF5 files often are not.
        return np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
    if precision == "int16":
        assert scaling is not None, "int16 needs its scaling"
        steps = np.rint((x - scaling.offset) / scaling.scale)
        return np.ascontiguousarray(np.clip(steps, -_INT16_STEPS, _INT16_STEPS), np.int16)
    single = np.ascontiguousarray(x, np.float32)
    if precision == "float32":
        return single
    if precision == "bfloat16":
        return _to_bfloat16(single)
    with np.errstate(over="ignore"):  # overflow to infinity is the meter's to report
        return single.astype(np.float16)


def _to_bfloat16(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, by integer arithmetic; NaN stays NaN."""
    bits = single.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    # Rounding a NaN's payload up could carry into the sign: give every NaN the quiet one.
    rounded = np.where(np.isnan(single), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def decode(stored: NDArray[Any], precision: Precision, scaling: Scaling | None = None) -> NDArray[Any]:
    """Widen stored samples: float32 in the signal's unit, or as they are for ``exact``.

    Examples
    --------
    >>> import numpy as np
    >>> decode(encode(np.array([[1.0, 3.14159]]), "bfloat16"), "bfloat16")
    array([[1.      , 3.140625]], dtype=float32)
    """
    if precision == "exact":
        return stored
    if precision == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if precision == "int16":
        assert scaling is not None, "int16 needs its scaling"
        return (stored * scaling.scale + scaling.offset).astype(np.float32)
    return stored.astype(np.float32)


@dataclass(frozen=True, slots=True)
class ChannelError:
    """What one channel is and what storing it cost; figures in the channel's unit."""

    mean: float
    """Mean of the finite samples."""
    std: float
    """Population standard deviation of the finite samples."""
    minimum: float
    """Smallest finite sample."""
    maximum: float
    """Largest finite sample."""
    max_error: float
    """Largest distance between a sample and what is read back."""
    snr_db: float
    """10 log10 of the signal's variance over the error's, both within stretches of
    ``STRETCH_SAMPLES``; infinite where nothing was lost."""
    n_nan: int
    """Samples that are NaN."""
    n_infinite: int
    """Samples that are infinite in the source."""
    n_overflow: int
    """Finite samples that the stored dtype cannot hold."""


class ErrorMeter:
    """Measures, block by block, what storing a signal costs per channel.

    Parameters
    ----------
    n_channels
        Length of the last axis, or 1 to measure the signal as a whole.

    Notes
    -----
    Sums are taken about the first piece's mean, so a large DC offset does not drown the
    variance: within a piece of some thousand samples in float32, over pieces in float64.
    """

    def __init__(self, n_channels: int) -> None:
        self._n_channels = n_channels
        self._n = np.zeros(n_channels, np.int64)
        self._pivot: NDArray[np.float64] | None = None
        self._sum, self._square = np.zeros(n_channels), np.zeros(n_channels)
        # Of signal and error: squares about the means of whole stretches; then the current
        # stretch's count, sums and squares.
        self._within = np.zeros((2, n_channels))
        self._stretch = np.zeros((5, n_channels))
        self._n_samples = 0
        self._max_error = np.zeros(n_channels)
        self._minimum = np.full(n_channels, np.inf)
        self._maximum = np.full(n_channels, -np.inf)
        self._n_nan, self._n_infinite, self._n_overflow = (np.zeros(n_channels, np.int64) for _ in range(3))

    def add(self, x: NDArray[Any], read_back: NDArray[Any]) -> None:
        """Add a block: samples (time, ..., channel) as given, and as they are read back."""
        x = np.asarray(x).reshape(-1, self._n_channels)
        back = np.asarray(read_back).reshape(-1, self._n_channels)
        # A piece of 512 KiB stays in the core's own cache through every sum below:
        # measured 3 times faster than whole blocks.
        longest = max(1, _PIECE_VALUES // self._n_channels)
        start = 0
        while start < len(x):
            # No piece crosses the end of a stretch, wherever the caller cuts its blocks.
            step = min(longest, STRETCH_SAMPLES - self._n_samples % STRETCH_SAMPLES)
            piece = np.ascontiguousarray(x[start : start + step], np.float32)
            self._add_piece(piece, np.asarray(back[start : start + step], np.float32))
            self._n_samples += len(piece)
            if self._n_samples % STRETCH_SAMPLES == 0:
                self._within += self._within_stretch()
                self._stretch[:] = 0.0
            start += step

    def _within_stretch(self) -> NDArray[np.float64]:
        """Sum the squares of signal and error, each about its own mean over the stretch so far."""
        n, *sums = self._stretch
        total, square = np.array(sums[:2]), np.array(sums[2:])
        return np.asarray(np.maximum(square - total**2 / np.maximum(n, 1), 0.0))

    def _add_piece(self, x: NDArray[np.float32], back: NDArray[np.float32]) -> None:
        with np.errstate(invalid="ignore"):  # infinity minus infinity is counted below
            total = x.sum(axis=0, dtype=np.float64)
            error = back - x
        if np.isfinite(total).all() and np.isfinite(error).all():
            self._accumulate(x, error, np.full(self._n_channels, len(x)), total)
            return
        # NaN, infinity or an overflow: such samples are counted, not weighed.
        finite = np.isfinite(x)
        lost = finite & ~np.isfinite(back)
        self._n_nan += np.isnan(x).sum(axis=0)
        self._n_infinite += np.isinf(x).sum(axis=0)
        self._n_overflow += lost.sum(axis=0)
        n = finite.sum(axis=0)
        if not n.any():
            return
        pivot = self._pivot if self._pivot is not None else self._mean_of(x, finite)
        filled = np.where(finite, x, pivot.astype(np.float32))
        error = np.where(finite & ~lost, error, np.float32(0))
        self._accumulate(filled, error, n, filled.sum(axis=0, dtype=np.float64))

    @staticmethod
    def _mean_of(x: NDArray[np.float32], finite: NDArray[np.bool_]) -> NDArray[np.float64]:
        n = np.maximum(finite.sum(axis=0), 1)
        mean = np.where(finite, x, 0).sum(axis=0, dtype=np.float64) / n
        return np.asarray(mean.astype(np.float32), np.float64)

    def _accumulate(
        self,
        x: NDArray[np.float32],
        error: NDArray[np.float32],
        n: NDArray[np.int64],
        total: NDArray[np.float64],
    ) -> None:
        if self._pivot is None:
            self._pivot = (total / len(x)).astype(np.float32).astype(np.float64)
        centred = x - self._pivot.astype(np.float32)
        shifted = total - len(x) * self._pivot
        square = np.einsum("tc,tc->c", centred, centred)
        errors = error.sum(axis=0, dtype=np.float64), np.einsum("tc,tc->c", error, error)
        self._stretch += np.stack([n, shifted, errors[0], square, errors[1]])
        self._n += n
        self._sum += shifted
        self._square += square
        np.maximum(self._max_error, np.abs(error).max(axis=0), out=self._max_error)
        np.minimum(self._minimum, x.min(axis=0), out=self._minimum)
        np.maximum(self._maximum, x.max(axis=0), out=self._maximum)

    def channels(self) -> list[ChannelError]:
        """Give the figures of every channel so far."""
        n = np.maximum(self._n, 1)
        pivot = self._pivot if self._pivot is not None else np.zeros(self._n_channels)
        shift = self._sum / n
        variance = np.maximum(self._square / n - shift**2, 0.0)
        within, error = self._within + self._within_stretch()
        with np.errstate(divide="ignore", invalid="ignore"):
            snr = 10 * np.log10(within / error)
        # No variance, nothing to lose; no error, nothing lost; sums beyond float32, no promise.
        snr[(within == 0) | (error == 0)] = np.inf
        snr[np.isnan(snr)] = -np.inf
        std = np.sqrt(variance)
        return [
            ChannelError(
                mean=float(pivot[c] + shift[c]),
                std=float(std[c]),
                minimum=float(self._minimum[c]),
                maximum=float(self._maximum[c]),
                max_error=float(self._max_error[c]),
                snr_db=float(snr[c]),
                n_nan=int(self._n_nan[c]),
                n_infinite=int(self._n_infinite[c]),
                n_overflow=int(self._n_overflow[c]),
            )
            for c in range(self._n_channels)
        ]

    def refusal(self, precision: Precision, names: list[str], unit: str) -> str | None:
        """Say why this signal may not be stored in this precision, or None if it may.

        Examples
        --------
        >>> meter = ErrorMeter(1)
        >>> x = np.array([[1e6], [2e6]])
        >>> with np.errstate(over="ignore"):
        ...     meter.add(x, decode(encode(x, "float16"), "float16"))
        >>> meter.refusal("float16", ["Fz"], "uV")
        'Channel Fz reaches 2e+06 uV, float16 holds 65504. High-pass it, or use precision float32.'
        """
        errors = self.channels()
        worst = min(range(len(errors)), key=lambda c: errors[c].snr_db)
        for name, error in zip(names, errors, strict=True):
            if error.n_overflow:
                peak = max(abs(error.minimum), abs(error.maximum))
                return (
                    f"Channel {name} reaches {peak:.5g} {unit}, {precision} holds {_FLOAT16_MAX:.0f}. "
                    "High-pass it, or use precision float32."
                )
            if precision == "int16" and error.n_nan + error.n_infinite:
                return (
                    f"Channel {name} has {error.n_nan + error.n_infinite} samples that are not numbers, "
                    "int16 holds none. Use precision float32."
                )
        if errors[worst].snr_db < MIN_SNR_DB[precision]:
            remedy = "float32" if precision == "int16" else "int16 (it removes the offset) or float32"
            return (
                f"Channel {names[worst]} would keep {errors[worst].snr_db:.1f} dB in {precision}, the rule "
                f"is {MIN_SNR_DB[precision]:.0f} dB (mean {errors[worst].mean:.5g}, standard deviation "
                f"{errors[worst].std:.5g} {unit}). High-pass it, or use precision {remedy}."
            )
        return None
