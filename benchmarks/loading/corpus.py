"""Corpus: recordings of noise in float16, and the windows that every reader has to deliver.

One file holds all recordings, one after another, as rows of 129 channels: it is what the mapped
readers read, what the other readers' stores are written from, and the truth that every reader's
batches are compared with. Noise is what nothing can guess: a window delivered in the place of
another one differs in all of its samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BATCH_WINDOWS = 64
N_CHANNELS = 129
"""An EGI net with its reference, as in the Healthy Brain Network."""
RATE_HZ = 100.0
WINDOW_SAMPLES = 200
WINDOWS_PER_RECORDING = 400
WINDOW_BYTES = WINDOW_SAMPLES * N_CHANNELS * 2
"""A window as it is stored: 51,600 bytes."""
DELIVERED_BYTES = WINDOW_SAMPLES * N_CHANNELS * 4
"""A window as it is delivered, in float32."""
SIGNAL = "eeg"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Recordings of equal length in one file of float16, microvolt."""

    path: Path
    """File of (sample, channel), recordings one after another."""
    n_recordings: int
    """How many."""

    @property
    def n_windows(self) -> int:
        """Windows that touch and do not overlap."""
        return self.n_recordings * WINDOWS_PER_RECORDING

    @property
    def n_bytes(self) -> int:
        """Bytes of all recordings."""
        return self.n_windows * WINDOW_BYTES

    def samples(self) -> NDArray[np.float16]:
        """Map all recordings: (sample, channel) float16."""
        return np.memmap(self.path, np.float16, "r").reshape(-1, N_CHANNELS)

    def recordings(self) -> Iterator[NDArray[np.float16]]:
        """Give one recording after another, in memory: (sample, channel) float16."""
        n_samples = WINDOWS_PER_RECORDING * WINDOW_SAMPLES
        for number in range(self.n_recordings):
            yield np.array(self.samples()[number * n_samples : (number + 1) * n_samples])

    def windows(self) -> Iterator[NDArray[np.float16]]:
        """Give each recording cut into windows, in memory: (window, channel, time) float16."""
        for recording in self.recordings():
            cut = recording.reshape(WINDOWS_PER_RECORDING, WINDOW_SAMPLES, N_CHANNELS)
            yield np.ascontiguousarray(cut.transpose(0, 2, 1))

    def starts(self, stride_samples: int) -> NDArray[np.int64]:
        """Give the first sample of every window; no window reaches into the next recording."""
        n_samples = WINDOWS_PER_RECORDING * WINDOW_SAMPLES
        within = np.arange(0, n_samples - WINDOW_SAMPLES + 1, stride_samples)
        return (np.arange(self.n_recordings)[:, None] * n_samples + within).ravel()


def write_corpus(corpus: Corpus) -> None:
    """Write noise of 30 microvolt, the same every time."""
    with corpus.path.open("wb") as file:
        for number in range(corpus.n_recordings):
            shape = (WINDOWS_PER_RECORDING * WINDOW_SAMPLES, N_CHANNELS)
            noise = np.random.default_rng(number).standard_normal(shape, np.float32)
            (noise * np.float32(30)).astype(np.float16).tofile(file)
