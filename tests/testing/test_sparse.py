"""Stores of holes: real in everything but the room that they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import engram
from engram.store.verify import verify
from engram.testing.sparse import SparseCorpus, write_sparse
from engram.windows.spec import EventWindows, FixedWindows


@pytest.mark.parametrize(
    ("precision", "sample_shape"),
    [
        ("float16", (129,)),
        ("int16", (129,)),
        ("bfloat16", (7,)),
        ("exact", (150, 150, 100)),
        ("exact", (129,)),
    ],
)
def test_a_store_of_holes_is_sound(tmp_path: Path, precision: str, sample_shape: tuple[int, ...]) -> None:
    """Every checksum is that of its zeros, over parts, precisions and shapes."""
    corpus = SparseCorpus(
        n_recordings=2,
        n_samples=300_000_000 // (2 * int(np.prod(sample_shape))),
        sample_shape=sample_shape,
        precision=precision,  # type: ignore[arg-type]  # parametrized
    )
    write_sparse(tmp_path / "store", corpus)

    assert verify(tmp_path / "store").is_sound
    with engram.open(tmp_path / "store") as store:
        assert len(store.table("parts")) == 2
        assert store.extent("00001", "eeg").n_samples == corpus.n_samples
        assert not store.read("00001", "eeg", corpus.n_samples - 2).any()


def test_a_hundred_gigabytes_take_no_room(tmp_path: Path) -> None:
    """Two million windows and a million trials in 20 MB of tables."""
    write_sparse(tmp_path / "store", SparseCorpus())
    files = [path.stat() for path in (tmp_path / "store").rglob("*") if path.is_file()]

    assert sum(each.st_size for each in files) > 100e9
    assert sum(512 * each.st_blocks for each in files) < 30e6
    with engram.open(tmp_path / "store") as store:
        assert len(store.windows(FixedWindows(signal="eeg", window_size_s=2.0))) == 2000 * 970
        trials = EventWindows(signal="eeg", anchor=("square", "circle"), trial_duration_s=2.0)
        assert len(store.windows(trials)) == 1_000_000
