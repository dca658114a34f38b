"""Preprocessing steps as values, and what each needs to run on one block of a recording.

This module decides what a step does to samples, which input samples a range of its output
depends on, and how much memory that takes. Every step gives the values that MNE-Python
gives on the whole recording, whatever range is asked for. Which ranges are asked for, and
in what order, is left to ``chain.py``; steps that need MNE's ``Raw`` to ``raw_steps.py``.

A step is bound to a signal once, which gives a stage; a stage has no state, so any range
may be computed at any time. Samples are (time, channel) float64 throughout, best with time
contiguous in memory, as MNE's data come.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError, MissingExtra, SourceError
from engram.recordings.recording import Channel, Gap, Signal

__all__ = [
    "JSON",
    "SMALL_BYTES",
    "BandPass",
    "Clip",
    "DropFlat",
    "HighPass",
    "LowPass",
    "Notch",
    "PickChannels",
    "Rereference",
    "Resample",
    "Scale",
    "Scan",
    "ScanningStep",
    "Stage",
    "Step",
    "measured",
]

JSON = bool | int | float | str | None | list["JSON"] | dict[str, "JSON"]
"""What a manifest and a fingerprint can hold."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What one pass over a signal found, for steps that decide on the whole of it.

    Gaps are left out, and so are samples that are NaN; a channel without any other sample
    has minimum and maximum NaN.
    """

    minimum: FloatArray
    """(channel,) float64, smallest sample in the channel's unit."""
    maximum: FloatArray
    """(channel,) float64, largest sample in the channel's unit."""


class Stage(Protocol):
    """A step bound to one signal. Without state: the same range gives the same samples."""

    @property
    def signal(self) -> Signal:
        """What comes out."""
        ...

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """Say which input samples [a, b) the output samples [start, stop), not empty, depend on.

        It depends on times only, never on the number of channels, and grows with the
        range: a range within another needs no sample that the other does not need.
        """
        ...

    def working_bytes(self, start: int, stop: int) -> int:
        """Bound the memory that ``apply`` takes beyond its input, its result included."""
        ...

    def apply(self, x: FloatArray, start: int, stop: int) -> FloatArray:
        """Compute output samples [start, stop).

        Parameters
        ----------
        x
            (time, channel) float64, input samples ``needs(start, stop)``. The stage may
            overwrite it and may return a part of it.
        start, stop
            Range of output samples, not empty.

        Returns
        -------
        ndarray
            (stop - start, channel) float64.

        Raises
        ------
        SourceError
            If these samples cannot be processed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Step(ABC):
    """One preprocessing step: a frozen value, comparable, hashable, safe to pickle.

    ``name`` and ``settings`` are what manifests and fingerprints keep of it. A step of
    one's own is a frozen dataclass that derives from this class.
    """

    name: ClassVar[str]
    """Name of the step in manifests."""

    def settings(self) -> dict[str, JSON]:
        """Give every field as JSON."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}

    @abstractmethod
    def bind(self, signal: Signal) -> Stage:
        """Fit the step to a signal.

        Raises
        ------
        SourceError
            If this signal cannot take the step.
        """


@dataclass(frozen=True, slots=True)
class ScanningStep(Step):
    """A step that decides on the whole signal, and so needs a pass over it beforehand.

    ``bind`` gives the stage that takes the most memory, whatever the pass finds.
    """

    @abstractmethod
    def bind_scanned(self, signal: Signal, scan: Scan) -> Stage:
        """Fit the step to a signal and to what a pass over it found.

        Raises
        ------
        SourceError
            If this signal cannot take the step.
        """


# -- channels ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PickChannels(Step):
    """Keep some channels, by name, by type, or all but some.

    Channels picked by name come in the order of the names, as with ``mne.io.Raw.pick``;
    otherwise they stay in the recording's order.

    Raises
    ------
    InputError
        If both names and types are given, or nothing at all, or a name twice.

    Examples
    --------
    >>> PickChannels(types=["eeg"], exclude=["Cz"])
    PickChannels(names=(), types=('eeg',), exclude=('Cz',))
    """

    name: ClassVar[str] = "pick_channels"

    names: Sequence[str] = ()
    """Names of the channels to keep; a recording without one of them is refused."""
    types: Sequence[str] = ()
    """MNE's channel types to keep, such as ``"eeg"``."""
    exclude: Sequence[str] = ()
    """Names of channels to leave out, where they exist."""

    def __post_init__(self) -> None:
        for field in ("names", "types", "exclude"):
            object.__setattr__(self, field, _words(getattr(self, field), f"PickChannels.{field}"))
        if self.names and self.types:
            raise InputError("PickChannels has both names and types. Give one of them.")
        if not (self.names or self.types or self.exclude):
            raise InputError("PickChannels has nothing to pick. Give names, types or exclude.")
        if len(set(self.names)) < len(self.names):
            raise InputError(f"PickChannels names a channel twice: {', '.join(self.names)}. Name each once.")

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses a signal that lacks a name, or that would be left empty."""
        columns = [
            index
            for index in (_columns(signal, self.names, self) if self.names else range(len(signal.channels)))
            if signal.channels[index].name not in self.exclude
            and (not self.types or signal.channels[index].type in self.types)
        ]
        if not columns:
            raise SourceError(
                f"PickChannels leaves no channel of signal {signal.name!r}, which has "
                f"{_listed(signal.channels)}. Pick channels that it has."
            )
        return _taking(signal, columns)


@dataclass(frozen=True, slots=True)
class DropFlat(ScanningStep):
    """Drop channels that never change, such as the online reference.

    Needs one pass over the recording before the pass that stores it.

    Raises
    ------
    InputError
        If the threshold is negative or not finite.
    """

    name: ClassVar[str] = "drop_flat"

    threshold_uv: float = 0.0
    """Channels whose largest and smallest sample differ by at most this much are dropped."""

    def __post_init__(self) -> None:
        value = _number(self.threshold_uv, "DropFlat.threshold_uv")
        if value < 0:
            raise InputError(f"DropFlat.threshold_uv is {value}. Give 0 or more microvolts.")
        object.__setattr__(self, "threshold_uv", value)

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: keeps every channel; refuses channels in another unit."""
        units = {channel.unit for channel in signal.channels} - {"uV"}
        if self.threshold_uv > 0 and units:
            raise SourceError(
                f"DropFlat.threshold_uv is {self.threshold_uv}, and signal {signal.name!r} has channels in "
                f"{', '.join(sorted(map(repr, units)))}. Use a threshold of 0."
            )
        return _Pointwise(_output(signal), _keep, 1.0)  # as much as dropping all but none

    def bind_scanned(self, signal: Signal, scan: Scan) -> Stage:
        """See ``ScanningStep.bind_scanned``: refuses a signal whose channels are all flat."""
        # A channel of NaN alone was never measured: the comparison is false for it, too.
        columns = np.flatnonzero(scan.maximum > scan.minimum + self.threshold_uv).tolist()
        if not columns:
            raise SourceError(
                f"Every channel of signal {signal.name!r} is flat: none varies by more than "
                f"{self.threshold_uv} uV. Leave the recording out."
            )
        return _taking(signal, columns)


@dataclass(frozen=True, slots=True)
class Rereference(Step):
    """Subtract a reference: the mean of all channels, or of those named.

    As ``mne.set_eeg_reference``: the reference is subtracted from every channel of the
    first type present of eeg, ecog, seeg and dbs, bad channels excepted; the average is
    that of the same channels. Reference channels named stay in the data. (time, channel)
    signals whose channels have no names count as eeg.

    Raises
    ------
    InputError
        If no channel is named, or one twice.
    """

    name: ClassVar[str] = "rereference"

    ref_channels: str | Sequence[str] = "average"
    """``"average"``, or the names of the channels whose mean is the reference."""

    def __post_init__(self) -> None:
        if self.ref_channels == "average":
            return
        names = _words(self.ref_channels, "Rereference.ref_channels")
        if not names or len(set(names)) < len(names):
            raise InputError(f"Rereference.ref_channels is {names}. Name each reference channel once.")
        object.__setattr__(self, "ref_channels", names)

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses a signal without electrodes, or without a channel named."""
        targets = _electrodes(signal)
        if not targets:
            raise SourceError(
                f"Signal {signal.name!r} has no good channel of type {', '.join(_ELECTRODE_TYPES)} to "
                "re-reference. Leave Rereference out."
            )
        named = self.ref_channels != "average"
        sources = _columns(signal, self.ref_channels, self) if named else targets
        return _Pointwise(_output(signal), partial(_subtract_mean, sources, targets), 1 / _width(signal))


# MNE 1.13, mne/_fiff/pick.py: _ELECTRODE_CH_TYPES, the types that ch_type="auto" goes through.
_ELECTRODE_TYPES = ("eeg", "ecog", "seeg", "dbs")


def _electrodes(signal: Signal) -> list[int]:
    """Find the channels that ``mne.set_eeg_reference(ch_type="auto")`` changes."""
    if not signal.channels:
        return list(range(_width(signal)))
    present = {channel.type for channel in signal.channels}
    kind = next((kind for kind in _ELECTRODE_TYPES if kind in present), None)
    return [i for i, channel in enumerate(signal.channels) if channel.type == kind and not channel.bad]


# -- values ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale(Step):
    """Multiply by a factor, and say what unit comes out.

    Raises
    ------
    InputError
        If the factor is zero or not finite.
    """

    name: ClassVar[str] = "scale"

    factor: float
    """What every sample is multiplied by."""
    unit: str | None = None
    """Unit of the result, such as ``"mV"``; None keeps the channels' units."""

    def __post_init__(self) -> None:
        factor = _number(self.factor, "Scale.factor")
        if factor == 0:
            raise InputError("Scale.factor is 0, which leaves nothing. Give another factor.")
        object.__setattr__(self, "factor", factor)

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``; every signal can be scaled."""
        channels = signal.channels
        if self.unit is not None:
            channels = tuple(replace(channel, unit=self.unit) for channel in channels)
        return _Pointwise(_output(signal, channels=channels), partial(_multiply, self.factor), 0.0)


@dataclass(frozen=True, slots=True)
class Clip(Step):
    """Limit every sample to [-limit, limit]. NaN stays NaN.

    Raises
    ------
    InputError
        If the limit is not above zero, or not finite.
    """

    name: ClassVar[str] = "clip"

    limit: float
    """Largest magnitude that stays, in the channels' unit."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", _positive(self.limit, "Clip.limit"))

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``; every signal can be clipped."""
        return _Pointwise(_output(signal), partial(_clip, self.limit), 0.0)


# -- filters -----------------------------------------------------------------------------
#
# All of them are MNE's default FIR filter: firwin with a Hamming window, zero phase,
# "auto" length and transition bands, "reflect_limited" padding, and no reach over gaps.


@dataclass(frozen=True, slots=True)
class HighPass(Step):
    """High-pass as ``mne.io.Raw.filter(l_freq, None)`` at its defaults.

    Raises
    ------
    InputError
        If the frequency is not above zero.
    """

    name: ClassVar[str] = "high_pass"

    l_freq: float
    """Lower edge of the pass band, in hertz."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "l_freq", _positive(self.l_freq, "HighPass.l_freq"))

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses frequencies from half the sampling rate on."""
        return _filter(signal, self, self.l_freq, None)


@dataclass(frozen=True, slots=True)
class LowPass(Step):
    """Low-pass as ``mne.io.Raw.filter(None, h_freq)`` at its defaults.

    Raises
    ------
    InputError
        If the frequency is not above zero.
    """

    name: ClassVar[str] = "low_pass"

    h_freq: float
    """Upper edge of the pass band, in hertz."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "h_freq", _positive(self.h_freq, "LowPass.h_freq"))

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses frequencies from half the sampling rate on."""
        return _filter(signal, self, None, self.h_freq)


@dataclass(frozen=True, slots=True)
class BandPass(Step):
    """Band-pass as ``mne.io.Raw.filter(l_freq, h_freq)`` at its defaults.

    Raises
    ------
    InputError
        If the frequencies are not above zero and in rising order.
    """

    name: ClassVar[str] = "band_pass"

    l_freq: float
    """Lower edge of the pass band, in hertz."""
    h_freq: float
    """Upper edge of the pass band, in hertz."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "l_freq", _positive(self.l_freq, "BandPass.l_freq"))
        object.__setattr__(self, "h_freq", _positive(self.h_freq, "BandPass.h_freq"))
        if self.l_freq >= self.h_freq:
            raise InputError(
                f"BandPass goes from {self.l_freq} Hz to {self.h_freq} Hz. Give l_freq below h_freq."
            )

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses frequencies from half the sampling rate on."""
        return _filter(signal, self, self.l_freq, self.h_freq)


@dataclass(frozen=True, slots=True)
class Notch(Step):
    """Band-stop around line frequencies as ``mne.io.Raw.notch_filter(freqs)`` at its defaults.

    Raises
    ------
    InputError
        If there is no frequency, or one is not above zero.
    """

    name: ClassVar[str] = "notch"

    freqs: Sequence[float]
    """Frequencies to take out, in hertz."""

    def __post_init__(self) -> None:
        freqs = tuple(_positive(freq, "Notch.freqs") for freq in _several(self.freqs, "Notch.freqs"))
        if not freqs:
            raise InputError("Notch.freqs is empty. Give at least one frequency.")
        object.__setattr__(self, "freqs", freqs)

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``: refuses frequencies too near to half the sampling rate."""
        # mne.filter.notch_filter of MNE 1.13: a notch is freq / 200 wide, and falls to it within
        # half of trans_bandwidth (1 Hz) on either side.
        fall = 0.5
        lows = [freq - freq / 400 - fall for freq in self.freqs]
        highs = [freq + freq / 400 + fall for freq in self.freqs]
        return _filter(signal, self, highs, lows, l_trans_bandwidth=fall, h_trans_bandwidth=fall)


def _filter(
    signal: Signal,
    step: Step,
    l_freq: float | list[float] | None,
    h_freq: float | list[float] | None,
    **transition: float,
) -> _Fir:
    """Design MNE's FIR filter for a signal."""
    try:
        from mne.filter import create_filter
    except ImportError as error:
        raise MissingExtra("mne", "eeg") from error
    try:
        taps = create_filter(None, signal.rate_hz, l_freq, h_freq, **transition, verbose="ERROR")
    except ValueError as error:
        raise SourceError(
            f"{step} does not suit signal {signal.name!r} of {signal.rate_hz:g} Hz: "
            f"{str(error).rstrip('.')}. Change its frequencies, or leave these recordings out."
        ) from error
    return _Fir(_output(signal), taps, tuple(_stretches(signal)))


@dataclass(frozen=True, slots=True)
class Resample(Step):
    """Change the sampling rate by polyphase filtering, so that each sample depends on few.

    As ``mne.io.Raw.resample(sfreq, method="polyphase")`` at its defaults, with one
    difference: sample k of the result is at time k / sfreq exactly. MNE stretches time by
    up to half a sample where the length times the ratio of the rates is not whole, so
    that its result would drift against the events; where it is whole, both are the same.
    Like MNE it reaches over gaps; samples nearest to a gap belong to it afterwards.

    Raises
    ------
    InputError
        If the rate is not above zero.
    """

    name: ClassVar[str] = "resample"

    sfreq: float
    """New sampling rate, in hertz."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sfreq", _positive(self.sfreq, "Resample.sfreq"))

    def bind(self, signal: Signal) -> Stage:
        """See ``Step.bind``; every (time, channel) signal can be resampled."""
        # MNE leaves data alone whose rate is the one asked for within a millionth.
        if math.isclose(self.sfreq, signal.rate_hz, rel_tol=1e-6):
            return _taking(signal, range(_width(signal)))
        ratio = _ratio(self.sfreq, signal.rate_hz, signal.n_samples)
        # mne.filter._resamp_ratio_len: the length, rounded in float as MNE rounds it.
        n_out = max(round(self.sfreq / signal.rate_hz * signal.n_samples), 1) if signal.n_samples else 0
        gaps = tuple(_resampled(gap, ratio, n_out) for gap in signal.gaps)
        out = replace(_output(signal, n_samples=n_out), rate_hz=self.sfreq, gaps=gaps)
        return _Polyphase(out, signal.n_samples, ratio.numerator, ratio.denominator, _antialias(ratio))


def _ratio(sfreq: float, rate_hz: float, n_samples: int) -> Fraction:
    """Write the ratio of two rates in integers, small ones where rates are odd.

    600.614990234375 Hz (a MEG system's 600 Hz) to 100 Hz is 409600 / 2460119 in full,
    a filter of 0.4 GB; a ratio that leaves the last sample within a thousandth of a
    sample period is as good.
    """
    exact = Fraction(str(sfreq)) / Fraction(str(rate_hz))
    largest = 1000
    ratio = exact.limit_denominator(largest)
    while abs(ratio - exact) * n_samples > Fraction(1, 1000):
        largest *= 2
        ratio = exact.limit_denominator(largest)
    return ratio


def _antialias(ratio: Fraction) -> FloatArray:
    """Design the filter of ``scipy.signal.resample_poly``, which MNE's polyphase method uses."""
    from scipy.signal import firwin

    longest = max(ratio.numerator, ratio.denominator)
    taps: FloatArray = firwin(20 * longest + 1, 1.0 / longest, window=("kaiser", 5.0))
    return taps * ratio.numerator


def _resampled(gap: Gap, ratio: Fraction, n_out: int) -> Gap:
    if gap.start == gap.stop:  # a joint lies between two samples, and stays between two
        place = min(math.ceil(gap.start * ratio), n_out)
        return Gap(place, place)
    return Gap(min(math.floor(gap.start * ratio), n_out), min(math.ceil(gap.stop * ratio), n_out))


# -- stages ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Pointwise:
    """A stage whose every sample depends on the input sample of the same time."""

    signal: Signal
    change: Callable[[FloatArray], FloatArray]
    """Takes and gives (time, channel) float64, and may overwrite what it takes."""
    working_share: float
    """Memory that ``change`` takes, as a share of its input."""

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def working_bytes(self, start: int, stop: int) -> int:
        return math.ceil((stop - start) * self.signal.array.sample_bytes * self.working_share)

    def apply(self, x: FloatArray, start: int, stop: int) -> FloatArray:
        return self.change(x)


def _take(columns: list[int], x: FloatArray) -> FloatArray:
    return x.T[columns].T


def _keep(x: FloatArray) -> FloatArray:
    return x


def _multiply(factor: float, x: FloatArray) -> FloatArray:
    x *= factor
    return x


def _clip(limit: float, x: FloatArray) -> FloatArray:
    return np.clip(x, -limit, limit, out=x)


def _subtract_mean(sources: list[int], targets: list[int], x: FloatArray) -> FloatArray:
    # One channel after the other: indexing several at once would copy the whole block.
    mean = x[:, sources[0]].copy()
    for column in sources[1:]:
        mean += x[:, column]
    mean /= len(sources)
    for column in targets:
        x[:, column] -= mean
    return x


@dataclass(frozen=True, slots=True, eq=False)
class _Fir:
    """A zero-phase FIR filter within each stretch between gaps; gaps pass unchanged.

    Beyond the ends of a stretch lies what MNE's ``reflect_limited`` padding puts there:
    the stretch mirrored at its last sample, through it, and zeros beyond its length.
    """

    signal: Signal
    taps: FloatArray
    """(tap,) float64, odd and symmetric."""
    stretches: tuple[_Stretch, ...]

    @property
    def half(self) -> int:
        return len(self.taps) // 2

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        first, last = self.stretches[self._index(start)], self.stretches[self._index(stop - 1)]
        a = max(start - self.half, first.start) if first.measured else start
        b = min(stop + self.half, last.stop) if last.measured else stop
        return a, b

    def _index(self, sample: int) -> int:
        return bisect_right(self.stretches, sample, key=lambda stretch: stretch.start) - 1

    def working_bytes(self, start: int, stop: int) -> int:
        # The padded rows, their spectrum and its inverse, and as much again that pocketfft
        # takes for its own; and the filter's spectrum.
        n_out = min(stop - start, 3 * _piece(len(self.taps)) // 2)  # what one FFT takes at most
        fft_bytes = 8 * (_fft_length(n_out, len(self.taps)) + 2)
        scratch_bytes = (5 * _ROWS + 2) * fft_bytes + SMALL_BYTES
        return (stop - start) * self.signal.array.sample_bytes + scratch_bytes

    def apply(self, x: FloatArray, start: int, stop: int) -> FloatArray:
        """See ``Stage.apply``; ``x`` is left as it was."""
        first, _ = self.needs(start, stop)
        rows = x.T
        out = np.empty((rows.shape[0], stop - start))
        for stretch in self.stretches[self._index(start) : self._index(stop - 1) + 1]:
            a, b = max(start, stretch.start), min(stop, stretch.stop)
            if stretch.measured:
                self._convolve(_Held(rows, first, stretch), a, out[:, a - start : b - start])
            else:
                out[:, a - start : b - start] = rows[:, a - first : b - first]
        return out.T

    def _convolve(self, held: _Held, start: int, out: FloatArray) -> None:
        """Fill ``out``, (channel, time), with the filtered samples from ``start`` on.

        By overlap and save: the circular convolution of n samples is right in all but the
        first taps - 1 of them.
        """
        from scipy.fft import irfft, rfft

        n_channels, n_out = out.shape
        n_fft = _fft_length(n_out, len(self.taps))
        halo = 2 * self.half
        step = n_fft - halo
        spectrum = rfft(self.taps, n_fft)
        padded = np.empty((min(_ROWS, n_channels), n_fft))
        for row in range(0, n_channels, _ROWS):
            some = held.channels(row, row + _ROWS)
            scratch = padded[: len(some.rows)]
            for a in range(0, n_out, step):
                b = min(a + step, n_out)
                some.fill(scratch, start + a - self.half, start + b + self.half)
                product = rfft(scratch)
                self._check(product, row)
                product *= spectrum
                filtered = irfft(product, n_fft, overwrite_x=True)
                out[row : row + _ROWS, a:b] = filtered[:, halo : halo + b - a]

    def _check(self, spectrum: NDArray[np.complex128], row: int) -> None:
        """Refuse NaN and infinity, which would spread over as much as the FFT happens to hold."""
        finite = np.isfinite(spectrum[:, 0])  # the sum of the row
        if not finite.all():
            column = row + int(np.argmin(finite))
            name = self.signal.channels[column].name if self.signal.channels else str(column)
            raise SourceError(
                f"Channel {name} of signal {self.signal.name!r} has samples that are not finite, which a "
                "filter cannot take. Mark them as a gap, drop the channel, or leave the recording out."
            )


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Samples [start, stop) that neighbour each other in time, or one gap."""

    start: int
    stop: int
    measured: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """The samples of one stretch that are at hand."""

    rows: FloatArray
    """(channel, time) float64 from sample ``first`` of the signal on."""
    first: int
    stretch: _Stretch

    def channels(self, start: int, stop: int) -> _Held:
        return replace(self, rows=self.rows[start:stop])

    def fill(self, out: FloatArray, start: int, stop: int) -> None:
        """Write samples [start, stop), the stretch continued beyond its ends, then zeros.

        References
        ----------
        ``mne.cuda._smart_pad`` of MNE 1.13 with ``pad="reflect_limited"``: the stretch
        mirrored through its last sample, as far as it goes, and zeros beyond that.
        """
        a, b = max(start, self.stretch.start), min(stop, self.stretch.stop)
        left, right = a - start, b - start
        out[:, :left] = 0.0
        out[:, left:right] = self.rows[:, a - self.first : b - self.first]
        out[:, right:] = 0.0
        n_mirror = self.stretch.stop - self.stretch.start - 1
        if before := min(left, n_mirror):
            edge = self.stretch.start - self.first
            mirrored = self.rows[:, edge + before : edge : -1]
            np.subtract(2 * self.rows[:, edge : edge + 1], mirrored, out=out[:, left - before : left])
        if after := min(stop - b, n_mirror):
            edge = self.stretch.stop - 1 - self.first
            mirrored = self.rows[:, edge - after : edge][:, ::-1]
            np.subtract(2 * self.rows[:, edge : edge + 1], mirrored, out=out[:, right : right + after])


def _stretches(signal: Signal) -> Iterator[_Stretch]:
    """Walk through a signal's stretches and gaps; together they are all its samples."""
    at = 0
    for gap in signal.gaps:
        start, stop = max(gap.start, at), min(gap.stop, signal.n_samples)
        if at < start:
            yield _Stretch(at, start, measured=True)
        if start < stop:
            yield _Stretch(start, stop, measured=False)
        at = max(at, start, stop)
    if at < signal.n_samples:
        yield _Stretch(at, signal.n_samples, measured=True)


def measured(signal: Signal, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Walk through the parts of samples [start, stop) that lie in no gap.

    Examples
    --------
    >>> signal = Signal("eeg", ArraySpec((10, 1), "float64", ("time", "channel")), 100.0, gaps=(Gap(3, 5),))
    >>> list(measured(signal, 2, 8))
    [(2, 3), (5, 8)]
    """
    for stretch in _stretches(signal):
        a, b = max(start, stretch.start), min(stop, stretch.stop)
        if stretch.measured and a < b:
            yield a, b


_ROWS = 8
"""Channels filtered at once: enough for pocketfft's vector lanes, few enough for the cache.

On 129 channels, 4, 8 and 16 at once took the same time within 5 %, all 129 up to 1.7 times
as long (scipy 1.17, one core, filters of 661 to 16,501 taps)."""

SMALL_BYTES = 64 << 10
"""Allowance for what does not grow with the block: slices, short arrays, objects of Python."""


def _piece(n_taps: int) -> int:
    """Say about how many samples to filter with one FFT, which is then four filters long.

    From two to eight filters long all took within 25 % of the shortest time (129 channels,
    filters of 661 to 16,501 taps); below 4096 samples the calls cost more than the arithmetic.
    """
    return max(8192, 4 * n_taps) - (n_taps - 1)


def _fft_length(n_out: int, n_taps: int) -> int:
    """Choose the FFT that filters ``n_out`` samples in pieces of even length."""
    from scipy.fft import next_fast_len

    n_pieces = max(1, round(n_out / _piece(n_taps)))
    return int(next_fast_len(-(-n_out // n_pieces) + n_taps - 1, real=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Polyphase:
    """Resampling by up / down, the signal mirrored at its first and last sample.

    Output sample t lies at input time t * down / up and depends on the input samples j
    with abs(t * down - j * up) <= half, half the filter's length.
    """

    signal: Signal
    n_in: int
    up: int
    down: int
    taps: FloatArray
    """(tap,) float64, odd and symmetric, at ``up`` times the input's rate."""

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Say which samples are reached, were the signal without ends."""
        half = len(self.taps) // 2
        return -((half - start * self.down) // self.up), ((stop - 1) * self.down + half) // self.up + 1

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        first, end = self._reach(start, stop)
        last = self.n_in - 1
        if first < -last or end - 1 > 2 * last:  # mirrored more than once
            return 0, self.n_in
        # Sample -i is sample i, which is within reach; last + i is last - i, which need not be.
        return min(max(first, 0), 2 * last - (end - 1)), min(end, self.n_in)

    def working_bytes(self, start: int, stop: int) -> int:
        first, end = self._reach(start, stop)
        mirrored = end - first if first < 0 or end > self.n_in else 0
        filtered = stop - start + 2 * (len(self.taps) // self.down + 2)
        scratch_bytes = 4 * self.taps.nbytes + 3 * 8 * mirrored + SMALL_BYTES
        return (mirrored + filtered) * self.signal.array.sample_bytes + scratch_bytes

    def apply(self, x: FloatArray, start: int, stop: int) -> FloatArray:
        """See ``Stage.apply``; ``x`` is left as it was."""
        from scipy.signal import upfirdn

        first, end = self._reach(start, stop)
        offset, _ = self.needs(start, stop)
        if first < 0 or end > self.n_in:
            rows = x.T[:, _mirror(np.arange(first, end), self.n_in) - offset]
        else:
            rows = x.T[:, first - offset : end - offset]
        # Output ``start`` stands at this place of the full convolution, which upfirdn gives
        # at multiples of ``down`` only: zeros before the filter move it to one.
        place = start * self.down + len(self.taps) // 2 - first * self.up
        zeros = -place % self.down
        filtered = upfirdn(np.pad(self.taps, (zeros, 0)), rows, self.up, self.down, axis=-1)
        skip = (place + zeros) // self.down
        result: FloatArray = filtered[:, skip : skip + stop - start].T
        return result


def _mirror(index: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Fold sample numbers beyond the ends back in, as ``padtype="reflect"`` does."""
    if n == 1:  # SciPy 1.17 itself divides by zero here
        return np.zeros_like(index)
    index = index % (2 * (n - 1))
    return np.where(index < n, index, 2 * (n - 1) - index)


# -- signals and settings ----------------------------------------------------------------


def _width(signal: Signal) -> int:
    return signal.array.sample_shape[0]


def _output(
    signal: Signal, *, channels: tuple[Channel, ...] | None = None, n_samples: int | None = None
) -> Signal:
    """Describe what a stage gives: float64, the rest as it came but for what is named."""
    channels = signal.channels if channels is None else channels
    n_samples = signal.n_samples if n_samples is None else n_samples
    width = len(channels) or _width(signal)
    return replace(
        signal, array=ArraySpec((n_samples, width), "float64", signal.array.axes), channels=channels
    )


def _taking(signal: Signal, columns: Sequence[int]) -> _Pointwise:
    """Keep the channels of these numbers, in this order."""
    columns = list(columns)
    if columns == list(range(_width(signal))):
        return _Pointwise(_output(signal), _keep, 0.0)
    if not signal.channels:
        spec = ArraySpec((signal.n_samples, len(columns)), "float64", signal.array.axes)
        return _Pointwise(replace(signal, array=spec), partial(_take, columns), 1.0)
    channels = tuple(signal.channels[column] for column in columns)
    return _Pointwise(_output(signal, channels=channels), partial(_take, columns), 1.0)


def _columns(signal: Signal, names: Sequence[str], step: Step) -> list[int]:
    """Find channels by name, in the order of the names."""
    numbers = {channel.name: index for index, channel in enumerate(signal.channels)}
    missing = [name for name in names if name not in numbers]
    if missing:
        raise SourceError(
            f"{type(step).__name__} names {', '.join(missing)}; signal {signal.name!r} has "
            f"{_listed(signal.channels)}. Name channels that every recording has."
        )
    return [numbers[name] for name in names]


def _listed(channels: Sequence[Channel]) -> str:
    names = [channel.name for channel in channels]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "channels without names"


def _several(value: object, what: str) -> Sequence[Any]:
    """Refuse one value where several belong; one text would be taken for its letters."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{what} is {value!r}. Give a list, such as [{value!r}].")
    return value


def _words(value: object, what: str) -> tuple[str, ...]:
    return tuple(str(word) for word in _several(value, what))


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {value!r}. Give a number.") from None
    if not math.isfinite(number):
        raise InputError(f"{what} is {number}. Give a finite number.")
    return number


def _positive(value: Any, what: str) -> float:
    number = _number(value, what)
    if number <= 0:
        raise InputError(f"{what} is {number}. Give a number above zero.")
    return number


def _json(value: Any) -> JSON:
    return list(value) if isinstance(value, tuple) else value
