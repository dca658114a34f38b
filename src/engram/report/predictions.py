"""What a training predicted: read, added up per subject, and how far its score can be trusted.

This module decides what a subject's score is and how the interval of a score comes about.
Everything is computed from sums per subject, so that an interval costs the same for ten million
windows as for a thousand. What is drawn and in which words is left to ``figures`` and ``tables``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engram.errors import InputError
from engram.ledger import PREDICTIONS, Ledger

__all__ = [
    "FEWEST_SUBJECTS",
    "Predictions",
    "SubjectScores",
    "count_confusions",
    "interval",
    "pooled_score",
    "read_predictions",
    "score_subjects",
    "weighted_interval",
]

FEWEST_SUBJECTS = 10
"""Resampling fewer subjects gives intervals that are much too narrow."""

_N_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # bounds memory with tens of thousands of subjects


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What was predicted on one side of the split, beside what was true."""

    side: str
    """``"test"``, or ``"valid"`` where there is no test side."""
    windows: NDArray[np.int64]
    """(row,) numbers of the windows. A window has several rows where the target is a signal."""
    subject: NDArray[np.int64]
    """(row,) number of each row's subject in ``subjects``."""
    subjects: tuple[str, ...]
    """Names of the subjects, sorted."""
    target: NDArray[Any]
    """(row, output) float64 for regression, (row,) int64 class numbers for classification."""
    prediction: NDArray[Any]
    """As ``target``."""
    n_classes: int
    """Number of classes; 0 for regression."""

    @property
    def unit(self) -> str:
        """What a row is: one of the ``"windows"``, or one of the ``"values"`` of a target signal."""
        return "windows" if len(np.unique(self.windows)) == len(self.windows) else "values"

    def signature(self) -> str:
        """Give a text that two trainings share if they were scored on the same windows and targets."""
        order = np.argsort(self.windows, kind="stable")
        digest = hashlib.sha256(self.windows[order].tobytes())
        # float32 is what targets are stored in; classes fit as well.
        digest.update(self.target[order].astype(np.float32).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class SubjectScores:
    """The score of each subject, in one unit for all, beside that of chance.

    Regression: the RMSE over the subject's windows, divided by the standard deviation of the
    target over *all* windows (squares are averaged over outputs first). A subject's own standard
    deviation would make subjects incomparable, and is zero where the target is one number per
    subject. Chance is the best constant, the mean target of all these windows: on them it is never
    weaker than the mean of the training windows.

    Classification: the share of windows recognised, averaged over the classes that the subject
    has. Chance is to guess among all classes.
    """

    metric: str
    """``"nrmse"`` or ``"balanced_accuracy"``."""
    higher_is_better: bool
    """Which way is up."""
    subjects: tuple[str, ...]
    """Names."""
    n_rows: NDArray[np.int64]
    """(subject,) windows of each, or values of a target signal."""
    unit: str
    """``"windows"`` or ``"values"``."""
    value: NDArray[np.float64]
    """(subject,) the score."""
    chance: NDArray[np.float64]
    """(subject,) the score of chance."""

    @property
    def n_better(self) -> int:
        """Subjects with a score better than chance."""
        better = self.value > self.chance if self.higher_is_better else self.value < self.chance
        return int(np.count_nonzero(better))

    def best_first(self) -> NDArray[np.int64]:
        """Give the subjects' numbers, best score first, undefined scores last."""
        return np.argsort(-self.value if self.higher_is_better else self.value, kind="stable")


def read_predictions(folder: Path, ledger: Ledger) -> Predictions | None:
    """Read the predictions of a training: of its test side, or else of its validation side.

    Parameters
    ----------
    folder
        The training's folder.
    ledger
        Its ledger, which names the classes.

    Returns
    -------
    Predictions or None
        None if the training left no predictions.

    Raises
    ------
    InputError
        If the table is damaged, or lacks a column.
    """
    path = folder / PREDICTIONS
    if not path.exists():
        return None
    table = _read_table(path)
    sides = set(pc.unique(table["side"]).to_pylist())
    side = next((side for side in ("test", "valid") if side in sides), None)
    if side is None:
        return None
    table = table.filter(pc.equal(table["side"], side))
    subject, subjects = _coded(table["subject"])
    try:
        target, prediction = (_values(table, name, ledger) for name in ("target", "prediction"))
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path} does not suit its ledger: {error}. Restore it, or train again.") from error
    if target.shape != prediction.shape:
        raise InputError(
            f"{path} has targets of shape {target.shape}, predictions of shape {prediction.shape}. "
            "Restore it, or train again."
        )
    windows = table["window"].to_numpy().astype(np.int64)
    return Predictions(side, windows, subject, subjects, target, prediction, len(ledger.classes))


def score_subjects(predictions: Predictions) -> SubjectScores:
    """Score each subject in one unit for all.

    Parameters
    ----------
    predictions
        What was predicted and what was true.
    """
    sums = _sums(predictions)
    n_rows = np.bincount(predictions.subject, minlength=len(predictions.subjects))
    with np.errstate(invalid="ignore", divide="ignore"):
        if predictions.n_classes:
            value = _balanced_accuracy(sums)
            chance = np.full(len(value), 1 / predictions.n_classes)
        else:
            pooled = _variance(sums.sum(axis=0)).mean()
            n = sums[:, _N]
            value, chance = (np.sqrt(_mean(sums[:, k] / n) / pooled) for k in (_ERROR2, _TRUE2))
    metric = "balanced_accuracy" if predictions.n_classes else "nrmse"
    names, unit = predictions.subjects, predictions.unit
    return SubjectScores(metric, predictions.n_classes > 0, names, n_rows, unit, value, chance)


def pooled_score(predictions: Predictions, metric: str) -> float | None:
    """Compute a score over all windows anew, to compare with the ledger's.

    Parameters
    ----------
    predictions
        What was predicted and what was true.
    metric
        Name of the score.

    Returns
    -------
    float or None
        None for a metric that is no function of sums.
    """
    if metric not in _POOLED:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(_POOLED[metric](_sums(predictions).sum(axis=0)))


def interval(predictions: Predictions, metric: str) -> tuple[float, float] | None:
    """Give the 95 % interval of a score over subjects.

    Subjects are drawn anew 2,000 times, whole, since windows of one person are alike: drawing
    windows would promise far more than is known about the next person. The draws have a fixed
    seed, so that a page is the same each time.

    Parameters
    ----------
    predictions
        What was predicted and what was true.
    metric
        Name of the score.

    Returns
    -------
    (float, float) or None
        None with fewer than 10 subjects, for a metric that is no function of sums, and where the
        score is not defined for every draw.
    """
    return weighted_interval([(1.0, predictions)], metric)


def weighted_interval(parts: Sequence[tuple[float, Predictions]], metric: str) -> tuple[float, float] | None:
    """Give the 95 % interval of a weighted sum of scores over subjects.

    Parameters
    ----------
    parts
        Weights, and what was predicted. A subject of several parts is drawn for all of them at once.
    metric
        Name of the score.

    Returns
    -------
    (float, float) or None
        As for ``interval``; None if any part would have none.
    """
    if metric not in _POOLED or min(len(part.subjects) for _, part in parts) < FEWEST_SUBJECTS:
        return None
    subjects = sorted({subject for _, part in parts for subject in part.subjects})
    place = {subject: i for i, subject in enumerate(subjects)}
    rows = [[place[subject] for subject in part.subjects] for _, part in parts]
    sums, random = [_sums(part) for _, part in parts], np.random.default_rng(0)
    equal = np.full(len(subjects), 1 / len(subjects))
    drawn = np.zeros((_N_RESAMPLES // _RESAMPLES_AT_ONCE, _RESAMPLES_AT_ONCE))
    with np.errstate(invalid="ignore", divide="ignore"):
        for i in range(len(drawn)):
            times = random.multinomial(len(subjects), equal, _RESAMPLES_AT_ONCE)
            for (weight, _), row, of_subject in zip(parts, rows, sums, strict=True):
                drawn[i] += weight * _POOLED[metric](np.tensordot(times[:, row], of_subject, 1))
    if not np.isfinite(drawn).all():
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def count_confusions(predictions: Predictions) -> NDArray[np.int64]:
    """Count the windows of each true class by the class predicted.

    Parameters
    ----------
    predictions
        Of a classification.

    Returns
    -------
    ndarray
        (true class, predicted class) int64.
    """
    n = predictions.n_classes
    pairs = predictions.target * n + predictions.prediction
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def _read_table(path: Path) -> pa.Table:
    """Read the columns that the page needs, checking page checksums where the file has them."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in file.schema_arrow.names if _is_needed(name)]
            missing = {"side", "window", "subject", "target", "prediction"} - set(names)
            if not missing:
                return file.read(names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}. Restore it, or train again.") from error
    raise InputError(f"{path} lacks its column {min(missing)!r}. Restore it, or train again.")


def _is_needed(column: str) -> bool:
    return re.fullmatch(r"side|window|subject|(target|prediction)(_\d+)?", column) is not None


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Give each text's number among the distinct texts, and those, sorted; null is one of them."""
    encoded = pc.fill_null(column.cast(pa.string()), "(none)").combine_chunks().dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names, kind="stable")
    numbers = np.empty(len(names), dtype=np.int64)
    numbers[order] = np.arange(len(names))
    return np.asarray(numbers[encoded.indices.to_numpy()]), tuple(names[order])


def _values(table: pa.Table, name: str, ledger: Ledger) -> NDArray[Any]:
    """Give targets or predictions as numbers."""
    if ledger.classes:
        return _class_numbers(table[name], ledger.classes)
    outputs = [n for n in table.column_names if re.fullmatch(rf"{name}(_\d+)?", n)]
    # Another side may have more outputs: their columns are empty here.
    outputs = [n for n in outputs if n == name or table[n].null_count < table.num_rows]
    outputs.sort(key=lambda column: (len(column), column))
    return np.stack([table[column].cast(pa.float64()).to_numpy() for column in outputs], axis=1)


def _class_numbers(column: pa.ChunkedArray, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Give the numbers of classes that are named."""
    found = pc.index_in(column.cast(pa.string()), pa.array(classes, pa.string()))
    if found.null_count:
        name = pc.filter(column, pc.is_null(found))[0].as_py()
        raise ValueError(f"class {name!r} is not among the ledger's")
    return np.asarray(found.to_numpy(), dtype=np.int64)


_Sums = NDArray[np.float64]
"""Per subject or draw, what scores are made of: (..., row, output or class)."""

# Rows of the sums of a regression: windows, and sums over windows of |error|, error², true,
# true², predicted, predicted² and true * predicted, the latter five about their means over all.
_N, _ERROR, _ERROR2, _TRUE, _TRUE2, _GUESS, _GUESS2, _BOTH = range(8)


def _sums(predictions: Predictions) -> _Sums:
    """Add up what scores are made of: (subject, row, output or class)."""
    n_subjects = len(predictions.subjects)
    if predictions.n_classes:
        cells = predictions.subject * predictions.n_classes + predictions.target
        hits = cells[predictions.target == predictions.prediction]
        n_cells = n_subjects * predictions.n_classes
        rows = [np.bincount(each, minlength=n_cells).reshape(n_subjects, -1) for each in (cells, hits)]
        return np.stack(rows, axis=1).astype(np.float64)
    true, guess = predictions.target, predictions.prediction
    error = true - guess
    true, guess = _centred(true), _centred(guess)
    factors = [
        (np.ones_like(true), 1.0),
        (abs(error), 1.0),
        (error, error),
        (true, 1.0),
        (true, true),
        (guess, 1.0),
        (guess, guess),
        (true, guess),
    ]
    sums = [
        [np.bincount(predictions.subject, output, minlength=n_subjects) for output in (one * other).T]
        for one, other in factors
    ]
    return np.array(sums).transpose(2, 0, 1)


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract the mean: far from zero, a value would lose its digits in its square."""
    # The mean of equal numbers is not always that number: a constant would seem to vary.
    return np.where(np.ptp(values, axis=0) == 0, 0.0, values - values.mean(axis=0))


def _row(sums: _Sums, row: int) -> NDArray[np.float64]:
    return np.asarray(sums[..., row, :])


def _variance(sums: _Sums, first: int = _TRUE, second: int = _TRUE2) -> NDArray[np.float64]:
    n = _row(sums, _N)
    return _row(sums, second) / n - (_row(sums, first) / n) ** 2


def _mean(values: NDArray[Any]) -> NDArray[np.float64]:
    """Average over outputs or classes."""
    return np.asarray(values.mean(axis=-1))


def _mean_error(sums: _Sums, row: int) -> NDArray[np.float64]:
    return _mean(_row(sums, row) / _row(sums, _N))


def _nrmse(sums: _Sums) -> NDArray[np.float64]:
    return np.sqrt(_mean_error(sums, _ERROR2) / _mean(_variance(sums)))


def _pearson_r(sums: _Sums) -> NDArray[np.float64]:
    n = _row(sums, _N)
    covariance = _row(sums, _BOTH) / n - _row(sums, _TRUE) * _row(sums, _GUESS) / n**2
    true, guess = _variance(sums), _variance(sums, _GUESS, _GUESS2)
    # As in training: a constant output is left out, a constant prediction counts 0.
    r = np.where((true > 0) & (guess > 0), covariance / np.sqrt(true * guess), 0.0)
    return np.asarray(r.sum(axis=-1) / (true > 0).sum(axis=-1))


def _accuracy(sums: _Sums) -> NDArray[np.float64]:
    return _mean(_row(sums, 1)) / _mean(_row(sums, 0))


def _balanced_accuracy(sums: _Sums) -> NDArray[np.float64]:
    """Average over the classes there are."""
    n, hits = _row(sums, 0), _row(sums, 1)
    return _mean(np.divide(hits, n, out=np.zeros_like(n), where=n > 0)) / _mean(n > 0)


# As engram.training defines them, from sums instead of windows.
_POOLED: Mapping[str, Callable[[_Sums], NDArray[np.float64]]] = {
    "nrmse": _nrmse,
    "rmse": lambda sums: np.sqrt(_mean_error(sums, _ERROR2)),
    "mae": lambda sums: _mean_error(sums, _ERROR),
    "r2": lambda sums: 1 - _nrmse(sums) ** 2,
    "pearson_r": _pearson_r,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
}
