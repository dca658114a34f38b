from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.units import parse_bytes, seconds_to_samples, times_to_samples

times = st.floats(-1e5, 1e5) | st.integers(-(10**6), 10**6).map(lambda n: n / 1000)
rates = st.sampled_from([1.0, 100.0, 120.0, 240.0, 250.0, 256.0, 500.0, 512.0, 1000.0, 44100.0])


@given(st.lists(st.tuples(times, rates)))
def test_times_become_samples_as_each_of_them_does(pairs: list[tuple[float, float]]) -> None:
    """Many times at once follow the same rounding rule as one, whatever the rates."""
    times_s, rate_hz = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    found = times_to_samples(times_s, rate_hz)
    assert found.dtype == np.int64
    assert found.tolist() == [seconds_to_samples(*pair) for pair in pairs]


@given(st.integers(-(10**7), 10**7), rates)
def test_a_sample_number_survives_its_time(sample: int, rate_hz: float) -> None:
    """A sample's own time is that sample again, at every usual rate."""
    assert seconds_to_samples(sample / rate_hz, rate_hz) == sample


@given(st.integers(-(10**5), 10**5))
def test_ties_go_up(n: int) -> None:
    """A time half-way between two samples belongs to the later one, on either side of zero."""
    assert seconds_to_samples((n + 0.5) / 100, 100.0) == n + 1


@pytest.mark.parametrize("time_s", [np.nan, np.inf, -np.inf])
def test_what_is_no_time_is_refused(time_s: float) -> None:
    """Only finite times have a sample."""
    with pytest.raises(ValueError, match="finite"):
        seconds_to_samples(time_s, 100.0)
    with pytest.raises(ValueError, match="finite"):
        times_to_samples(np.array([1.0, time_s]), 100.0)


def test_a_time_that_no_sample_number_holds_is_beyond_all() -> None:
    """And on its own side of zero, also where another is added to it."""
    samples = times_to_samples(np.array([-1e300, 1.0, 1e300]), 100.0)
    assert samples.tolist() == [-(2**60), 100, 2**60]
    assert (samples + samples).tolist() == [-(2**61), 200, 2**61]


@pytest.mark.parametrize("size", ["0", "0.5", "9" * 400, "8388608 TiB", 2**63])
def test_a_size_is_a_number_of_bytes(size: str | int) -> None:
    """At least one, and no more than a file could have."""
    with pytest.raises(ValueError, match="must be above zero, below 8 EiB"):
        parse_bytes(size)
