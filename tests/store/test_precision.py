"""Narrowing samples, and measuring what it costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError
from engram.store.precision import (
    MIN_SNR_DB,
    STRETCH_SAMPLES,
    ErrorMeter,
    Scaling,
    decode,
    default_precision,
    encode,
    parse_precision,
)

blocks = arrays(np.float64, (50, 3), elements=st.floats(-60000, 60000))
NAMES = ["Fz", "Cz", "Pz"]


@given(blocks)
def test_float32_keeps_float32(x: NDArray[np.float64]) -> None:
    """Bit for bit."""
    assert decode(encode(x, "float32"), "float32").tobytes() == x.astype(np.float32).tobytes()


@given(blocks)
def test_float16_is_the_nearest(x: NDArray[np.float64]) -> None:
    """What is read back is within half a float16 step of float32(x)."""
    single = x.astype(np.float32)
    half_step = np.spacing(np.abs(single).astype(np.float16)).astype(np.float64) / 2
    error = np.abs(decode(encode(x, "float16"), "float16").astype(np.float64) - single)

    assert (error <= half_step).all()


@given(arrays(np.float32, 100, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_bfloat16_is_the_nearest(x: NDArray[np.float32]) -> None:
    """At most half a step of 2^-7 relative; NaN and infinity stay what they are."""
    back = decode(encode(x, "bfloat16"), "bfloat16")
    usual = np.isfinite(x) & (np.abs(x) < 3.38e38) & (np.abs(x) > 1e-37)

    assert (np.abs(back[usual] - x[usual]) <= np.abs(x[usual]) * 2.0**-8).all()
    assert np.array_equal(np.isnan(back), np.isnan(x))
    assert np.array_equal(back[np.isinf(x)], x[np.isinf(x)])


@given(blocks)
def test_int16_is_within_half_a_step_of_the_channels_own_range(x: NDArray[np.float64]) -> None:
    """A channel's range is cut into 65,534 steps, whatever its offset."""
    scaling = Scaling.of_range(x.min(axis=0), x.max(axis=0))
    error = np.abs(encode(x, "int16", scaling) * scaling.scale + scaling.offset - x)

    assert (error <= scaling.scale * (0.5 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "bool"])
def test_integers_are_kept_as_they_come(dtype: str) -> None:
    """Nobody wants frames or labels as floats."""
    x = np.arange(6).reshape(3, 2).astype(dtype)
    spec = ArraySpec(x.shape, dtype, ("time", "channel"))

    assert default_precision("eeg", spec) == "exact"
    assert encode(x, "exact").dtype == x.dtype


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ("float8", "float64", "Unknown precision 'float8'.*Use one of: default, float32"),
        ("exact", "float64", "cannot be stored as exact"),
        ("float16", "uint8", "cannot be stored as float16. Use exact"),
    ],
)
def test_a_precision_that_does_not_fit_is_refused(text: str, dtype: str, message: str) -> None:
    """The message names the precisions that do."""
    with pytest.raises(InputError, match=message):
        parse_precision(text, "eeg", ArraySpec((1, 1), dtype, ("time", "channel")))


def measure(x: NDArray[np.floating], precision: str, *, cuts: int = 1) -> ErrorMeter:
    """Encode, read back and measure, in several blocks."""
    meter = ErrorMeter(x.shape[1])
    for block in np.array_split(x, cuts):
        stored = encode(block, precision)  # type: ignore[arg-type]  # a name of the table
        meter.add(block, decode(stored, precision))  # type: ignore[arg-type]  # the same
    return meter


def test_the_meter_measures_what_numpy_measures() -> None:
    """Mean, standard deviation, range and signal-to-noise ratio, over blocks of any size."""
    x = np.random.default_rng(0).normal([0, 100, -5], [20, 1, 300], (5000, 3))
    single = x.astype(np.float32).astype(np.float64)
    error = single - x.astype(np.float16).astype(np.float64)
    stretches = np.array_split(single, range(STRETCH_SAMPLES, 5000, STRETCH_SAMPLES))
    errors = np.array_split(error, range(STRETCH_SAMPLES, 5000, STRETCH_SAMPLES))
    within, lost = (sum(len(each) * each.var(axis=0) for each in of) for of in (stretches, errors))
    expected = 10 * np.log10(within / lost)

    for cuts in (1, 7, 5000):
        channels = measure(x, "float16", cuts=cuts).channels()
        np.testing.assert_allclose([c.snr_db for c in channels], expected, atol=1e-3)
        np.testing.assert_allclose([c.mean for c in channels], single.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose([c.std for c in channels], single.std(axis=0), rtol=1e-5)
        assert [c.minimum for c in channels] == single.min(axis=0).tolist()
        assert [c.max_error for c in channels] == np.abs(error).max(axis=0).tolist()


def test_a_dc_offset_spoils_float16_and_is_refused_with_channel_and_remedy() -> None:
    """Half a millivolt of offset on 5 microvolts of signal is under the rule."""
    x = np.random.default_rng(0).normal([0, 500, 0], 5, (2000, 3))
    meter = measure(x, "float16")

    assert meter.channels()[1].snr_db < MIN_SNR_DB["float16"] < meter.channels()[0].snr_db
    assert "Channel Cz would keep" in (meter.refusal("float16", NAMES, "uV") or "")
    assert "precision int16" in (meter.refusal("float16", NAMES, "uV") or "")


def test_bfloat16_is_held_to_what_it_can_keep() -> None:
    """55 dB of a signal without an offset are stored, the 20 dB that an offset leaves are not."""
    x = np.random.default_rng(0).normal(0, 20, (2000, 3))

    assert measure(x, "bfloat16").refusal("bfloat16", NAMES, "uV") is None
    assert "the rule is 50 dB" in (measure(x + 1000, "bfloat16").refusal("bfloat16", NAMES, "uV") or "")


@pytest.mark.parametrize("kind", ["drift", "step"])
def test_a_drift_or_a_step_does_not_count_as_signal(kind: str) -> None:
    """20 microvolts of EEG on a BioSemi's drift of 40 mV: its variance would pass any rule."""
    x = np.random.default_rng(0).normal(0, 20, (60_000, 3))
    x[:, 1] += (
        np.linspace(-20_000, 20_000, len(x)) if kind == "drift" else 30_000.0 * (np.arange(len(x)) > 30_000)
    )
    meter = measure(x, "float16")

    assert meter.channels()[1].snr_db < MIN_SNR_DB["float16"] - 10
    assert "Channel Cz would keep" in (meter.refusal("float16", NAMES, "uV") or "")
    assert measure(x, "float32").refusal("float32", NAMES, "uV") is None


def test_a_square_wave_with_odd_levels_has_lost_nothing() -> None:
    """Its levels are a little off, and constant: a trigger is not a reason to refuse."""
    x = np.random.default_rng(0).normal(0, 20, (2000, 3))
    x[:, 1] = np.where(np.arange(len(x)) // 500 % 2, 1234.567, -0.987)

    assert measure(x, "float16").refusal("float16", NAMES, "uV") is None


def test_sums_beyond_float32_are_no_promise() -> None:
    """Where the figures overflow, the channel counts as the worst and not as the best."""
    x = np.random.default_rng(0).normal(0, 1, (2000, 3))
    x[:, 0] *= 1e25

    with np.errstate(over="ignore", invalid="ignore"):
        assert "Channel Fz would keep -inf dB" in (
            measure(x, "bfloat16").refusal("bfloat16", NAMES, "uV") or ""
        )


def test_big_endian_integers_are_stored_as_the_numbers_they_are() -> None:
    """NIfTI and HDF5 files are often big-endian; a store is not."""
    x = np.arange(6, dtype=">i2").reshape(3, 2)

    assert encode(x, "exact").tobytes() == x.astype("<i2").tobytes()


def test_a_flat_channel_loses_nothing() -> None:
    """Cz is the reference of HBN-EEG: all zeros, and not a reason to refuse."""
    x = np.random.default_rng(0).normal(0, 20, (2000, 3))
    x[:, 1] = 0.0
    x[:, 2] = 123.456
    meter = measure(x, "float16")

    assert meter.channels()[1].snr_db == meter.channels()[2].snr_db == np.inf
    assert meter.refusal("float16", NAMES, "uV") is None


def test_an_overflow_is_refused_with_its_peak() -> None:
    """float16 ends at 65504: 70 mV in microvolts do not fit."""
    x = np.random.default_rng(0).normal(0, 20, (2000, 3))
    x[100, 2] = 70_000.0

    assert measure(x, "float16").refusal("float16", NAMES, "uV") == (
        "Channel Pz reaches 70000 uV, float16 holds 65504. High-pass it, or use precision float32."
    )


@pytest.mark.parametrize("cuts", [1, 3])
def test_nan_and_infinity_are_counted_and_not_weighed(cuts: int) -> None:
    """A channel with gaps of NaN keeps the figures of its other samples."""
    x = np.random.default_rng(0).normal(50, 20, (3000, 3))
    clean = measure(x[10:], "float32").channels()[0]
    x[:10, 0] = np.nan
    x[20, 1] = np.inf
    channels = measure(x, "float32", cuts=cuts).channels()

    assert (channels[0].n_nan, channels[1].n_infinite, channels[2].n_nan) == (10, 1, 0)
    assert channels[0].mean == pytest.approx(clean.mean, rel=1e-6)
    assert channels[0].std == pytest.approx(clean.std, rel=1e-6)
    assert "not numbers" in (measure(x, "float32").refusal("int16", NAMES, "uV") or "")


def test_on_high_passed_eeg_the_precisions_rank_as_stated() -> None:
    """float16 about 73 dB, bfloat16 about 55 dB, as the module's table says, on Gaussian data."""
    x = np.random.default_rng(0).normal(0, 20, (20000, 3))

    assert min(c.snr_db for c in measure(x, "float16").channels()) == pytest.approx(73.5, abs=1.5)
    assert min(c.snr_db for c in measure(x, "bfloat16").channels()) == pytest.approx(55.5, abs=1.5)
