"""Bytes, seconds, hertz and samples: parse, print, convert.

This module decides the one rounding rule from seconds to samples and how sizes are read
and shown. Sizes are integers of bytes everywhere inside; people see KiB, MiB and GiB.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

__all__ = ["format_bytes", "format_duration", "parse_bytes", "seconds_to_samples", "times_to_samples"]

# 0.035 * 100 is 3.5000000000000004 and 0.145 * 100 is 14.499999999999998: the nudge, a billionth of
# a sample, makes decimal ties ties again.
_TIE_UP = 0.5 + 1e-9

_FARTHEST_SAMPLE = 2.0**60
"""Beyond any recording, and two of them are a number that still fits."""

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**k for k, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**k for k, p in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Read a size such as ``"2 GB"`` (powers of 1000) or ``"500 MiB"`` (powers of 1024).

    Parameters
    ----------
    size
        A whole number of bytes, or text of a number and an optional unit
        B, KB, MB, GB, TB, KiB, MiB, GiB, TiB in any case.

    Returns
    -------
    int
        The size in bytes, rounded down.

    Raises
    ------
    ValueError
        If the text is not a size, or the size is not positive.

    Examples
    --------
    >>> parse_bytes("2 GB"), parse_bytes("1.5MiB"), parse_bytes(4096)
    (2000000000, 1572864, 4096)
    """
    match = _SIZE.fullmatch(str(size))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{size!r} is not a size. Write a number with a unit, such as '2 GB'.")
    n_bytes = float(match[1]) * factor
    if not 1 <= n_bytes < 2**63:
        raise ValueError(f"A size must be above zero, below 8 EiB, not {size!r}. Write for example '2 GB'.")
    return int(n_bytes)


def format_bytes(n_bytes: int) -> str:
    """Show a size with three figures or so.

    Examples
    --------
    >>> format_bytes(0), format_bytes(1536), format_bytes(734003200), format_bytes(-1048576)
    ('0 B', '1.5 KiB', '700 MiB', '-1.0 MiB')
    """
    value, unit = float(abs(n_bytes)), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 100 else 1
    return f"{'-' if n_bytes < 0 else ''}{value:.{digits}f} {unit}"


def format_duration(duration_s: float) -> str:
    """Show a duration as people say it.

    Examples
    --------
    >>> format_duration(0.25), format_duration(75), format_duration(7384)
    ('0.2 s', '1 min 15 s', '2 h 3 min')
    """
    if duration_s < 60:
        return f"{duration_s:.1f} s" if duration_s < 10 else f"{duration_s:.0f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def seconds_to_samples(time_s: float, rate_hz: float) -> int:
    """Convert a time to a sample number: the one rounding rule of Engram.

    A time is taken to the nearest sample; a tie goes up. Going up at ties makes the rule
    the same for every offset, where rounding to even (``round``, ``numpy.round``) would
    let windows half a sample apart alternate in length.

    Parameters
    ----------
    time_s
        Time in seconds.
    rate_hz
        Sampling rate in hertz.

    Raises
    ------
    ValueError
        If the time is not finite.

    Examples
    --------
    >>> seconds_to_samples(0.5, 100.0), seconds_to_samples(0.025, 100.0), seconds_to_samples(0.035, 100.0)
    (50, 3, 4)
    """
    if not math.isfinite(time_s):
        raise ValueError(f"A time must be a finite number of seconds, not {time_s}.")
    return math.floor(time_s * rate_hz + _TIE_UP)


def times_to_samples(times_s: NDArray[np.float64], rate_hz: float | NDArray[np.float64]) -> NDArray[np.int64]:
    """Convert times to sample numbers by the rule of `seconds_to_samples`, element by element.

    Parameters
    ----------
    times_s
        Times in seconds.
    rate_hz
        Sampling rate in hertz, one for all or one for each.

    Returns
    -------
    ndarray
        int64, of the shape that both broadcast to; 2**60 where it is farther than that.

    Raises
    ------
    ValueError
        If a time is not finite.

    Examples
    --------
    >>> times_to_samples(np.array([0.5, 0.025, 0.035]), 100.0)
    array([50,  3,  4])
    """
    if not np.isfinite(times_s).all():
        raise ValueError("A time must be a finite number of seconds, and one is not.")
    samples = np.floor(times_s * rate_hz + _TIE_UP)
    return np.clip(samples, -_FARTHEST_SAMPLE, _FARTHEST_SAMPLE).astype(np.int64)
