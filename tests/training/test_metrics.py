import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from engram.errors import InputError
from engram.training.metrics import METRICS, default_metrics, find_metric, score_predictions

_figures = st.floats(-1e3, 1e3, width=32)
_two_sides = st.tuples(st.integers(2, 30), st.integers(1, 3)).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float64, shape, elements=_figures), hnp.arrays(np.float64, shape, elements=_figures)
    )
)
_classes = st.tuples(st.integers(1, 40), st.integers(2, 4)).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)),
        hnp.arrays(np.float64, shape, elements=st.floats(0, 1, width=32)),
    )
)


def value_of(name: str, target: NDArray[np.generic], prediction: NDArray[np.generic]) -> float:
    """Score by one metric."""
    (score,) = score_predictions("network", "test", [name], target, prediction, target[:1])
    return score.value


def chance_of(name: str, target: NDArray[np.generic], train_target: NDArray[np.generic], n: int) -> float:
    """Give the chance level of one metric with ``n`` outputs or classes."""
    prediction = np.zeros((len(target), n))
    (score,) = score_predictions("network", "test", [name], target, prediction, train_target)
    return score.chance


# ---------------------------------------------------------------- regression


@given(_two_sides)
def test_nrmse_is_the_rmse_over_the_population_deviation(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """The nRMSE of one output is its RMSE over numpy's ddof-0 deviation; a constant target has none."""
    target, prediction = (side[:, :1] for side in sides)
    if np.ptp(target) == 0:
        assert np.isnan(value_of("nrmse", target, prediction))
    else:
        expected = sk.root_mean_squared_error(target, prediction) / target.std()
        assert value_of("nrmse", target, prediction) == pytest.approx(expected, rel=1e-9)


@given(_two_sides)
def test_r2_of_one_output_is_scikit_learns(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """r2 is scikit-learn's for one output; a constant target has none."""
    target, prediction = (side[:, :1] for side in sides)
    found = value_of("r2", target, prediction)
    expected = float("nan") if np.ptp(target) == 0 else sk.r2_score(target, prediction)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_errors_of_several_outputs_are_pooled() -> None:
    """Squared errors and variances of all outputs are added before nrmse and r2 are taken."""
    target = np.array([[0.0, 10.0, 5.0], [2.0, 14.0, 5.0]])
    prediction = target + np.array([1.0, 2.0, 0.0])
    assert value_of("nrmse", target, prediction) == pytest.approx(1.0)
    assert value_of("r2", target, prediction) == pytest.approx(0.0)


@given(_two_sides)
def test_pearson_r_is_the_mean_of_scipys_over_outputs(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """Pearson r is scipy's, averaged over outputs that vary; a constant prediction counts 0."""
    expected = []
    for target, prediction in zip(*(side.T for side in sides), strict=True):
        if np.ptp(target) == 0:
            continue
        if np.ptp(prediction) == 0:
            expected.append(0.0)
            continue
        # scipy squares what is centred: tiny figures underflow there.
        scaled = [x / np.abs(x).max() for x in (target, prediction)]
        if min(np.linalg.norm(x - x.mean()) for x in scaled) < 1e-6:
            return  # nearly constant: both libraries return rounding errors
        expected.append(stats.pearsonr(*scaled).statistic)
    found = value_of("pearson_r", *sides)
    assert found == pytest.approx(np.mean(expected), abs=1e-6) if expected else np.isnan(found)


@given(_two_sides)
def test_rmse_and_mae_are_in_the_targets_unit(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """RMSE and MAE are taken over all windows and outputs alike."""
    error = sides[1] - sides[0]
    assert value_of("rmse", *sides) == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
    assert value_of("mae", *sides) == pytest.approx(np.mean(np.abs(error)), rel=1e-9)


def test_chance_knows_the_training_targets_alone() -> None:
    """Chance predicts the training mean (MAE: median) everywhere, whatever the test's own mean is."""
    train, target = np.array([[0.0], [0.0], [3.0]]), np.array([[1.0], [3.0]])
    assert chance_of("nrmse", target, train, 1) == pytest.approx(np.sqrt(2.0))
    assert chance_of("rmse", target, train, 1) == pytest.approx(np.sqrt(2.0))
    assert chance_of("r2", target, train, 1) == pytest.approx(-1.0)
    assert chance_of("mae", target, train, 1) == pytest.approx(2.0)
    assert chance_of("pearson_r", target, train, 1) == 0.0


def test_chance_of_other_outputs_is_the_mean_of_all() -> None:
    """Sessions differ in units: what one session's tell of another's is their common mean."""
    target, train = np.array([[1.0, 3.0, 2.0]]), np.array([[1.0, 3.0], [1.0, 3.0]])
    assert chance_of("mae", target, train, 3) == pytest.approx(2 / 3)


def test_float32_is_summed_in_float64() -> None:
    """A million float32 windows score as their float64 copies do."""
    target = np.full((1_000_000, 1), 1.1, np.float32)
    target[0] = 0.1
    prediction = target + np.float32(0.1)
    exact = value_of("nrmse", target.astype(float), prediction.astype(float))
    assert value_of("nrmse", target, prediction) == exact


# ---------------------------------------------------------------- classification


@given(_classes)
def test_balanced_accuracy_is_scikit_learns(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """Balanced accuracy is the mean recall of the classes that occur, without a warning."""
    target, prediction = sides
    likeliest = prediction.argmax(axis=1)
    recalls = [np.mean(likeliest[target == number] == number) for number in np.unique(target)]
    assert value_of("balanced_accuracy", target, prediction) == pytest.approx(np.mean(recalls))
    if set(likeliest) <= set(target) and len(recalls) > 1:
        expected = sk.balanced_accuracy_score(target, likeliest)
        assert value_of("balanced_accuracy", target, prediction) == pytest.approx(expected)


@given(_classes)
def test_accuracy_and_f1_are_scikit_learns(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """Accuracy and, where every class occurs, macro F1 are scikit-learn's."""
    target, prediction = sides
    likeliest = prediction.argmax(axis=1)
    assert value_of("accuracy", target, prediction) == pytest.approx(sk.accuracy_score(target, likeliest))
    if len(np.unique(target)) == prediction.shape[1]:
        expected = sk.f1_score(target, likeliest, average="macro", zero_division=0.0)
        assert value_of("f1_macro", target, prediction) == pytest.approx(expected)


@given(_classes)
def test_roc_auc_is_the_chance_that_a_pair_is_ranked_right(sides: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """ROC AUC is the share of right pairs (ties half), averaged over classes; one class has none."""
    target, prediction = sides
    areas = []
    for number in np.unique(target):
        ours, others = prediction[target == number, number], prediction[target != number, number]
        if len(others):
            higher = ours[:, None] > others
            areas.append(np.mean(higher + 0.5 * (ours[:, None] == others)))
    found = value_of("roc_auc", target, prediction)
    assert found == pytest.approx(np.mean(areas)) if areas else np.isnan(found)


def test_chance_of_classes() -> None:
    """Chance says the commonest training class everywhere; recall then is 1 / classes, AUC a half."""
    train, target = np.array([1, 1, 2]), np.array([0, 0, 1, 2])
    assert chance_of("accuracy", target, train, 3) == 0.25
    assert chance_of("f1_macro", target, train, 3) == pytest.approx(0.4 / 3)
    assert chance_of("balanced_accuracy", target, train, 3) == pytest.approx(1 / 3)
    assert chance_of("roc_auc", target, train, 3) == 0.5


def test_chance_of_recall_is_higher_where_classes_do_not_occur() -> None:
    """Of three classes, whoever always says one of the two that occur recalls half."""
    train, target = np.array([0, 0, 1, 2]), np.array([0, 1, 1])
    assert chance_of("balanced_accuracy", target, train, 3) == 0.5
    assert chance_of("balanced_accuracy", target, np.array([2, 2, 1]), 3) == pytest.approx(1 / 3)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("name", METRICS)
def test_what_cannot_be_scored_is_nan(name: str) -> None:
    """Without windows, or with a prediction that is not finite, a metric is NaN and nothing warns."""
    whole = METRICS[name].task == "classification"
    target = np.array([0, 1]) if whole else np.array([0.0, 1.0])
    prediction = np.full((2, 2 if whole else 1), np.nan)
    assert np.isnan(value_of(name, target, prediction))
    (score,) = score_predictions("network", "test", [name], target[:0], prediction[:0], target)
    assert np.isnan(score.value)
    assert np.isnan(score.chance)


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_prediction_is_best(name: str) -> None:
    """Predicting the target beats chance in the metric's own direction."""
    if METRICS[name].task == "classification":
        target = np.array([0, 1, 1, 2])
        prediction = np.eye(3)[target]
    else:
        target = prediction = np.array([[0.0], [1.0], [5.0]])
    (score,) = score_predictions("network", "valid", [name], target, prediction, target)
    assert (score.value > score.chance) == score.higher_is_better
    assert score.higher_is_better == METRICS[name].higher_is_better
    assert (score.model, score.side, score.metric, score.n_windows) == ("network", "valid", name, len(target))


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_default_metrics_are_of_their_task(task: str) -> None:
    """Every default metric is one of its own task."""
    for name in default_metrics(task):  # type: ignore[arg-type]
        assert find_metric(name, task).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("nmrse", "regression", "Did you mean 'nrmse'"),
        ("loss", "regression", "Use one of: nrmse, rmse"),
        ("accuracy", "regression", "scores classification, this is regression"),
        ("nrmse", "classification", "Use one of: balanced_accuracy"),
    ],
)
def test_an_unknown_metric_names_a_remedy(name: str, task: str, words: str) -> None:
    """A wrong name is answered with the nearest one, or with all that there are."""
    with pytest.raises(InputError, match=words):
        find_metric(name, task)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "prediction"),
    [(np.zeros((3, 1)), np.zeros((3, 2))), (np.zeros(3, int), np.zeros(3)), (np.zeros(3), np.zeros(4))],
)
def test_shapes_must_match(target: NDArray, prediction: NDArray) -> None:  # type: ignore[type-arg]
    """Predictions of another shape than the target are refused with both shapes."""
    name = "accuracy" if target.dtype == int else "mae"
    with pytest.raises(InputError, match="do not fit targets of shape"):
        score_predictions("network", "test", [name], target, prediction, target)
