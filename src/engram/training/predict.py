"""Predictions: what a network says of every window of a side, and the table of it.

This module decides how outputs become rows of a table. One pass serves validation during a
training, the scores at its end, and a network that is evaluated later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.atomic import replacing
from engram.batches.batch import Batch
from engram.batches.loader import Loader
from engram.batches.windows import Windows
from engram.training.learner import Evaluator, evaluating
from engram.training.settings import Precision

__all__ = ["Predictions", "autocast", "predict", "predictions_table", "train_targets", "write_table"]

_MOST_COLUMNS = 64
"""Outputs that get a column each; a window with more gets a row per value."""
_MOST_VALUES = 1 << 21
"""Values of target signals that are kept of a side: 16 MiB with their predictions, and up to ten times
that while they are sorted, scored and described."""
_TRAIN_WINDOWS = 1024
"""Windows from which the mean of a target signal is taken, for its chance level."""

_Part: TypeAlias = tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float32], float]
"""Numbers, targets, predictions, and the sum of the losses."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What was predicted of the windows of one side, sorted by window."""

    numbers: NDArray[np.int64]
    """(row,) numbers of the windows. A target signal of many values has a row per value."""
    target: NDArray[Any]
    """(row, output) float32 for regression, (row,) int64 numbers of classes; (row, 0) where the windows
    have no target."""
    prediction: NDArray[np.float32]
    """(row, output) for regression, (row, class) probabilities."""
    loss: float
    """Mean loss over the windows; NaN without targets."""
    values_per_kept: int
    """1, or how many values of a target signal stand behind each that is kept."""
    classes: tuple[str, ...]
    """Names of the classes; none for regression."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Give the context in which a model computes in this precision, as Lightning's plugin does.

    Parameters
    ----------
    precision
        Lightning's word for it.
    device
        Where the model is.
    """
    if precision == "32-true":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    # Without the cache, as in Lightning: weights that were cast under no_grad would be reused later.
    return torch.autocast(device.type, dtype, cache_enabled=False)


def predict(
    evaluator: Evaluator,
    loader: Loader,
    *,
    device: torch.device,
    precision: Precision = "32-true",
    between: Callable[[], None] | None = None,
) -> Predictions:
    """Predict every window of a loader; with several processes, all of them get all predictions.

    Parameters
    ----------
    evaluator
        The network and its loss.
    loader
        Every window once; each process's own share.
    device
        Where the network is.
    precision
        In what it computes.
    between
        Called after every batch.

    Raises
    ------
    InputError
        If an output does not fit its target.
    """
    n_kept = _values_per_kept(loader.windows.n_target_values)
    parts: list[_Part] = []
    with evaluating(evaluator.network), autocast(precision, device):
        for batch in loader:
            if len(batch):  # a rank may have no window of the last batch
                parts.append(_part(evaluator, batch.to(device), loader.windows, n_kept))
            if between is not None:
                between()
    if loader.world > 1:
        gathered: list[Any] = [None] * loader.world
        torch.distributed.all_gather_object(gathered, parts)
        parts = [part for of_rank in gathered for part in of_rank]
    return _joined(parts, loader.order.n_windows, n_kept, evaluator.classes)


def _joined(
    parts: Sequence[_Part], n_windows: int, n_kept: int, classes: tuple[str, ...] = ()
) -> Predictions:
    if len({part[1].shape[1:] for part in parts}) > 1:
        # Sessions differ in units: then each value is a row of its own.
        parts = [
            (np.repeat(numbers, target.shape[1]), target.reshape(-1, 1), prediction.reshape(-1, 1), loss)
            for numbers, target, prediction, loss in parts
        ]
    numbers, targets, predictions, losses = zip(*parts, strict=True)
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return Predictions(
        np.concatenate(numbers)[order],
        np.concatenate(targets)[order],
        np.concatenate(predictions)[order],
        sum(losses) / n_windows,
        n_kept,
        classes,
    )


def _values_per_kept(n_values: int) -> int:
    """Say of how many values of target signals one is kept, so that a side stays within bounds."""
    return max(1, -(-n_values // _MOST_VALUES))


def _part(evaluator: Evaluator, batch: Batch, windows: Windows, n_kept: int) -> _Part:
    if batch.y is None:
        output = evaluator.output(batch, windows).float()
        values = (output.softmax(1) if evaluator.classes else output.flatten(1)).cpu().numpy()
        return batch.numbers.cpu().numpy(), np.empty((len(batch), 0), np.float32), values, math.nan
    output, losses = evaluator(batch, windows)
    loss = float(losses.double().sum())
    numbers = batch.numbers.cpu().numpy()
    if evaluator.classes:
        return numbers, batch.y.cpu().numpy(), output.float().softmax(1).cpu().numpy(), loss
    if evaluator.signal is None:
        return numbers, batch.y.cpu().numpy(), output.float().cpu().numpy(), loss
    rows, target = _kept_rows(batch, evaluator.signal, batch.y, n_kept)
    _, prediction = _kept_rows(batch, evaluator.signal, output.float(), n_kept)
    return numbers[rows], target, prediction, loss


def _kept_rows(
    batch: Batch, signal: str, values: Tensor, n_kept: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lay a target signal, or what was predicted of it, out as rows, and keep the same rows of both."""
    rows, kept = _sample_rows(values, batch.lengths[signal], batch.y_time_axis)
    chosen = _one_of_each(n_kept, len(rows), seed=int(batch.numbers[0]))
    return rows[chosen], kept[chosen]


def _one_of_each(n_kept: int, n_rows: int, seed: int) -> NDArray[np.int64]:
    """Choose one of every so many rows, each time at another place.

    At the same place every time, of 128 units and one value in 128 it would always be the first unit.
    """
    starts = np.arange(0, n_rows, n_kept)
    places = np.random.default_rng(seed).integers(np.minimum(n_kept, n_rows - starts))
    return np.asarray(starts + places)


def _sample_rows(
    values: Tensor, lengths: Tensor, time_axis: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lay a signal out as one row per measured sample and one column per unit.

    Returns
    -------
    tuple of ndarray
        (row,) the window of each row, counted in the batch; (row, unit) float32.
    """
    time_first = values.movedim(time_axis, 1).flatten(2) if values.ndim > 2 else values[..., None]
    places = torch.arange(time_first.shape[1], device=values.device)
    window, sample = torch.nonzero(places < lengths[:, None], as_tuple=True)
    rows, kept = window, time_first[window, sample].float()
    if kept.shape[1] > _MOST_COLUMNS:
        rows, kept = rows.repeat_interleave(kept.shape[1]), kept.reshape(-1, 1)
    return rows.cpu().numpy(), kept.cpu().numpy()


def train_targets(windows: Windows) -> NDArray[Any]:
    """Collect the training targets, which chance levels are computed from.

    Parameters
    ----------
    windows
        The training side. Of a target that is a signal, a thousand windows from the first to the last
        are taken, not all.

    Returns
    -------
    ndarray
        (row, output) float32, or (row,) int64 numbers of classes.
    """
    if windows.target_signal is None:
        targets = windows.index.targets(np.arange(len(windows)))
        assert targets is not None
        return targets if windows.classes else targets.reshape(-1, 1)
    step = -(-len(windows) // _TRAIN_WINDOWS)
    n_kept = _values_per_kept(windows.n_target_values // step)
    parts: list[_Part] = []
    # One at a time: no batch was planned for yet.
    for number in range(0, len(windows), step):
        batch = windows.read([number])
        assert batch.y is not None
        rows, target = _kept_rows(batch, windows.target_signal, batch.y, n_kept)
        parts.append((batch.numbers.numpy()[rows], target, target, 0.0))
    return _joined(parts, len(windows), 1).target


def predictions_table(windows: Windows, side: str, predictions: Predictions) -> pa.Table:
    """Describe predictions as ``engram.ledger.PREDICTIONS`` does, one row each.

    Parameters
    ----------
    windows
        The side.
    side
        Its name.
    predictions
        Of its windows.
    """
    # A window with a row per value may have a million rows: describe it once.
    numbers, place = np.unique(predictions.numbers, return_inverse=True)
    described = windows.table(numbers).select(["recording", "anchor_s"]).take(place)
    subjects = windows.index.subjects()
    names = pa.array(subjects.values, pa.string())
    columns: dict[str, Any] = {
        "side": pa.array([side] * len(predictions.numbers)).dictionary_encode(),
        "window": predictions.numbers,
        "recording": described["recording"],
        "subject": names.take(pa.array(subjects.codes[predictions.numbers])),
        "anchor_s": described["anchor_s"],
    }
    target, prediction = predictions.target, predictions.prediction
    if classes := predictions.classes:
        words = np.asarray(classes, dtype=object)
        if target.ndim == 1:
            columns["target"] = pa.array(words[target], pa.string())
        columns["prediction"] = pa.array(words[prediction.argmax(1)], pa.string())
        columns |= {f"p_{name}": prediction[:, number] for number, name in enumerate(classes)}
        return pa.table(columns)
    for number in range(prediction.shape[1]):
        suffix = f"_{number}" if number else ""
        if target.shape[1]:
            columns[f"target{suffix}"] = target[:, number]
        columns[f"prediction{suffix}"] = prediction[:, number]
    return pa.table(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all.

    Parameters
    ----------
    path
        The file; its folder exists.
    table
        What is in it.
    """
    with replacing(path) as file:
        pq.write_table(table, file, write_page_checksum=True)
