"""How well predictions meet their target, each figure beside chance and a word on which way is up.

This module decides what every metric is called, what it means where a textbook leaves it open
(several outputs, a constant target, a class that does not occur), and what a predictor that ignores
the recordings gets. Which metrics a training reports is its settings'; how they are shown is the
report's.

Chance is what can be had from the training targets alone, scored on the same target: their mean,
their median, or their commonest class, predicted everywhere. It is not the target's own mean, which
nobody knows before the test: a test side of other people has another mean, and the constant then
scores worse than 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError, MissingExtra
from engram.ledger import Score

__all__ = ["METRICS", "Metric", "Task", "default_metrics", "find_metric", "score_predictions"]

Task = Literal["regression", "classification"]
"""What is predicted: numbers, or one of several classes."""

_Array = NDArray[Any]
_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of how well predictions meet their target.

    Examples
    --------
    >>> import numpy as np
    >>> metric = find_metric("nrmse", "regression")
    >>> target = np.array([[1.0], [2.0], [3.0]])
    >>> metric.score(target, target), metric.chance(target, np.full((9, 1), 2.0), 1)
    (0.0, 1.0)
    """

    name: str
    """Its name in settings and ledgers."""
    task: Task
    """The task it is for."""
    higher_is_better: bool
    """Which way is up."""
    score: Callable[[_Array, _Array], float]
    """From target and prediction, in the shapes of ``score_predictions``, to the figure. NaN where it
    is not defined: without windows, with a prediction that is not finite, or as its function says."""
    chance: Callable[[_Array, _Array, int], float]
    """From target, training target and number of outputs or classes to the figure of a predictor
    that ignores the recordings."""


# ---------------------------------------------------------------- regression


def _nrmse(target: _Array, prediction: _Array) -> float:
    """Root mean squared error over the target's population deviation, pooled over windows.

    Of several outputs, squared errors and squared deviations from each output's own mean are added
    before the ratio is taken. NaN if every output is constant.

    References
    ----------
    EEG Foundation Challenge 2025 scores response time so: https://eeg2025.github.io/submission/.
    """
    # Rounding gives a constant a variance of about 1e-32 beside its square, so ask for equality.
    if not np.ptp(target, axis=0).any():
        return _NAN
    return float(np.sqrt(np.mean((prediction - target) ** 2) / np.mean(np.var(target, axis=0))))


def _rmse(target: _Array, prediction: _Array) -> float:
    """Root mean squared error over all windows and outputs, in the target's unit."""
    return float(_sklearn_metrics().root_mean_squared_error(target.ravel(), prediction.ravel()))


def _mae(target: _Array, prediction: _Array) -> float:
    """Mean absolute error over all windows and outputs, in the target's unit."""
    return float(_sklearn_metrics().mean_absolute_error(target.ravel(), prediction.ravel()))


def _r2(target: _Array, prediction: _Array) -> float:
    """Share of the target's variance that is explained, pooled over outputs as nrmse is."""
    return 1.0 - _nrmse(target, prediction) ** 2


def _pearson_r(target: _Array, prediction: _Array) -> float:
    """Pearson correlation over windows, averaged over outputs.

    An output whose target is constant is left out, NaN if all are; one whose prediction is
    constant counts 0, so that a network that has not learned anything yet scores as chance does.
    """
    varies = np.ptp(target, axis=0) > 0
    if not varies.any():
        return _NAN
    target, prediction = target[:, varies], prediction[:, varies]
    constant = np.ptp(prediction, axis=0) == 0
    target, prediction = (_unit_columns(values) for values in (target, prediction))
    return float(np.mean(np.where(constant, 0.0, np.sum(target * prediction, axis=0))))


def _unit_columns(values: _Array) -> _Array:
    """Centre every column and give it length one; a column of zeros stays."""
    # First to a range near one: the squares of very small or large numbers leave float64's range.
    scale = np.max(np.abs(values), axis=0)
    centred = values / np.where(scale > 0, scale, 1.0)
    centred -= centred.mean(axis=0)
    length = np.linalg.norm(centred, axis=0)
    return np.asarray(centred / np.where(length > 0, length, 1.0))


def _guess(
    score: Callable[[_Array, _Array], float], guess: Callable[..., _Array]
) -> Callable[[_Array, _Array, int], float]:
    """Score the training targets' mean or median as the prediction of every window."""

    def chance(target: _Array, train_target: _Array, _n_outputs: int) -> float:
        if len(train_target) == 0:
            return _NAN
        return score(target, np.broadcast_to(guess(train_target, axis=0), target.shape))

    return chance


# ---------------------------------------------------------------- classification


def _accuracy(target: _Array, prediction: _Array) -> float:
    """Share of windows whose likeliest class is the true one."""
    return float(np.mean(prediction.argmax(axis=1) == target))


def _balanced_accuracy(target: _Array, prediction: _Array) -> float:
    """Recall, averaged over the classes that occur in the target."""
    found = _sklearn_metrics().recall_score(
        target, prediction.argmax(axis=1), labels=np.unique(target), average="macro", zero_division=0.0
    )
    return float(found)


def _f1_macro(target: _Array, prediction: _Array) -> float:
    """F1 (harmonic mean of precision and recall), averaged over the classes that occur in the target.

    A class that is never predicted counts 0.
    """
    found = _sklearn_metrics().f1_score(
        target, prediction.argmax(axis=1), labels=np.unique(target), average="macro", zero_division=0.0
    )
    return float(found)


def _roc_auc(target: _Array, prediction: _Array) -> float:
    """Area under the ROC curve of each class against the rest, averaged over the classes that occur.

    NaN if only one class occurs.
    """
    occurring = np.unique(target)
    if len(occurring) < 2:
        return _NAN
    area = _sklearn_metrics().roc_auc_score
    return float(np.mean([area(target == number, prediction[:, number]) for number in occurring]))


def _balanced_guess(target: _Array, train_target: _Array, n_classes: int) -> float:
    """Score guessing among all classes, or the commonest class, whichever is better.

    The latter is where classes do not occur in the target: of three, one of two that do gets half.
    """
    commonest = _commonest_class(_balanced_accuracy)(target, train_target, n_classes)
    return max(1.0 / n_classes, 0.0 if math.isnan(commonest) else commonest)


def _commonest_class(
    score: Callable[[_Array, _Array], float],
) -> Callable[[_Array, _Array, int], float]:
    """Score the commonest training class as the prediction of every window."""

    def chance(target: _Array, train_target: _Array, n_classes: int) -> float:
        if len(train_target) == 0:
            return _NAN
        shares = np.bincount(train_target, minlength=n_classes) / len(train_target)
        return score(target, np.broadcast_to(shares, (len(target), n_classes)))

    return chance


# ---------------------------------------------------------------- the table

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("nrmse", "regression", False, _nrmse, _guess(_nrmse, np.mean)),
            Metric("rmse", "regression", False, _rmse, _guess(_rmse, np.mean)),
            # The median, not the mean, is the constant of least absolute error.
            Metric("mae", "regression", False, _mae, _guess(_mae, np.median)),
            Metric("r2", "regression", True, _r2, _guess(_r2, np.mean)),
            Metric("pearson_r", "regression", True, _pearson_r, lambda *_: 0.0),
            Metric("balanced_accuracy", "classification", True, _balanced_accuracy, _balanced_guess),
            Metric("accuracy", "classification", True, _accuracy, _commonest_class(_accuracy)),
            Metric("f1_macro", "classification", True, _f1_macro, _commonest_class(_f1_macro)),
            Metric("roc_auc", "classification", True, _roc_auc, lambda *_: 0.5),
        )
    }
)
"""Every metric by its name."""

_DEFAULTS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "regression": ("nrmse", "pearson_r", "mae"),
        "classification": ("balanced_accuracy", "accuracy", "roc_auc"),
    }
)


def default_metrics(task: Task) -> tuple[str, ...]:
    """Name the metrics that are reported unless others are asked for; the first is the main one.

    Examples
    --------
    >>> default_metrics("regression")
    ('nrmse', 'pearson_r', 'mae')
    """
    return _DEFAULTS[task]


def find_metric(name: str, task: Task) -> Metric:
    """Look a metric up by its name.

    Raises
    ------
    InputError
        If there is none of this name, or it is for the other task.
    """
    metric = METRICS.get(name)
    if metric is not None and metric.task == task:
        return metric
    names = [other for other, found in METRICS.items() if found.task == task]
    if metric is not None:
        raise InputError(f"{name!r} scores {metric.task}, this is {task}. Use one of: {', '.join(names)}.")
    near = difflib.get_close_matches(name, names, 1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Use one of: {', '.join(names)}."
    raise InputError(f"There is no metric {name!r} for {task}. {remedy}")


def score_predictions(  # noqa: PLR0917 - who, whose, what; then target before prediction, as in scikit-learn
    model: str,
    side: str,
    metrics: Sequence[str],
    target: NDArray[Any],
    prediction: NDArray[Any],
    train_target: NDArray[Any],
) -> tuple[Score, ...]:
    """Score predictions by every metric asked for, each beside its chance level.

    Parameters
    ----------
    model
        Who predicted: ``"network"``, ``"ridge"``, ...
    side
        Whose windows these are: ``"valid"`` or ``"test"``.
    metrics
        Names of metrics, in the order of the result.
    target
        Regression: (window, output) or (window,) floats. Classification: (window,) integers, the
        numbers of the classes.
    prediction
        Regression: as the target. Classification: (window, class) probabilities, or any figures
        of which the largest is the likeliest class.
    train_target
        Targets of the training windows, as the target: what chance may know.

    Raises
    ------
    InputError
        If a metric is unknown or for the other task, or shapes do not match.

    Examples
    --------
    >>> import numpy as np
    >>> target = np.array([0.5, 1.5, 2.5, 3.5])
    >>> (score,) = score_predictions("network", "test", ["rmse"], target, target + 1, np.array([1.0, 2.0]))
    >>> score.value, round(score.chance, 3), score.higher_is_better, score.n_windows
    (1.0, 1.225, False, 4)
    """
    task: Task = "classification" if np.issubdtype(target.dtype, np.integer) else "regression"
    found = [find_metric(name, task) for name in metrics]
    if task == "regression":
        # float64: the sum of a million squares in float32 is off in the fourth figure.
        target, prediction, train_target = (
            np.asarray(values, np.float64).reshape(len(values), math.prod(values.shape[1:]))
            for values in (target, prediction, train_target)
        )
        fits = prediction.shape == target.shape
        if train_target.shape[1] != target.shape[1]:
            # Other people's sessions have other units: what all outputs have in common is their mean.
            train_target = train_target.reshape(-1, 1)
    else:
        fits = target.ndim == 1 and prediction.ndim == 2 and len(prediction) == len(target)
    if not fits:
        raise InputError(
            f"Predictions of shape {prediction.shape} do not fit targets of shape {target.shape}. "
            "Predict one row per window: the outputs, or one figure per class."
        )
    n_outputs = prediction.shape[1]
    is_scored = len(target) > 0 and bool(np.isfinite(prediction).all() and np.isfinite(target).all())
    return tuple(
        Score(
            model=model,
            side=side,
            metric=metric.name,
            value=metric.score(target, prediction) if is_scored else _NAN,
            chance=metric.chance(target, train_target, n_outputs) if len(target) else _NAN,
            higher_is_better=metric.higher_is_better,
            n_windows=len(target),
        )
        for metric in found
    )


def _sklearn_metrics() -> Any:
    try:
        import sklearn.metrics as found
    except ImportError as error:
        raise MissingExtra("scikit-learn", "torch") from error
    return found
