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

from engram.store.reader import Store
from engram.training.data import evaluation_loader
from engram.training.learner import Evaluator
from engram.training.predict import (
    _sample_rows,
    autocast,
    predict,
    predictions_table,
    train_targets,
    write_table,
)
from engram.training.settings import FitSettings
from engram.windows.targets import RecordingColumn

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
    np.testing.assert_array_equal(
        train_targets(ages, ages.order(8)), np.repeat(np.arange(5.0, 13), 10)[:, None]
    )
    groups = store.windows(program["SPEC"], RecordingColumn("group", "classification"))
    np.testing.assert_array_equal(train_targets(groups, groups.order(8)), np.repeat([1, 0] * 4, 10))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4))
def test_a_signal_becomes_a_row_per_measured_sample(lengths: list[int], n_units: int, n_kept: int) -> None:
    """As loops over windows and samples lay it out; the zeros behind a window are no rows."""
    longest = max(lengths)
    values = torch.arange(float(len(lengths) * longest * n_units * 7)).reshape(
        len(lengths), longest, n_units, 7
    )
    rows, kept = _sample_rows(values, torch.tensor(lengths), 1, n_kept)
    expected = [
        (window, values[window, sample].flatten().tolist())
        for window, length in enumerate(lengths)
        for sample in range(length)
    ][::n_kept]
    assert list(zip(rows.tolist(), kept.tolist(), strict=True)) == expected


def test_a_signal_of_many_units_becomes_a_row_per_value() -> None:
    """A table of thousands of columns helps nobody."""
    values = torch.arange(2.0 * 1 * 100).reshape(2, 1, 10, 10)
    rows, kept = _sample_rows(values, torch.tensor([1, 1]), 1, 3)
    assert kept[:, 0].tolist() == list(range(200))[::3]
    assert rows.tolist() == [value // 100 for value in range(200)][::3]


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
