"""Every window is predicted once, whatever its target."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import engram
from engram.batches.windows import Windows
from engram.store.reader import Store
from engram.training.data import evaluation_loader
from engram.training.learner import Evaluator
from engram.training.predict import (
    _one_of_each,
    _sample_rows,
    autocast,
    predict,
    predictions_table,
    train_targets,
    write_table,
)
from engram.training.settings import FitSettings
from engram.windows.spec import FixedWindows, Span
from engram.windows.targets import RecordingColumn, SignalTarget

program = runpy.run_path(str(Path(__file__).with_name("program.py")))
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store of 8 recordings."""
    opened = program["make_store"](tmp_path / "store")
    yield opened
    opened.close()


class Amplitude(nn.Module):
    """Gives each output a multiple of the window's amplitude."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.arange(1.0, n_outputs + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (window, channel, time) to (window, output)."""
        gain: Tensor = self.get_buffer("gain")
        return x.std((1, 2))[:, None] * gain


def test_predictions_are_sorted_and_their_loss_is_the_mean(store: Store) -> None:
    """Over all windows, the short last batch among them."""
    windows = store.windows(program["SPEC"], RecordingColumn("age"))
    settings = FitSettings(batch_size=7)
    found = predict(Evaluator(Amplitude(1), settings), evaluation_loader(windows, settings), device=CPU)
    batch = windows.read(np.arange(len(windows)))
    assert batch.y is not None
    assert isinstance(batch.X, Tensor)
    expected = Amplitude(1)(batch.X)
    assert found.numbers.tolist() == list(range(80))
    np.testing.assert_allclose(found.prediction, expected, rtol=1e-5)
    np.testing.assert_allclose(found.loss, float(((expected - batch.y) ** 2).mean()), rtol=1e-5)


@pytest.mark.parametrize("classes", [(), ("old", "young")])
def test_windows_without_target_are_predicted(store: Store, classes: tuple[str, ...]) -> None:
    """Their table has predictions and no target."""
    windows = store.windows(program["SPEC"])
    settings = FitSettings(batch_size=7)
    evaluator = Evaluator(Amplitude(len(classes) or 1), settings, classes=classes)
    found = predict(evaluator, evaluation_loader(windows, settings), device=CPU)
    table = predictions_table(windows, "other", found)
    described = {"side", "window", "recording", "subject", "anchor_s"}
    assert set(table.column_names) == described | {"prediction"} | {f"p_{name}" for name in classes}
    assert table.num_rows == 80
    assert np.isnan(found.loss)


def test_in_groups_every_window_is_predicted_once(store: Store) -> None:
    """Where training batches hold one group each, evaluation does too."""
    windows = store.windows(program["SPEC"], RecordingColumn("age"))
    settings = FitSettings(batch_size=7, mode="groups", by="recording")
    found = predict(Evaluator(Amplitude(1), settings), evaluation_loader(windows, settings), device=CPU)
    assert found.numbers.tolist() == list(range(80))


def test_training_targets_are_all_that_there_are(store: Store) -> None:
    """In the shape of the predictions' target."""
    ages = store.windows(program["SPEC"], RecordingColumn("age"))
    np.testing.assert_array_equal(train_targets(ages), np.repeat(np.arange(5.0, 13), 10)[:, None])
    groups = store.windows(program["SPEC"], RecordingColumn("group", "classification"))
    np.testing.assert_array_equal(train_targets(groups), np.repeat([1, 0] * 4, 10))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3))
def test_a_signal_becomes_a_row_per_measured_sample(lengths: list[int], n_units: int) -> None:
    """As loops over windows and samples lay it out; the zeros behind a window are no rows."""
    longest = max(lengths)
    values = torch.arange(float(len(lengths) * longest * n_units * 7)).reshape(
        len(lengths), longest, n_units, 7
    )
    rows, kept = _sample_rows(values, torch.tensor(lengths), 1)
    expected = [
        (window, values[window, sample].flatten().tolist())
        for window, length in enumerate(lengths)
        for sample in range(length)
    ]
    assert list(zip(rows.tolist(), kept.tolist(), strict=True)) == expected


def test_a_signal_of_many_units_becomes_a_row_per_value() -> None:
    """A table of thousands of columns helps nobody."""
    values = torch.arange(2.0 * 1 * 100).reshape(2, 1, 10, 10)
    rows, kept = _sample_rows(values, torch.tensor([1, 1]), 1)
    assert kept[:, 0].tolist() == list(range(200))
    assert rows.tolist() == [value // 100 for value in range(200)]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_of_values_too_many_one_of_each_few_is_kept(n_kept: int, n_rows: int, seed: int) -> None:
    """As many as every n-th would be, one in each stretch, the same ones for the same windows."""
    chosen = _one_of_each(n_kept, n_rows, seed)
    assert (chosen // n_kept).tolist() == list(range(-(-n_rows // n_kept)))
    assert chosen[-1] < n_rows
    assert chosen.tolist() == _one_of_each(n_kept, n_rows, seed).tolist()


def spikes(path: Path, n_samples: tuple[int, ...], n_units: int) -> Windows:
    """Whole recordings of stimulus beside spikes whose count is their unit's number."""
    recordings = {}
    for number, n in enumerate(n_samples):
        counts = np.tile(np.arange(n_units, dtype=np.int16), (n, 1))
        stim = engram.ArraySignal(np.zeros((n, 1), np.float32), 100.0)
        recordings[f"r{number}"] = engram.ArrayRecording(
            {"stim": stim, "robs": engram.ArraySignal(counts, 100.0)}
        )
    opened = engram.prepare(engram.ArraySource(recordings), path).store
    spec = FixedWindows(signal="stim", beside=(Span(signal="robs"),))
    return opened.windows(spec, SignalTarget("robs"))


class Silent(nn.Module):
    """Predicts that no unit fires."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (window, 1, time) to (window, 128, time)."""
        return torch.zeros(len(x), 128, x.shape[2])


def test_values_that_are_kept_are_of_all_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 128 values of 128 units is not always the first unit's, and no window is taken for typical."""
    monkeypatch.setattr("engram.training.predict._MOST_VALUES", 1000)
    windows = spikes(tmp_path / "store", (1, 500, 499), 128)
    assert windows.n_target_values == 1000 * 128
    settings = FitSettings(batch_size=3)
    evaluator = Evaluator(Silent(), settings, windows.index.target)
    found = predict(evaluator, evaluation_loader(windows, settings), device=CPU)
    assert found.values_per_kept == 128
    assert len(found.target) == 1000
    assert len(np.unique(found.target)) > 120
    assert len(np.unique(train_targets(windows))) > 120
    windows.store.close()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_models_compute_in_the_precision_asked_for(precision: Any, dtype: torch.dtype) -> None:
    """As Lightning's plugins let them."""
    with autocast(precision, CPU), torch.no_grad():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype


def test_a_table_is_written_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    """Nothing temporary is left beside it."""
    table = store.windows(program["SPEC"]).table()
    (tmp_path / "folder").mkdir()
    write_table(tmp_path / "folder" / "predictions.parquet", table)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["predictions.parquet"]
