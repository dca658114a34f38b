"""Synthetic scalp EEG and the BDF files that carry it.

This module decides what the samples look like: a few latent sources (1/f background, posterior
alpha, blinks, saccades, a posterior evoked component) seen by the electrodes of a GSN-HydroCel-129
net through smooth patterns, referenced to Cz. Who is recorded, what happens when, and what the
files are called is left to ``engram.testing.hbn``.

The same arguments give the same bytes for any number of jobs and threads, any BLAS and any
processor: latents and patterns are rounded to integers before they are mixed, and sums of integers
below 2**53 are exact in float64 in whatever order they are added. What differs between processors
before that, the last bit of a sine, is lost in the rounding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError, MissingExtra

__all__ = ["CHANNELS", "STEP_UV", "Pulse", "Script", "Voice", "digital_blocks", "generator", "write_bdf"]

CHANNELS = (*(f"E{k}" for k in range(1, 129)), "Cz")
"""Channel names of a GSN-HydroCel-129 net; Cz is the reference and carries no signal."""
STEP_UV = 1 / 1024
"""One step of the 24-bit samples in microvolt: a power of two, so that float32 holds every sample."""

_RANGE_UV = 8000  # physical range of the header; 8000 * 1024 steps stay within 24 bits
_HEADER_RECORDS = slice(236, 244)  # "number of data records" of an EDF/BDF header, 8 ASCII digits

_N_BACKGROUND = 20
_HIGHPASS_HZ = 0.5  # the released HBN-EEG was filtered 0.5-50 Hz; 50 Hz is the Nyquist rate at 100 Hz
_BACKGROUND_UV = 12.0  # RMS over the head; with alpha and eyes the total is 15-25 microvolt
_ALPHA_OPEN_UV = 4.0
_ALPHA_CLOSED_UV = 11.0
_ALPHA_WIDTH_HZ = 0.6  # a narrow band beats: waxing and waning over one or two seconds
_BLOCK_S = 60  # background is drawn in blocks that overlap by half, so memory does not grow with length
_PULSE_REACH_S = 2.0
_PATTERN_STEPS = 4096  # patterns are rounded to 1/4096 of their peak
_NOISE_STEPS = 7  # four uniform bytes summed have a deviation of 147.8: times 7 steps, 1.0 microvolt


@dataclass(frozen=True, slots=True)
class Voice:
    """How one subject's brain sounds, whatever it does."""

    key: tuple[int, ...]
    """Place of the subject in the seed tree; decides the patterns of the background."""
    exponent: float
    """Exponent of the background's power spectrum, 1 / f**exponent."""
    alpha_hz: float
    """Frequency of the alpha rhythm."""
    gain: float
    """Factor on background and alpha."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """One transient of a source."""

    time_s: float
    """Time of its peak (of its start, for a saccade)."""
    peak_uv: float
    """Its height at the electrode that sees it best."""


@dataclass(frozen=True, slots=True)
class Script:
    """What happens during one recording."""

    key: tuple[int, ...]
    """Place of the recording in the seed tree; decides background and noise."""
    duration_s: int
    """Length, in whole seconds: a BDF data record lasts one."""
    closed_s: tuple[tuple[float, float], ...] = ()
    """Stretches [start, stop) with the eyes closed."""
    blinks: tuple[Pulse, ...] = ()
    """Eye blinks."""
    saccades: tuple[Pulse, ...] = ()
    """Horizontal eye movements; positive to the left."""
    components: tuple[Pulse, ...] = ()
    """Peaks of the posterior evoked component."""


def generator(seed: int, key: Sequence[int]) -> np.random.Generator:
    """Return the random generator of one place in the seed tree.

    Examples
    --------
    >>> int(generator(0, (1, 2)).integers(1000)) == int(generator(0, (1, 2)).integers(1000))
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=tuple(key))))


def digital_blocks(seed: int, voice: Voice, script: Script, rate_hz: int) -> Iterator[NDArray[np.int32]]:
    """Play a script, half a minute at a time.

    Parameters
    ----------
    seed
        Root of the seed tree.
    voice, script
        Who is recorded, and what happens.
    rate_hz
        Samples per second.

    Yields
    ------
    ndarray
        (channel, time) int32 of whole seconds, in steps of ``STEP_UV``, channels as ``CHANNELS``.

    Raises
    ------
    MissingExtra
        If mne, which knows the electrode positions, is not installed.
    """
    patterns = np.rint(_patterns(seed, voice.key) * _PATTERN_STEPS)
    hop = _BLOCK_S // 2 * rate_hz
    n_samples = script.duration_s * rate_hz
    tail = _rhythms(seed, voice, script.key, 0, rate_hz)[:, hop:]
    for number, start in enumerate(range(0, n_samples, hop), 1):
        stop = min(start + hop, n_samples)
        block = _rhythms(seed, voice, script.key, number, rate_hz)
        rhythms = (tail + block[:, :hop])[:, : stop - start]
        tail = block[:, hop:]
        latents = np.vstack([rhythms, np.zeros((3, stop - start))])
        latents[-5:-3] *= _alpha_gain(script, np.arange(start, stop) / rate_hz)
        _add_pulses(latents[-3], script.blinks, _blink, start, rate_hz)
        _add_pulses(latents[-2], script.saccades, _saccade, start, rate_hz)
        _add_pulses(latents[-1], script.components, _component, start, rate_hz)
        mixed = np.rint(patterns @ np.rint(latents / STEP_UV) / _PATTERN_STEPS).astype(np.int32)
        mixed[:-1] += _noise(generator(seed, (*script.key, 1, number)), mixed[:-1].shape)
        yield mixed


def write_bdf(
    path: Path, names: Sequence[str], rate_hz: int, n_seconds: int, blocks: Iterator[NDArray[np.int32]]
) -> int:
    """Write a 24-bit BDF file block by block, in memory that does not grow with its length.

    edfio makes the header; its own writer would hold the whole recording (2.8 GB for three
    hours at 500 Hz).

    Parameters
    ----------
    path
        File to write.
    names
        Channel names.
    rate_hz
        Samples per second and per data record.
    n_seconds
        Number of data records.
    blocks
        (channel, time) int32 of whole seconds, in steps of ``STEP_UV``.

    Returns
    -------
    int
        Size of the file in bytes.

    Raises
    ------
    MissingExtra
        If edfio is not installed.
    InputError
        If the blocks hold another number of seconds than the header promises.

    References
    ----------
    EDF/BDF layout: https://www.biosemi.com/faq/file_format.htm
    """
    header = bytearray(_bdf_header(tuple(names), rate_hz))
    header[_HEADER_RECORDS] = b"%-8d" % n_seconds
    written = 0
    with path.open("wb") as file:
        file.write(header)
        for block in blocks:
            records = block.reshape(len(names), -1, rate_hz).transpose(1, 0, 2)
            low_bytes = np.ascontiguousarray(records, "<i4").view(np.uint8).reshape(-1, 4)[:, :3]
            file.write(low_bytes.tobytes())
            written += len(records)
    if written != n_seconds:
        raise InputError(
            f"{path.name} promises {n_seconds} s and got {written} s. Give blocks of that length."
        )
    return len(header) + 3 * len(names) * rate_hz * n_seconds


@lru_cache(maxsize=8)
def _bdf_header(names: tuple[str, ...], rate_hz: int) -> bytes:
    try:
        import edfio
    except ImportError as error:
        raise MissingExtra("edfio", "eeg") from error
    digital = round(_RANGE_UV / STEP_UV)
    signals = [
        edfio.BdfSignal.from_digital(
            np.zeros(rate_hz, np.int32),
            rate_hz,
            label=name,
            physical_dimension="uV",
            physical_range=(-_RANGE_UV, _RANGE_UV),
            digital_range=(-digital, digital),
            prefiltering=f"HP:{_HIGHPASS_HZ}Hz LP:{rate_hz / 2:g}Hz",
        )
        for name in names
    ]
    file = io.BytesIO()
    # Without a recording's date edfio writes 01.01.85, the date of an anonymised file.
    edfio.Bdf(signals, data_record_duration=1).write(file)
    return file.getvalue()[: 256 * (len(names) + 1)]


def _rhythms(seed: int, voice: Voice, key: tuple[int, ...], number: int, rate_hz: int) -> NDArray[np.float64]:
    """Draw one block (source, time) of background and two alpha sources, faded in and out.

    Squared sine windows that overlap by half add up to one, so the variance stays level.
    """
    n_samples = _BLOCK_S * rate_hz
    freqs_hz = np.fft.rfftfreq(n_samples, 1 / rate_hz)
    shape = np.empty((_N_BACKGROUND + 2, len(freqs_hz)))
    shape[:] = np.maximum(freqs_hz, _HIGHPASS_HZ) ** (-voice.exponent / 2) * (freqs_hz >= _HIGHPASS_HZ)
    shape[-2:] = np.exp(-0.5 * ((freqs_hz - voice.alpha_hz) / _ALPHA_WIDTH_HZ) ** 2)
    shape *= voice.gain * n_samples / (2 * np.sqrt(np.sum(shape**2, axis=1, keepdims=True)))
    draws = generator(seed, (*key, 0, number)).standard_normal((*shape.shape, 2))
    window = np.sin(np.pi * (np.arange(n_samples) + 0.5) / n_samples)
    return np.fft.irfft(shape * draws.view(np.complex128)[..., 0], n_samples) * window


def _add_pulses(
    row: NDArray[np.float64],
    pulses: Sequence[Pulse],
    shape: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    start: int,
    rate_hz: int,
) -> None:
    """Add every pulse that reaches into a row whose first sample is ``start``."""
    for pulse in pulses:
        first = max(int((pulse.time_s - _PULSE_REACH_S) * rate_hz), start)
        last = min(int((pulse.time_s + _PULSE_REACH_S) * rate_hz), start + len(row))
        if first < last:
            times_s = np.arange(first, last) / rate_hz - pulse.time_s
            row[first - start : last - start] += pulse.peak_uv * shape(times_s)


def _alpha_gain(script: Script, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Follow alpha's amplitude in microvolt: larger with the eyes closed, within half a second."""
    knots = [(t, level) for start, stop in script.closed_s for t, level in _ramp(start, stop)]
    if not knots:
        return np.full(len(times_s), _ALPHA_OPEN_UV)
    knot_s, levels = zip(*knots, strict=True)
    return np.asarray(np.interp(times_s, knot_s, levels))


def _ramp(start_s: float, stop_s: float) -> tuple[tuple[float, float], ...]:
    return (
        (start_s, _ALPHA_OPEN_UV),
        (start_s + 0.5, _ALPHA_CLOSED_UV),
        (stop_s, _ALPHA_CLOSED_UV),
        (stop_s + 0.5, _ALPHA_OPEN_UV),
    )


def _bump(times_s: NDArray[np.float64], width_s: float) -> NDArray[np.float64]:
    """Shape a peak of height one and area zero, as the high-pass leaves it."""
    wide_s = 0.4
    narrow = np.exp(-0.5 * (times_s / width_s) ** 2)
    wide = np.exp(-0.5 * (times_s / wide_s) ** 2) * width_s / wide_s
    return np.asarray((narrow - wide) / (1 - width_s / wide_s))


def _blink(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    return _bump(times_s, 0.08)


def _component(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    return _bump(times_s, 0.15)


def _saccade(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    after_s = np.maximum(times_s, 0.0)
    return np.asarray((1 - np.exp(-after_s / 0.02)) * np.exp(-after_s / 0.35))


def _noise(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Draw white sensor noise of one microvolt from integers alone."""
    parts = np.frombuffer(draw.bytes(4 * shape[0] * shape[1]), np.uint8).reshape(4, *shape)
    centred = parts.sum(axis=0, dtype=np.int32) - np.int32(4 * 255 // 2)
    return np.asarray(centred * np.int32(_NOISE_STEPS))


@lru_cache(maxsize=1)
def _positions() -> NDArray[np.float64]:
    """Find the electrodes on the unit sphere, (channel, xyz): x to the right, y to the front, z up."""
    try:
        import mne
    except ImportError as error:
        raise MissingExtra("mne", "eeg") from error
    places = mne.channels.make_standard_montage("GSN-HydroCel-129").get_positions()["ch_pos"]
    xyz = np.array([places[name] for name in CHANNELS])
    return np.asarray(xyz / np.linalg.norm(xyz, axis=1, keepdims=True))


@lru_cache(maxsize=8)
def _patterns(seed: int, key: tuple[int, ...]) -> NDArray[np.float64]:
    """Place the sources: how each electrode sees them, (channel, source), microvolt per unit.

    Background scaled to ``_BACKGROUND_UV`` over the head, every other source to a peak of one;
    Cz is subtracted from every channel, as its amplifier did.
    """
    xyz = _positions()
    draw = generator(seed, (*key, 0))
    centres = xyz[draw.integers(len(xyz), size=_N_BACKGROUND)]
    widths = draw.uniform(0.3, 0.7, _N_BACKGROUND)
    background = _seen(_spots(xyz, centres, widths))
    background *= _BACKGROUND_UV / np.sqrt(np.mean(np.sum(background**2, axis=1)))
    # HydroCel sites: E70 and E83 over O1 and O2, E62 at Pz, E25 and E8 above the eyes, E32 and E1 beside.
    alpha = _spots(xyz, _at("E70", "E83"), 0.5)
    blink = _spots(xyz, _at("E25", "E8"), 0.4).sum(axis=1)
    left, right = _spots(xyz, _at("E32", "E1"), 0.4).T
    parietal = _spots(xyz, _at("E62"), 0.45)
    others = _seen(np.column_stack([alpha, blink, left - right, parietal]))
    return np.hstack([background, others / np.abs(others).max(axis=0)])


def _at(*names: str) -> NDArray[np.float64]:
    return _positions()[[CHANNELS.index(name) for name in names]]


def _spots(
    xyz: NDArray[np.float64], centres: NDArray[np.float64], widths: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Draw round spots on the head, (channel, spot)."""
    squared = np.sum((xyz[:, None] - centres) ** 2, axis=2)
    return np.asarray(np.exp(-squared / (2 * widths**2)))


def _seen(patterns: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(patterns - patterns[CHANNELS.index("Cz")])
