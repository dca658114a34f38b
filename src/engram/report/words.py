"""How names and numbers are written on the page."""

from __future__ import annotations

import math

__all__ = ["SIDES", "metric_name", "number", "shortened"]

SIDES = {"train": "Training", "valid": "Validation", "test": "Test"}
"""Sides of a split as people call them."""

_METRICS = {
    "nrmse": "nRMSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "pearson_r": "Pearson r",
    "f1_macro": "macro F1",
    "roc_auc": "ROC AUC",
}


def metric_name(metric: str) -> str:
    """Write a metric as people do.

    Examples
    --------
    >>> metric_name("nrmse"), metric_name("balanced_accuracy")
    ('nRMSE', 'balanced accuracy')
    """
    return _METRICS.get(metric, metric.replace("_", " "))


def number(value: float) -> str:
    """Write a score or a loss: three decimals, or four figures where it is large.

    Examples
    --------
    >>> number(0.8419), number(431.26), number(12345.6), number(-1.5e-7), number(float("nan"))
    ('0.842', '431.3', '12,346', '-1.5e-07', 'not defined')
    """
    if math.isnan(value):
        return "not defined"
    size = abs(value)
    if size >= 1e15 or 0 < size < 5e-4:
        return f"{value:.3g}"
    return f"{value:,.{3 if size < 10 else 1 if size < 1000 else 0}f}"


def shortened(name: str, length: int) -> str:
    """Write a stranger's name in a figure: printable characters, and not too many of them.

    What is left out is before the end: ``instructed_toOpenEyes`` and ``instructed_toCloseEyes``, and
    most people's ids, begin alike.

    Examples
    --------
    >>> shortened("sub-NDARAC904DMU", 10), shortened("left\\thand", 10)
    ('sub…904DMU', 'left�hand')
    """
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    n_first = (length - 1) // 3
    n_last = length - 1 - n_first
    return name if len(name) <= length else f"{name[:n_first]}…{name[-n_last:]}"
