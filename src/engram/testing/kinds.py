"""Recordings of every kind, small, from arrays: what stores and windows have to serve alike.

Frames at 240 Hz beside spike counts at 120 Hz with another number of units per session,
EEG of two channel counts and rates, sentences of differing lengths, volumes of 9 MB, and a
bank of images that a signal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel, Events

__all__ = ["Arrays", "make_arrays", "make_bank", "make_source"]

Arrays = Mapping[str, Mapping[str, NDArray[Any]]]
"""Recording -> signal -> (time, ...) samples."""

_RATES_HZ = {"stim": 240.0, "robs": 120.0, "betas": 1.0, "image": 1.0, "eeg": 100.0}


def make_arrays(seed: int = 0) -> Arrays:
    """Draw the samples of eight recordings, 14 MB in all.

    Returns
    -------
    Mapping
        ``session-0`` and ``-1``: stim (480, 9, 9) uint8 and robs (240, 20 or 21) int16;
        ``eeg-129`` (3000, 129) and ``eeg-6`` (2500, 6) float64 with a stim channel;
        ``sentence-0`` to ``-2``: 700, 1 and 2197 samples of 8 channels;
        ``volumes``: betas (3, 150, 150, 100) int16, and image (3,) int32 into the bank.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    for i in range(2):
        arrays[f"session-{i}"] = {
            "stim": rng.integers(0, 256, (480, 9, 9), dtype=np.uint8),
            "robs": rng.integers(0, 5, (240, 20 + i), dtype=np.int16),
        }
    arrays["eeg-129"] = {"eeg": rng.normal(0, 20, (3000, 129))}
    arrays["eeg-6"] = {
        "eeg": rng.normal(0, 20, (2500, 6)),
        "stim": rng.integers(0, 2, (2500, 1), dtype=np.uint8),
    }
    for i, n_samples in enumerate((700, 1, 2197)):
        arrays[f"sentence-{i}"] = {"eeg": rng.normal(0, 5, (n_samples, 8))}
    arrays["volumes"] = {
        "betas": rng.integers(-300, 300, (3, 150, 150, 100), dtype=np.int16),
        "image": rng.integers(0, 5, 3, dtype=np.int32),
    }
    return arrays


def make_bank(seed: int = 0) -> NDArray[np.uint8]:
    """Draw the bank of images: (5, 32, 32, 3) uint8."""
    return np.random.default_rng((seed, 1)).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def make_source(arrays: Arrays, seed: int = 0) -> ArraySource:
    """Describe arrays as recordings with fields, two events each, and the bank ``images``."""
    recordings = {key: _recording(key, signals) for key, signals in arrays.items()}
    return ArraySource(recordings, {"images": make_bank(seed)})


def _recording(key: str, signals: Mapping[str, NDArray[Any]]) -> ArrayRecording:
    described = {
        name: ArraySignal(
            x,
            250.0 if key == "eeg-6" else _RATES_HZ[name],
            channels=tuple(Channel(f"E{c + 1}") for c in range(x.shape[1])) if name == "eeg" else (),
            bank="images" if name == "image" else None,
        )
        for name, x in signals.items()
    }
    events = Events((0.5, 1.0), (0.0, 0.1), ("left_target", "rest"), {"feedback": ("smiley_face", None)})
    return ArrayRecording(described, events, {"subject": key, "age": 9.5})
