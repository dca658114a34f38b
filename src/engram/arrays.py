"""ArraySpec: shape, dtype and axis names of an array, without its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["ArraySpec"]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """What an array looks like, so that sizes are known before any memory is taken.

    Raises
    ------
    ValueError
        If the dtype is unknown or not of numbers, a length is negative, or axes and shape
        differ in number.

    Examples
    --------
    >>> spec = ArraySpec((1000, 129), "float32", ("time", "channel"))
    >>> spec.n_samples, spec.sample_shape, spec.sample_bytes, spec.n_bytes
    (1000, (129,), 516, 516000)
    """

    shape: tuple[int, ...]
    """Length of every axis; the first is time (or trial, or frame)."""
    dtype: str
    """NumPy's name of the element type, such as ``"float32"``."""
    axes: tuple[str, ...]
    """One name per axis, such as ``("time", "channel")``."""

    def __post_init__(self) -> None:
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            raise ValueError(f"Unknown dtype {self.dtype!r}. Use a NumPy name such as 'float32'.") from None
        if dtype.kind not in "biufc":
            raise ValueError(
                f"Elements of {dtype.name} are no numbers. Use booleans, integers, floats or complex numbers."
            )
        object.__setattr__(self, "dtype", dtype.name)
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"A shape needs at least one axis and no negative length, not {self.shape}.")
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{len(self.shape)} axes {self.shape} need as many names, not {self.axes}.")

    @property
    def n_samples(self) -> int:
        """Length of the first axis."""
        return self.shape[0]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: every axis but the first."""
        return self.shape[1:]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.sample_shape) * np.dtype(self.dtype).itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.n_samples * self.sample_bytes
