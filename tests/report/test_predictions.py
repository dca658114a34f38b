from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.errors import InputError
from engram.ledger import PREDICTIONS, Ledger
from engram.report.predictions import (
    Predictions,
    count_confusions,
    interval,
    pooled_score,
    read_predictions,
    score_subjects,
    weighted_interval,
)
from engram.training.metrics import score_predictions

REGRESSION = Ledger("demo", "regression", "nrmse")
CLASSES = ("left", "right", "feet")
CLASSIFICATION = Ledger("demo", "classification", "balanced_accuracy", classes=CLASSES)


def made(subject: NDArray[Any], target: NDArray[Any], prediction: NDArray[Any], n: int = 0) -> Predictions:
    """Make predictions of windows numbered from 0; subjects are numbered without gaps."""
    names, subject = np.unique(subject, return_inverse=True)
    words = tuple(f"s{name:03}" for name in names)
    return Predictions("test", np.arange(len(target)), subject, words, target, prediction, n)


@st.composite
def regressions(draw: st.DrawFn) -> Predictions:
    """Draw predictions of one to three outputs, also far from zero."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_subjects = draw(st.integers(1, 15))
    n, n_outputs = draw(st.integers(max(3, n_subjects), 60)), draw(st.integers(1, 3))
    subject = np.concatenate([np.arange(n_subjects), random.integers(0, n_subjects, n - n_subjects)])
    target = random.normal(draw(st.sampled_from([0.0, 1000.0])), 1.0, (n, n_outputs))
    return made(subject, target, target + random.normal(0.2, 1.0, (n, n_outputs)))


@st.composite
def classifications(draw: st.DrawFn) -> Predictions:
    """Draw predictions of two to four classes, of which some may not occur."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, n_classes = draw(st.integers(2, 60)), draw(st.integers(2, 4))
    target, prediction = random.integers(0, n_classes, (2, n))
    return made(random.integers(0, 12, n), target, prediction, n_classes)


@given(regressions(), st.sampled_from(["nrmse", "rmse", "mae", "r2", "pearson_r"]))
def test_a_regression_is_scored_as_in_training(predictions: Predictions, metric: str) -> None:
    """A score from sums per subject is the score that the training computed from windows."""
    target, prediction = predictions.target, predictions.prediction
    (score,) = score_predictions("network", "test", [metric], target, prediction, target)
    assert pooled_score(predictions, metric) == pytest.approx(score.value, rel=1e-6, abs=1e-8)


@given(regressions(), st.sampled_from(["target", "prediction"]), st.integers(0, 2))
def test_a_constant_output_is_scored_as_in_training(made_up: Predictions, what: str, output: int) -> None:
    """A unit that never fires, or a network that says the same of all windows, is no contradiction."""
    values = getattr(made_up, what).copy()
    values[:, output % values.shape[1]] = 0.1
    predictions = replace(made_up, **{what: values})
    target, prediction = predictions.target, predictions.prediction
    (score,) = score_predictions("network", "test", ["pearson_r"], target, prediction, target)
    assert pooled_score(predictions, "pearson_r") == pytest.approx(score.value, abs=1e-8, nan_ok=True)


@given(classifications(), st.sampled_from(["accuracy", "balanced_accuracy"]))
def test_a_classification_is_scored_as_in_training(predictions: Predictions, metric: str) -> None:
    """A score from counts per subject is the score that the training computed from windows."""
    shares = np.eye(predictions.n_classes)[predictions.prediction]
    (score,) = score_predictions("network", "test", [metric], predictions.target, shares, predictions.target)
    assert pooled_score(predictions, metric) == pytest.approx(score.value)


def test_a_metric_that_is_no_function_of_sums_is_left_alone() -> None:
    """An area under a curve needs the windows: it is neither checked nor given an interval."""
    predictions = made(np.arange(40) % 20, np.arange(40) % 2, np.arange(40) % 3 % 2, 2)
    assert pooled_score(predictions, "roc_auc") is None
    assert interval(predictions, "roc_auc") is None


@given(regressions())
def test_subjects_of_a_regression_share_one_unit(predictions: Predictions) -> None:
    """Each is its RMSE over the deviation of all, and chance is the mean of all in the same unit."""
    scores = score_subjects(predictions)
    target, prediction = predictions.target, predictions.prediction
    spread = np.sqrt(np.mean(np.var(target, axis=0)))
    for number in range(len(predictions.subjects)):
        own = predictions.subject == number
        rmse = np.sqrt(np.mean((target[own] - prediction[own]) ** 2))
        constant = np.sqrt(np.mean((target[own] - target.mean(axis=0)) ** 2))
        assert scores.n_rows[number] == own.sum()
        assert scores.value[number] == pytest.approx(rmse / spread)
        assert scores.chance[number] == pytest.approx(constant / spread)
    assert scores.n_better == np.count_nonzero(scores.value < scores.chance)
    assert np.all(np.diff(scores.value[scores.best_first()]) >= 0)


@given(classifications())
def test_a_subject_is_judged_by_the_classes_it_has(predictions: Predictions) -> None:
    """Its score is the recall averaged over its own classes; chance is to guess among all."""
    scores = score_subjects(predictions)
    for number in range(len(predictions.subjects)):
        own = predictions.subject == number
        true, guess = predictions.target[own], predictions.prediction[own]
        recalls = [np.mean(guess[true == each] == each) for each in np.unique(true)]
        assert scores.value[number] == pytest.approx(np.mean(recalls))
        assert scores.chance[number] == 1 / predictions.n_classes
    assert np.all(np.diff(scores.value[scores.best_first()]) <= 0)


@given(classifications())
def test_confusions_are_counted(predictions: Predictions) -> None:
    """Row and column are the true class and the one it was taken for."""
    counts = count_confusions(predictions)
    for (true, guess), n in np.ndenumerate(counts):
        assert n == np.sum((predictions.target == true) & (predictions.prediction == guess))


def test_a_constant_target_has_no_score() -> None:
    """Nothing can be divided by a deviation of zero, and no warning is given for it."""
    scores = score_subjects(made(np.arange(20), np.full((20, 1), 0.1), np.zeros((20, 1))))
    assert np.isnan(scores.chance).all()
    assert scores.n_better == 0
    assert interval(made(np.arange(20), np.full((20, 1), 3.0), np.zeros((20, 1))), "nrmse") is None


def clustered(n_subjects: int) -> Predictions:
    """Make predictions that are off by a subject's own amount: 50 windows tell little more than one."""
    random = np.random.default_rng(1)
    subject = np.repeat(np.arange(n_subjects), 50)
    target = random.normal(size=(len(subject), 1))
    return made(subject, target, target + random.normal(size=n_subjects)[subject, None])


def test_an_interval_is_over_people_not_windows() -> None:
    """Where windows of a subject are alike, the interval is far wider than windows alone suggest."""
    predictions = clustered(20)
    bounds = interval(predictions, "rmse")
    shuffled = np.random.default_rng(2).permutation(predictions.subject)
    as_if = interval(made(shuffled, predictions.target, predictions.prediction), "rmse")
    score = pooled_score(predictions, "rmse")

    assert bounds is not None
    assert as_if is not None
    assert score is not None
    assert bounds[0] < score < bounds[1]
    assert bounds[1] - bounds[0] > 3 * (as_if[1] - as_if[0])
    assert interval(predictions, "rmse") == bounds


def test_few_subjects_have_no_interval() -> None:
    """Resampling nine people would promise more than is known."""
    assert interval(clustered(9), "rmse") is None
    assert interval(clustered(10), "rmse") is not None


# ---------------------------------------------------------------- reading


def written(folder: Path, columns: Mapping[str, Any]) -> Path:
    """Write a table of predictions; columns that are not given are made up."""
    n = len(columns["target"])
    given = {
        "side": pa.array(["test"] * n).dictionary_encode(),
        "window": range(n),
        "recording": ["r"] * n,
        "subject": ["s"] * n,
        "anchor_s": [0.0] * n,
    }
    pq.write_table(pa.table({**given, **columns}), folder / PREDICTIONS)
    return folder


def test_the_test_side_is_read_before_the_validation_side(tmp_path: Path) -> None:
    """Windows of other sides are left out, and the subjects on them."""
    columns = {
        "side": ["valid", "test", "test", "valid"],
        "window": [3, 1, 2, 0],
        "subject": ["a", "c", "b", "b"],
        "target": np.arange(4, dtype=np.float32),
        "prediction": np.arange(4, 8, dtype=np.float32),
    }
    predictions = read_predictions(written(tmp_path, columns), REGRESSION)

    assert predictions is not None
    assert (predictions.side, predictions.subjects) == ("test", ("b", "c"))
    assert predictions.windows.tolist() == [1, 2]
    assert predictions.subject.tolist() == [1, 0]
    assert predictions.target.tolist() == [[1.0], [2.0]]
    assert predictions.prediction.tolist() == [[5.0], [6.0]]

    columns["side"] = ["valid", "train", "train", "valid"]
    predictions = read_predictions(written(tmp_path, columns), REGRESSION)
    assert predictions is not None
    assert (predictions.side, predictions.windows.tolist()) == ("valid", [3, 0])


def test_nothing_was_predicted(tmp_path: Path) -> None:
    """A training without predictions, or with those of no side that is scored, has none to show."""
    assert read_predictions(tmp_path, REGRESSION) is None
    columns = {"side": ["train"], "target": [1.0], "prediction": [1.0]}
    assert read_predictions(written(tmp_path, columns), REGRESSION) is None


def test_outputs_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Output 10 comes after output 2, and outputs that only another side has are left out."""
    columns: dict[str, Any] = {}
    for number in range(12):
        suffix = f"_{number}" if number else ""
        columns[f"target{suffix}"], columns[f"prediction{suffix}"] = [float(number)], [-float(number)]
    columns["target_12"] = columns["prediction_12"] = pa.array([None], pa.float32())
    predictions = read_predictions(written(tmp_path, columns), REGRESSION)

    assert predictions is not None
    assert predictions.target.tolist() == [[float(number) for number in range(12)]]
    assert predictions.prediction.tolist() == [[-float(number) for number in range(12)]]


def test_a_missing_number_is_not_a_number(tmp_path: Path) -> None:
    """A null among the predictions makes a score undefined and not an error."""
    columns = {"target": [1.0, 2.0], "prediction": [1.0, None]}
    predictions = read_predictions(written(tmp_path, columns), REGRESSION)
    assert predictions is not None
    assert np.isnan(score_subjects(predictions).value).all()


def test_classes_are_read_by_name(tmp_path: Path) -> None:
    """The order of the ledger numbers them; a subject without a name is a subject."""
    columns = {"target": ["feet", "left"], "prediction": ["right", "left"], "subject": [None, "b"]}
    predictions = read_predictions(written(tmp_path, columns), CLASSIFICATION)

    assert predictions is not None
    assert (predictions.target.tolist(), predictions.prediction.tolist()) == ([2, 0], [1, 0])
    assert predictions.subjects == ("(none)", "b")


@pytest.mark.parametrize(
    ("ledger", "columns", "message"),
    [
        (CLASSIFICATION, {"target": ["tongue"], "prediction": ["left"]}, "class 'tongue' is not among"),
        (CLASSIFICATION, {"target": ["left"], "prediction": [None]}, "class None is not among"),
        (REGRESSION, {"target": ["left"], "prediction": [1.0]}, "does not suit its ledger"),
        (REGRESSION, {"target": [1.0]}, "lacks its column 'prediction'"),
        (
            REGRESSION,
            {"target": [1.0], "prediction": [1.0], "target_1": [1.0]},
            r"targets of shape \(1, 2\), predictions of shape \(1, 1\)",
        ),
    ],
)
def test_a_table_that_does_not_suit_is_refused(
    ledger: Ledger, columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The message names the file and what is wrong."""
    with pytest.raises(InputError, match=rf"predictions\.parquet .*{message}"):
        read_predictions(written(tmp_path, columns), ledger)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    """However it was cut, the error names the file."""
    path = written(tmp_path, {"target": [1.0], "prediction": [1.0]}) / PREDICTIONS
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"predictions\.parquet cannot be read"):
            read_predictions(tmp_path, REGRESSION)


def test_a_signature_tells_other_windows_or_targets() -> None:
    """It is the same in any order of rows, and whatever was predicted."""
    subject, target = np.arange(4), np.arange(4.0)[:, None]
    one = made(subject, target, target)
    order = np.array([2, 0, 3, 1])
    same = Predictions("test", order, subject[order], one.subjects, target[order], target * 0, 0)

    assert one.signature() == same.signature()
    assert one.signature() != made(subject, target + 1, target).signature()
    assert one.signature() != made(subject[:3], target[:3], target[:3]).signature()


def test_values_of_a_target_signal_are_not_called_windows() -> None:
    """A window that has several rows has one for each value of its target."""
    target = np.arange(4.0)[:, None]
    assert made(np.arange(4), target, target).unit == "windows"
    several = Predictions("test", np.array([0, 0, 1, 1]), np.zeros(4, int), ("s",), target, target, 0)
    assert several.unit == score_subjects(several).unit == "values"


def test_the_interval_of_a_sum_draws_each_person_once() -> None:
    """For all parts at once: halves of one score give its interval; people of one part alone count, too."""
    whole, fewer = clustered(20), clustered(12)
    assert weighted_interval([(0.3, whole), (0.7, whole)], "rmse") == pytest.approx(interval(whole, "rmse"))
    both = weighted_interval([(1.0, whole), (1.0, fewer)], "rmse")
    parts = [interval(each, "rmse") for each in (whole, fewer)]
    assert both is not None
    assert None not in parts
    low, high = (sum(bounds) for bounds in zip(*parts, strict=True))
    assert low < both[0] < both[1] < high
    assert weighted_interval([(1.0, whole), (1.0, clustered(9))], "rmse") is None
