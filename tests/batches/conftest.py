"""Stores to read windows from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram.preparation import ingest
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel, Events
from engram.store.reader import Store
from engram.testing.kinds import make_arrays, make_source


@pytest.fixture(scope="session")
def kinds_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of every kind of signal, whose EEGs are stored in four precisions, that no test changes."""
    path = tmp_path_factory.mktemp("stores") / "kinds"
    arrays = dict(make_arrays())
    for name, gain in (("sentence-3", 1.0), ("sentence-4", 7.0), ("sentence-5", 1.0), ("sentence-6", 1.0)):
        arrays[name] = {"eeg": gain * arrays["sentence-0"]["eeg"][: 300 + 10 * len(arrays)] + gain}
    precisions = {
        "sentence-3": "int16",
        "sentence-4": "int16",
        "sentence-5": "float32",
        "sentence-6": "bfloat16",
    }
    by_precision: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, signals in arrays.items():
        by_precision.setdefault(precisions.get(name, "default"), {})[name] = dict(signals)
    with pytest.MonkeyPatch.context() as patch:
        # One prepare is of one precision; converting stores will not be.
        patch.setattr(ingest, "refuse_mixture", lambda *_: None)
        for precision, some in by_precision.items():
            prepare(make_source(some), path, precision={"eeg": precision}, part_bytes="10 MB").store.close()
    return path


@pytest.fixture
def kinds(kinds_path: Path) -> Iterator[Store]:
    """The store of every kind, closed again after the test."""
    with Store(kinds_path) as store:
        yield store


def make_trials(n_subjects: int = 3, n_samples: int = 2000, n_chans: int = 4) -> ArraySource:
    """Describe one recording per subject at 100 Hz: noise, and every second an event of two sorts."""
    rng = np.random.default_rng(7)
    onsets = tuple(float(second) for second in range(1, n_samples // 100 - 1))
    recordings = {}
    for number in range(n_subjects):
        eeg = ArraySignal(
            rng.normal(0, 10, (n_samples, n_chans)),
            100.0,
            channels=tuple(Channel(f"E{channel + 1}") for channel in range(n_chans)),
        )
        sorts = tuple("left" if rng.random() < 0.5 else "right" for _ in onsets)
        times = tuple(f"{rng.uniform(0.3, 0.9):.3f}" for _ in onsets)
        events = Events(onsets, (0.0,) * len(onsets), sorts, {"rt": times})
        recordings[f"sub-{number}"] = ArrayRecording(
            {"eeg": eeg}, events, {"subject": f"S{number}", "age": 8.0 + number}
        )
    return ArraySource(recordings)


@pytest.fixture(scope="session")
def trials_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of trials, that no test changes."""
    path = tmp_path_factory.mktemp("stores") / "trials"
    prepare(make_trials(), path).store.close()
    return path


@pytest.fixture
def trials(trials_path: Path) -> Iterator[Store]:
    """The store of trials, closed again after the test."""
    with Store(trials_path) as store:
        yield store
