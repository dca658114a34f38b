"""Small recordings in every format, and the measured ones where they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import edfio
import numpy as np
import pytest

MEASURED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def measured() -> Path:
    """The folder of measured recordings that is not part of the project."""
    if not MEASURED.is_dir():
        pytest.skip("needs measured recordings in ../shared/data beside the repository")
    return MEASURED


@pytest.fixture(scope="session")
def write_bdf() -> Callable[..., Path]:
    """A function that writes a BDF of noise in microvolts at 100 Hz."""

    def write(path: Path, *, n_channels: int = 4, n_seconds: int = 5, seed: int = 0) -> Path:
        samples = np.random.default_rng(seed).normal(0, 20, (n_channels, n_seconds * 100))
        signals = [
            edfio.BdfSignal(row, 100, label=f"E{i}", physical_dimension="uV", physical_range=(-500, 500))
            for i, row in enumerate(samples, 1)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        edfio.Bdf(signals).write(path)
        return path

    return write
