"""Every step gives what MNE-Python gives on the whole recording, whatever range is asked for."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import resample_poly

from engram.arrays import ArraySpec
from engram.errors import InputError, SourceError
from engram.preparation.steps import (
    BandPass,
    Clip,
    DropFlat,
    HighPass,
    LowPass,
    Notch,
    PickChannels,
    Rereference,
    Resample,
    Scale,
    Scan,
    Stage,
    Step,
    measured,
)
from engram.recordings.recording import Channel, Gap, Signal

Array = NDArray[np.float64]

TOLERANCE = 1e-12
"""Largest difference to MNE as a share of the largest sample. Measured: below 3e-14."""


def signal_of(
    n_samples: int,
    rate_hz: float = 100.0,
    channels: tuple[Channel, ...] = (Channel("E1"), Channel("E2")),
    gaps: tuple[Gap, ...] = (),
) -> Signal:
    """Describe a signal, without its samples."""
    spec = ArraySpec((n_samples, len(channels)), "float64", ("time", "channel"))
    return Signal("eeg", spec, rate_hz, channels=channels, gaps=gaps)


def samples_of(signal: Signal, seed: int = 0) -> Array:
    """Noise with a drift and a large offset, as an amplifier without a high-pass gives."""
    rng = np.random.default_rng(seed)
    n_samples, n_channels = signal.array.shape
    x = rng.standard_normal((n_channels, n_samples)).cumsum(axis=1)
    return (x + 1000 * rng.standard_normal((n_channels, 1))).T


def run(stage: Stage, x: Array, block: int) -> Array:
    """Compute a stage's whole output in blocks, each from no more than what it needs."""
    n_samples = stage.signal.n_samples
    blocks = []
    for start in range(0, n_samples, block):
        stop = min(start + block, n_samples)
        a, b = stage.needs(start, stop)
        out = stage.apply(x[a:b].T.copy().T, start, stop)
        assert out.shape == (stop - start, *stage.signal.array.sample_shape)
        assert out.dtype == np.float64
        blocks.append(out)
    return np.concatenate(blocks)


def raw_of(signal: Signal, x: Array) -> mne.io.RawArray:
    """Hand a signal to MNE, its gaps as annotations that MNE's filters do not reach over."""
    types = [channel.type for channel in signal.channels]
    info = mne.create_info([channel.name for channel in signal.channels], signal.rate_hz, types)
    info["bads"] = [channel.name for channel in signal.channels if channel.bad]
    raw = mne.io.RawArray(x.T.copy(), info, verbose="ERROR")
    for gap in signal.gaps:
        onset_s, duration_s = gap.start / signal.rate_hz, (gap.stop - gap.start) / signal.rate_hz
        raw.annotations.append(onset_s, duration_s, "BAD_ACQ_SKIP" if duration_s else "EDGE boundary")
    return raw


def by_mne(signal: Signal, x: Array, change: Callable[[mne.io.RawArray], object]) -> Array:
    """Let MNE change the whole signal at once."""
    raw = raw_of(signal, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="filter_length", category=RuntimeWarning)
        change(raw)
    data: Array = raw.get_data()
    return data.T


def assert_same(found: Array, expected: Array, x: Array) -> None:
    """Compare to the tolerance, which is a share of the largest sample that came in."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= TOLERANCE * np.abs(x).max(initial=1)


FILTERS: list[tuple[Step, Callable[[mne.io.RawArray], object]]] = [
    (HighPass(0.5), lambda raw: raw.filter(0.5, None, verbose="ERROR")),
    (HighPass(2.0), lambda raw: raw.filter(2.0, None, verbose="ERROR")),
    (LowPass(40.0), lambda raw: raw.filter(None, 40.0, verbose="ERROR")),
    (BandPass(1.0, 30.0), lambda raw: raw.filter(1.0, 30.0, verbose="ERROR")),
    (Notch([20.0, 40.0]), lambda raw: raw.notch_filter([20.0, 40.0], verbose="ERROR")),
    (Notch([25.0]), lambda raw: raw.notch_filter(25.0, verbose="ERROR")),
]


@st.composite
def gapped(draw: st.DrawFn) -> Signal:
    """Draw a signal of any length, shorter and longer than the filters, with gaps and joints."""
    n_samples = draw(st.integers(1, 3000))
    cuts = sorted(draw(st.sets(st.integers(1, n_samples - 1), max_size=6))) if n_samples > 1 else []
    gaps = [Gap(a, a if draw(st.booleans()) else b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    channels = tuple(Channel(f"E{i}") for i in range(draw(st.sampled_from([1, 3, 8, 17]))))
    return signal_of(n_samples, draw(st.sampled_from([100.0, 128.0, 250.0])), channels, tuple(gaps))


@pytest.mark.parametrize(("step", "change"), FILTERS, ids=[str(step) for step, _ in FILTERS])
@settings(max_examples=25)
@given(signal=gapped(), block=st.sampled_from([1, 7, 100, 1000, 9999]), seed=st.integers(0, 99))
def test_filters_equal_mne(
    step: Step, change: Callable[[mne.io.RawArray], object], signal: Signal, block: int, seed: int
) -> None:
    """A filter gives MNE's samples in blocks of any size, at edges and gaps, for any length."""
    block = max(block, signal.n_samples // 50)
    x = samples_of(signal, seed)
    stage = step.bind(signal)
    assert stage.signal == signal
    assert_same(run(stage, x, block), by_mne(signal, x, change), x)


def test_long_blocks_of_many_ffts_equal_mne() -> None:
    """A block longer than one FFT, with a long filter, gives MNE's samples."""
    signal = signal_of(60_000, 500.0, tuple(Channel(f"E{i}") for i in range(9)))
    x = samples_of(signal)
    expected = by_mne(signal, x, lambda raw: raw.filter(0.5, None, verbose="ERROR"))
    for block in (60_000, 35_001):
        assert_same(run(HighPass(0.5).bind(signal), x, block), expected, x)


RATES = [(500.0, 100.0), (512.0, 100.0), (5000.0, 250.0), (128.0, 100.0), (100.0, 128.0), (250.0, 100.0)]


@pytest.mark.parametrize(("rate_hz", "sfreq"), RATES)
@settings(max_examples=15)
@given(periods=st.integers(2, 150), block=st.sampled_from([1, 7, 100, 5000]))
def test_resample_equals_mne(rate_hz: float, sfreq: float, periods: int, block: int) -> None:
    """Where the new length is whole, resampling gives MNE's samples in blocks of any size."""
    down = int(rate_hz / np.gcd(int(rate_hz), int(sfreq)))
    signal = signal_of(periods * down, rate_hz)
    x = samples_of(signal, periods)
    stage = Resample(sfreq).bind(signal)
    assert stage.signal.rate_hz == sfreq
    expected = by_mne(signal, x, lambda raw: raw.resample(sfreq, method="polyphase", verbose="ERROR"))
    assert_same(run(stage, x, max(block, len(expected) // 50)), expected, x)


@pytest.mark.parametrize(("rate_hz", "sfreq"), RATES)
@settings(max_examples=15)
@given(n_samples=st.integers(2, 6000), block=st.sampled_from([1, 7, 100, 5000]))
def test_resample_keeps_the_clock(rate_hz: float, sfreq: float, n_samples: int, block: int) -> None:
    """For any length, resampling is SciPy's by the exact ratio of the rates, as long as MNE's.

    From two samples on: SciPy 1.17 divides by zero mirroring one (SIGFPE ends the process).
    """
    signal = signal_of(n_samples, rate_hz)
    x = samples_of(signal, n_samples)
    stage = Resample(sfreq).bind(signal)
    n_out = stage.signal.n_samples
    assert n_out == mne.filter.resample(x[:, 0], sfreq, rate_hz, verbose="ERROR").size
    expected = resample_poly(x.T.copy(), int(sfreq), int(rate_hz), axis=-1, padtype="reflect").T[:n_out]
    assert_same(run(stage, x, max(block, n_out // 50)), expected, x)


def test_resampled_samples_are_at_their_times() -> None:
    """Sample k of the result is the signal at k / sfreq, up to the end of a long recording."""
    signal = signal_of(100_003, 500.0, (Channel("E1"),))
    tone = np.sin(2 * np.pi * 7.3 * np.arange(100_003) / 500)[:, None]
    found = run(Resample(100).bind(signal), tone, 5000)[:, 0]
    times_s = np.arange(len(found)) / 100
    inner = slice(50, -50)
    assert np.abs(found - np.sin(2 * np.pi * 7.3 * times_s))[inner].max() < 2e-3


def test_odd_rates_resample_without_a_huge_filter() -> None:
    """A rate that is no small ratio of the other keeps its last sample within 1/1000 of a period."""
    signal = signal_of(166_800, 600.614990234375)
    stage: Any = Resample(100).bind(signal)
    drift = abs(stage.up / stage.down - 100 / 600.614990234375) * signal.n_samples
    assert drift < 1e-3
    assert stage.taps.nbytes < 4 << 20


def test_resample_to_the_same_rate_changes_nothing() -> None:
    """A rate within a millionth of the one asked for is left alone, as MNE leaves it."""
    signal = signal_of(20, 100.00001)
    stage = Resample(100).bind(signal)
    assert stage.signal == signal
    assert np.array_equal(run(stage, samples_of(signal), 7), samples_of(signal))


def test_resample_maps_gaps() -> None:
    """A resampled gap covers every sample within it; a joint stays a joint; all stay inside."""
    gaps = (Gap(10, 10), Gap(11, 11), Gap(22, 38), Gap(95, 99))
    stage = Resample(20).bind(signal_of(99, 100.0, gaps=gaps))
    assert stage.signal.gaps == (Gap(2, 2), Gap(3, 3), Gap(4, 8), Gap(19, 20))
    assert stage.signal.n_samples == 20


@settings(max_examples=50)
@given(
    step=st.sampled_from([HighPass(5.0), Notch([20.0]), Resample(40.0), Resample(130.0), Scale(2.0)]),
    signal=gapped(),
    data=st.data(),
)
def test_needs_grow_with_the_range(step: Step, signal: Signal, data: st.DataObject) -> None:
    """A range needs samples of the input only, and all that any range within it needs."""
    stage = step.bind(signal)
    if stage.signal.n_samples < 2:
        return
    a, b, c, d = sorted(data.draw(st.integers(0, stage.signal.n_samples - 1)) for _ in range(4))
    outer, inner = stage.needs(a, d + 1), stage.needs(b, c + 1)
    assert 0 <= outer[0] <= inner[0] < inner[1] <= outer[1] <= signal.n_samples


@pytest.mark.parametrize(
    ("step", "rate_hz"),
    [(HighPass(60), 100.0), (LowPass(50), 100.0), (BandPass(1, 64), 128.0), (Notch([50]), 100.0)],
)
def test_frequencies_that_do_not_suit_are_refused(step: Step, rate_hz: float) -> None:
    """A filter beyond half the sampling rate refuses the recording and names both."""
    with pytest.raises(SourceError, match=rf"{step.name.title().replace('_', '')}.* of {rate_hz:g} Hz"):
        step.bind(signal_of(1000, rate_hz))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_filters_refuse_what_is_not_finite(value: float) -> None:
    """NaN or infinity in reach of a filter is refused by channel; within a gap it passes through."""
    channels = tuple(Channel(f"E{i}") for i in range(12))
    x = samples_of(signal_of(500, 100.0, channels))
    x[250, 10] = value
    with pytest.raises(SourceError, match="Channel E10 "):
        run(HighPass(5).bind(signal_of(500, 100.0, channels)), x, 500)
    out = run(HighPass(5).bind(signal_of(500, 100.0, channels, (Gap(240, 260),))), x, 100)
    assert np.array_equal(out[240:260], x[240:260], equal_nan=True)
    assert np.isfinite(np.delete(out, 250, axis=0)).all()


# -- channels and values -----------------------------------------------------------------

MIXED = (Channel("E1"), Channel("E2"), Channel("M1", "misc", ""), Channel("E3", bad=True), Channel("E4"))


@pytest.mark.parametrize(
    ("step", "picks"),
    [
        (PickChannels(names=["E4", "E1"]), ["E4", "E1"]),
        (PickChannels(types=["eeg"]), "eeg"),
        (PickChannels(types=["misc", "eeg"]), ["misc", "eeg"]),
    ],
)
def test_pick_keeps_mnes_order(step: PickChannels, picks: Any) -> None:
    """Names come in the order of the names and types in the recording's, as with Raw.pick."""
    signal = signal_of(30, channels=MIXED)
    x = samples_of(signal)
    stage = step.bind(signal)
    raw = raw_of(signal, x).pick(picks)
    assert [channel.name for channel in stage.signal.channels] == raw.ch_names
    assert np.array_equal(run(stage, x, 7), raw.get_data().T)


def test_pick_excludes() -> None:
    """Excluded names are left out where they exist; alone, all others are kept."""
    stage = PickChannels(exclude=["E2", "Cz"]).bind(signal_of(3, channels=MIXED))
    assert [channel.name for channel in stage.signal.channels] == ["E1", "M1", "E3", "E4"]
    assert stage.signal.channels[1] == MIXED[2]


@pytest.mark.parametrize("step", [PickChannels(names=["E1", "Oz"]), PickChannels(types=["ecog"])])
def test_pick_refuses_what_is_not_there(step: PickChannels) -> None:
    """A recording without a named channel, or left without any, is refused with what it has."""
    with pytest.raises(SourceError, match="E1, E2, M1"):
        step.bind(signal_of(3, channels=MIXED))


def test_drop_flat() -> None:
    """Channels that vary by no more than the threshold are dropped, and so are those of NaN."""
    signal = signal_of(3, channels=tuple(Channel(name) for name in ("flat", "nan", "small", "large")))
    scan = Scan(np.array([5.0, np.nan, 0.0, 0.0]), np.array([5.0, np.nan, 1.0, 2.0]))
    step = DropFlat()
    assert [c.name for c in step.bind_scanned(signal, scan).signal.channels] == ["small", "large"]
    assert [c.name for c in DropFlat(1.0).bind_scanned(signal, scan).signal.channels] == ["large"]
    assert step.bind(signal).signal == signal
    with pytest.raises(SourceError, match="Every channel"):
        DropFlat(2.0).bind_scanned(signal, scan)


def test_drop_flat_without_names() -> None:
    """A signal whose channels have no names loses columns, and stays without names."""
    signal = Signal("robs", ArraySpec((5, 3), "float64", ("time", "unit")), 120.0)
    stage = DropFlat().bind_scanned(signal, Scan(np.zeros(3), np.array([1.0, 0.0, 1.0])))
    assert stage.signal.array == ArraySpec((5, 2), "float64", ("time", "unit"))
    assert run(stage, np.arange(15.0).reshape(5, 3), 2).tolist()[0] == [0.0, 2.0]


def test_drop_flat_in_microvolts_only() -> None:
    """A threshold in microvolts refuses channels of another unit."""
    with pytest.raises(SourceError, match="'T'"):
        DropFlat(1.0).bind(signal_of(3, channels=(Channel("MEG1", "grad", "T"),)))


@pytest.mark.parametrize("reference", ["average", ["E1"], ["E4", "E2"], ["M1"], ["E3"]])
def test_rereference_equals_mne(reference: Any) -> None:
    """The reference is MNE's: bad channels and other types neither count nor change."""
    signal = signal_of(50, channels=MIXED)
    x = samples_of(signal)
    expected = by_mne(signal, x, lambda raw: raw.set_eeg_reference(reference, verbose="ERROR"))
    assert_same(run(Rereference(reference).bind(signal), x, 7), expected, x)


def test_rereference_takes_the_first_electrode_type() -> None:
    """Of several electrode types MNE's first is re-referenced, the other left alone."""
    signal = signal_of(50, channels=(Channel("S1", "seeg"), Channel("C1", "ecog"), Channel("C2", "ecog")))
    x = samples_of(signal)
    expected = by_mne(signal, x, lambda raw: raw.set_eeg_reference("average", verbose="ERROR"))
    assert_same(run(Rereference().bind(signal), x, 50), expected, x)


def test_rereference_refuses() -> None:
    """A signal without electrodes, or without the reference named, is refused."""
    with pytest.raises(SourceError, match="no good channel"):
        Rereference().bind(signal_of(3, channels=(Channel("M1", "misc"),)))
    with pytest.raises(SourceError, match="names Cz"):
        Rereference(["Cz"]).bind(signal_of(3))


def test_scale_and_clip() -> None:
    """Scaling multiplies and renames the unit; clipping limits both sides and keeps NaN."""
    signal = signal_of(3)
    x = np.array([[1.0, -8.0], [np.nan, 4.0], [0.0, 100.0]])
    scale = Scale(1e-3, unit="mV").bind(signal)
    assert [channel.unit for channel in scale.signal.channels] == ["mV", "mV"]
    assert np.array_equal(run(scale, x, 2), x * 1e-3, equal_nan=True)
    assert Scale(2).bind(signal).signal == signal
    clipped = run(Clip(5).bind(signal), x, 2)
    assert np.array_equal(clipped, [[1.0, -5.0], [np.nan, 4.0], [0.0, 5.0]], equal_nan=True)


# -- values ------------------------------------------------------------------------------

PINNED: list[tuple[Step, str, dict[str, Any]]] = [
    (PickChannels(names=["E1"]), "pick_channels", {"names": ["E1"], "types": [], "exclude": []}),
    (DropFlat(), "drop_flat", {"threshold_uv": 0.0}),
    (Rereference(), "rereference", {"ref_channels": "average"}),
    (Rereference(["M1", "M2"]), "rereference", {"ref_channels": ["M1", "M2"]}),
    (HighPass(1), "high_pass", {"l_freq": 1.0}),
    (LowPass(40), "low_pass", {"h_freq": 40.0}),
    (BandPass(1, 40), "band_pass", {"l_freq": 1.0, "h_freq": 40.0}),
    (Notch([50]), "notch", {"freqs": [50.0]}),
    (Resample(100), "resample", {"sfreq": 100.0}),
    (Scale(2), "scale", {"factor": 2.0, "unit": None}),
    (Clip(500), "clip", {"limit": 500.0}),
]


@pytest.mark.parametrize(("step", "name", "kept"), PINNED, ids=[str(step) for step, _, _ in PINNED])
def test_steps_are_values(step: Step, name: str, kept: dict[str, Any]) -> None:
    """A step is frozen, hashable, picklable, and known by a name and settings that are pinned."""
    assert (step.name, step.settings()) == (name, kept)
    assert [type(value) for value in step.settings().values()] == [type(value) for value in kept.values()]
    assert pickle.loads(pickle.dumps(step)) == step
    assert len({step, dataclasses.replace(step)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(step, dataclasses.fields(step)[0].name, None)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (PickChannels, {}),
        (PickChannels, {"names": "E1"}),
        (PickChannels, {"names": ["E1"], "types": ["eeg"]}),
        (PickChannels, {"names": ["E1", "E1"]}),
        (DropFlat, {"threshold_uv": -1}),
        (Rereference, {"ref_channels": []}),
        (Rereference, {"ref_channels": "Cz"}),
        (Rereference, {"ref_channels": ["Cz", "Cz"]}),
        (HighPass, {"l_freq": 0}),
        (HighPass, {"l_freq": float("nan")}),
        (HighPass, {"l_freq": "fast"}),
        (LowPass, {"h_freq": -1}),
        (BandPass, {"l_freq": 40, "h_freq": 1}),
        (Notch, {"freqs": []}),
        (Notch, {"freqs": 50}),
        (Notch, {"freqs": "50"}),
        (Notch, {"freqs": [50, 0]}),
        (Resample, {"sfreq": 0}),
        (Scale, {"factor": 0}),
        (Clip, {"limit": float("inf")}),
    ],
    ids=str,
)
def test_bad_settings_are_refused(kind: type[Step], fields: dict[str, Any]) -> None:
    """A setting that can suit no recording is an InputError when the step is built."""
    with pytest.raises(InputError, match=kind.__name__):
        kind(**fields)


def test_measured() -> None:
    """Gaps may touch, overlap and reach over the ends; what is left is in order."""
    signal = signal_of(20, gaps=(Gap(0, 2), Gap(5, 9), Gap(7, 8), Gap(9, 10), Gap(12, 12), Gap(18, 30)))
    assert list(measured(signal, 0, 20)) == [(2, 5), (10, 12), (12, 18)]
    assert list(measured(signal, 3, 11)) == [(3, 5), (10, 11)]
