from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import engram
from engram.errors import InputError, StoreMissing
from engram.ledger import PREDICTIONS, Ledger
from engram.store.reader import Store
from engram.testing.trials import make_trials
from engram.training.fit import BEST
from engram.training.recipe import Recipe
from engram.training.train import evaluate, predict_windows, start_at_mean, train


def write_store(path: Path, *, n_subjects: int = 8, first: int = 0, n_channels: int = 4) -> Path:
    """Prepare trials, and close the store."""
    source = make_trials(n_subjects, first=first, n_channels=n_channels)
    engram.prepare(source, path, precision="float32").store.close()
    return path


def make_recipe(store: Path, **changes: Any) -> Recipe:
    """Say what is trained: response times, from the second after a square."""
    content: dict[str, Any] = {
        "name": "trials",
        "store": str(store),
        "windows": {"events": {"signal": "eeg", "anchor": ["square"], "trial_duration_s": 1.0}},
        "target": {"time_to": {"events": ["rt"]}},
        "split": {"test": {"fraction": 0.25}, "valid": {"fraction": 0.34}},
        "model": {"name": "SCCNet", "arguments": {"n_spatial_filters": 2, "n_spatial_filters_smooth": 2}},
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "accelerator": "cpu"},
    }
    return Recipe.model_validate_json(json.dumps(content | changes), strict=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a training of it that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    store = write_store(folder / "store")
    train(make_recipe(store), folder / "training")
    return folder


@pytest.fixture
def moved(corpus: Path, tmp_path: Path) -> Path:
    """A copy of store and training in another place, to be changed."""
    shutil.copytree(corpus, tmp_path / "moved")
    return tmp_path / "moved"


def test_the_ledger_has_the_network_the_ridge_and_chance(corpus: Path) -> None:
    """Both models are scored by the same metrics on the same windows of valid and test."""
    ledger = Ledger.read(corpus / "training")
    keys = {(score.model, score.side, score.metric): score for score in ledger.scores}
    assert {model for model, _, _ in keys} == {"network", "ridge"}
    assert {side for _, side, _ in keys} == {"valid", "test"}
    for (model, side, metric), score in keys.items():
        other = keys["ridge" if model == "network" else "network", side, metric]
        assert (score.chance, score.n_windows) == (other.chance, other.n_windows)
    # The mean of the window tells the answer, which a ridge on averages reads.
    assert keys["ridge", "test", "nrmse"].value < 0.6
    assert any("The ridge saw" in note for note in ledger.notes)


def test_a_recipe_can_be_told_from_the_ledger(corpus: Path) -> None:
    """The ledger keeps every field, and the way to the store from the training's folder."""
    recipe = Ledger.read(corpus / "training").recipe
    assert recipe["store"] == "../store"
    assert recipe["training"]["scheduler"] == "constant"
    assert recipe["windows"]["events"]["anchor"] == ["square"]


def test_training_again_returns_what_is_there(corpus: Path) -> None:
    """A finished training is not repeated, and its baselines are not scored twice."""
    before = (corpus / "training" / "ledger.json").read_bytes()
    fitted = train(make_recipe(corpus / "store"), corpus / "training")
    assert (corpus / "training" / "ledger.json").read_bytes() == before
    assert fitted.ledger == Ledger.read(corpus / "training")


def test_baselines_that_a_kill_left_out_are_scored_by_the_same_call(moved: Path) -> None:
    """A kill between the training's ledger and the baselines costs nothing."""
    folder = moved / "training"
    whole = Ledger.read(folder)
    (folder / "ledger.json").unlink()
    fitted = train(make_recipe(moved / "store"), folder)
    assert fitted.ledger.scores == whole.scores


def test_another_seed_begins_with_other_weights(corpus: Path, tmp_path: Path) -> None:
    """``training.seed`` draws the first weights too."""
    content = make_recipe(corpus / "store").to_dict()
    content["training"] |= {"seed": 1, "epochs": 1, "learning_rate": 1e-12}
    one = train(Recipe.model_validate(content), tmp_path / "one").model.state_dict()
    content["training"] |= {"seed": 2}
    two = train(Recipe.model_validate(content), tmp_path / "two").model.state_dict()
    assert any(not torch.equal(one[name], two[name]) for name in one if "weight" in name)


def test_what_stands_about_the_network_is_kept_with_it(corpus: Path, tmp_path: Path) -> None:
    """Scaling, downsampling, bounds, shifts: the same scores when loaded."""
    recipe = make_recipe(
        corpus / "store",
        windows={
            "events": {
                "signal": "eeg", "anchor": ["square"], "trial_duration_s": 1.0, "shift_s": 0.05
            }
        },
        model={
            "name": "TimeLocalizer",
            "arguments": {"n_filters": 4, "n_blocks": 2},
            "framing": {"scaling": "channel", "downsample": 2, "reach": 0.5, "test_shifts": [-4, 0, 4]},
        },
        training={
            "epochs": 2, "batch_size": 16, "learning_rate": 0.01, "accelerator": "cpu",
            "noise": 1.0, "channel_dropout": 0.1, "time_mask_samples": 10,
        },
    )  # fmt: skip
    ledger = train(recipe, tmp_path / "training").ledger
    found = evaluate(tmp_path / "training", side="test")
    expected = [s.value for s in ledger.scores if s.model == "network" and s.side == "test"]
    np.testing.assert_allclose([score.value for score in found.scores], expected, rtol=1e-5)
    predicted = predict_windows(tmp_path / "training", corpus / "store").predictions
    told = pq.read_table(tmp_path / "training" / "predictions.parquet")
    assert len(predicted) >= len(told)


@pytest.mark.parametrize("side", ["valid", "test"])
def test_evaluating_again_gives_the_scores_and_predictions_of_the_training(corpus: Path, side: str) -> None:
    """The weights that were scored are those that are kept."""
    found = evaluate(corpus / "training", side=side)
    ledger = Ledger.read(corpus / "training")
    expected = [score for score in ledger.scores if score.model == "network" and score.side == side]
    assert [score.metric for score in found.scores] == [score.metric for score in expected]
    np.testing.assert_allclose(
        [score.value for score in found.scores], [score.value for score in expected], rtol=1e-5
    )
    table = pq.read_table(corpus / "training" / PREDICTIONS).to_pylist()
    kept = [row["prediction"] for row in table if row["side"] == side]
    np.testing.assert_allclose(found.predictions["prediction"].to_pylist(), kept, rtol=1e-4)
    assert not found.within_subject
    assert found.refused == {"no target": 16}  # two squares of each subject were not answered


def test_another_store_is_scored_whole(corpus: Path, tmp_path: Path) -> None:
    """Every window with a target counts; subjects that were trained on are told."""
    others = evaluate(corpus / "training", store=write_store(tmp_path / "others", n_subjects=3, first=20))
    assert {score.n_windows for score in others.scores} == {3 * 18}
    assert {row["side"] for row in others.predictions.to_pylist()} == {"other"}
    assert not others.within_subject
    assert evaluate(corpus / "training", store=corpus / "store").within_subject


def test_prediction_needs_no_targets(corpus: Path, tmp_path: Path) -> None:
    """Squares that nobody answered are predicted too, as evaluating predicts the others."""
    store = write_store(tmp_path / "others", n_subjects=2, first=30)
    found = predict_windows(corpus / "training", store)
    scored = evaluate(corpus / "training", store=store)
    assert found.scores == ()
    assert found.predictions.num_rows == 40
    assert "target" not in found.predictions.column_names
    by_anchor = {
        (row["recording"], row["anchor_s"]): row["prediction"] for row in found.predictions.to_pylist()
    }
    for row in scored.predictions.to_pylist():
        np.testing.assert_allclose(by_anchor[row["recording"], row["anchor_s"]], row["prediction"], rtol=1e-4)


def test_prediction_needs_no_store_of_the_training(moved: Path, tmp_path: Path) -> None:
    """A trained folder alone predicts; evaluating asks for the store that chance is computed from."""
    shutil.rmtree(moved / "store")
    store = write_store(tmp_path / "others", n_subjects=2, first=30)
    assert predict_windows(moved / "training", store).predictions.num_rows == 40
    with pytest.raises(StoreMissing):
        evaluate(moved / "training", store=store)


def test_a_training_and_its_store_may_be_moved_together(moved: Path) -> None:
    """Nothing in a training's folder is an absolute path."""
    assert evaluate(moved / "training").scores == evaluate(moved / "training").scores
    for file in ("ledger.json", BEST):
        assert str(moved.parent).encode() not in (moved / "training" / file).read_bytes()


def test_a_store_that_has_grown_is_not_split_again(moved: Path) -> None:
    """With new subjects the fractions fall elsewhere: somebody trained on could be tested."""
    source = make_trials(12)
    engram.prepare(source, moved / "store", precision="float32").store.close()
    with pytest.raises(InputError, match="has changed since this training"):
        evaluate(moved / "training")


def test_a_store_that_was_moved_alone_is_asked_back(moved: Path) -> None:
    """The message tells the training's own store from the one that was named."""
    other = (moved / "store").rename(moved / "elsewhere")
    with pytest.raises(StoreMissing, match=r"that .*training was trained on is not at"):
        evaluate(moved / "training", store=other)


def test_an_anchor_that_no_recording_has_is_told(corpus: Path, tmp_path: Path) -> None:
    """A slip in one of several names leaves windows to train on; the ledger says what it left out."""
    events = {"signal": "eeg", "anchor": ["square", "sqare"], "trial_duration_s": 1.0}
    fitted = train(make_recipe(corpus / "store", windows={"events": events}), tmp_path)
    assert "No recording has an event sqare, which the anchor names." in fitted.ledger.notes


def test_windows_of_another_form_are_refused(corpus: Path, tmp_path: Path) -> None:
    """A network of 4 channels is not fed with 5."""
    store = write_store(tmp_path / "wide", n_subjects=2, first=40, n_channels=5)
    with pytest.raises(InputError, match="windows of another form"):
        predict_windows(corpus / "training", store)


def test_a_side_that_there_is_not_is_named(corpus: Path) -> None:
    """The error lists the sides that there are."""
    with pytest.raises(InputError, match="no side 'dev'"):
        evaluate(corpus / "training", side="dev")


def test_a_training_from_python_is_evaluated_in_python(corpus: Path, tmp_path: Path) -> None:
    """A ledger without a recipe does not say how its network is built."""
    with Store(corpus / "store") as store:
        recipe = make_recipe(corpus / "store")
        sides = store.windows(recipe.windows.value, recipe.target_value).split(recipe.split)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(400, 1))
        settings = engram.FitSettings(epochs=1, accelerator="cpu")
        engram.fit(network, sides, tmp_path / "own", settings)
    with pytest.raises(InputError, match="not made from a recipe"):
        evaluate(tmp_path / "own")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("training", "learning_rate", -1.0),
            r"ledger.json: .*learning_rate=-1.0 is not above zero.*Restore it",
        ),
        (("model", "arguments", {"n_spatial_filters": 3}), r"of another network, .*: size mismatch for"),
    ],
)
def test_a_ledger_that_was_changed_is_told(moved: Path, change: tuple[str, str, Any], said: str) -> None:
    """By the field that is wrong, or the first weight that has no place."""
    ledger = moved / "training" / "ledger.json"
    content = json.loads(ledger.read_text())
    table, name, value = change
    content["recipe"][table][name] = value
    ledger.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said) as refused:
        evaluate(moved / "training")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accelerator": "foo"}, "accelerator='foo' with devices=1 is not to be had here: .*Use accelerator"),
        ({"accelerator": "tpu"}, "accelerator='tpu' with devices=1 is not to be had here: "),
    ],
)
def test_a_device_that_there_is_not_leaves_nothing(
    corpus: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """No folder, and no traceback of Lightning's."""
    content = make_recipe(corpus / "store").to_dict()
    content["training"] |= settings
    with pytest.raises(InputError, match=said):
        train(Recipe.model_validate(content), tmp_path / "training")
    assert not list(tmp_path.iterdir())


def test_a_store_is_no_folder_of_a_training(corpus: Path) -> None:
    """Somebody named them in the wrong order."""
    before = sorted((corpus / "store").rglob("*"))
    with pytest.raises(InputError, match=r"store is a store\. Name another folder"):
        train(make_recipe(corpus / "store"), corpus / "store")
    assert sorted((corpus / "store").rglob("*")) == before


@pytest.fixture(scope="module")
def classified(corpus: Path) -> Iterator[Path]:
    """A training that tells the groups apart."""
    content = make_recipe(corpus / "store").to_dict()
    content["target"] = {"recording": {"column": "group", "task": "classification", "classes": []}}
    content["training"]["epochs"] = 1
    train(Recipe.model_validate(content), corpus / "groups")
    yield corpus / "groups"
    shutil.rmtree(corpus / "groups")


def test_classes_keep_their_numbers_on_another_store(classified: Path, tmp_path: Path) -> None:
    """A store where one class does not occur is scored by the classes that were trained."""
    store = write_store(tmp_path / "one", n_subjects=1, first=51)
    found = evaluate(classified, store=store)
    assert {score.metric for score in found.scores} >= {"balanced_accuracy", "accuracy"}
    assert set(found.predictions["target"].to_pylist()) == {"odd"}
    assert {"p_even", "p_odd"} <= set(found.predictions.column_names)
    predicted = predict_windows(classified, store).predictions
    assert {"p_even", "p_odd"} <= set(predicted.column_names)
    assert set(predicted["prediction"].to_pylist()) <= {"odd", "even"}


def test_a_recipe_that_changed_is_not_gone_on_with(moved: Path) -> None:
    """Also where no weight shows it: another dropout, another stretch of the recording."""
    recipe = make_recipe(moved / "store")
    content = recipe.to_dict()
    content["model"]["arguments"]["drop_prob"] = 0.25
    with pytest.raises(InputError, match=r"Dropout\(p=0.5"):
        train(Recipe.model_validate(content), moved / "training")
    content = recipe.to_dict()
    content["windows"]["events"]["trial_start_offset_s"] = 0.1
    with pytest.raises(InputError, match="other windows on its side train"):
        train(Recipe.model_validate(content), moved / "training")


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2), nn.Identity()),
        nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 2, 4), nn.Flatten()),
    ],
)
def test_a_network_begins_with_the_mean_of_the_targets(network: nn.Module) -> None:
    """The bias of its last linear layer is the mean, all other weights stay."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_at_mean(network, np.array([[1.0, 10.0], [3.0, 30.0]], np.float32))
    changed = {name: value for name, value in network.state_dict().items() if not value.equal(before[name])}
    (bias,) = changed.values()
    assert bias.tolist() == [2.0, 20.0]
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 4)).shape == (1, 2)


def test_a_network_that_ends_otherwise_stays_as_it_is() -> None:
    """Without a bias of as many values as there are outputs, there is nothing to set."""
    for network in (nn.Sequential(nn.Linear(4, 1, bias=False)), nn.Linear(4, 3), nn.ReLU()):
        before = [value.clone() for value in network.parameters()]
        start_at_mean(network, np.ones((5, 1), np.float32))
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_people_who_chose_the_epoch_are_not_unseen(corpus: Path, tmp_path: Path) -> None:
    """A store of the validation side's subjects is told as such; test subjects are unseen."""
    with Store(corpus / "store") as store:
        recipe = make_recipe(corpus / "store")
        sides = store.windows(recipe.windows.value, recipe.target_value).split(recipe.split)
    for side, is_seen in (("valid", True), ("test", False)):
        (first, *_) = (name for name in sides[side].index.subjects().values if name is not None)
        again = write_store(tmp_path / side, n_subjects=1, first=int(first))
        assert evaluate(corpus / "training", store=again).within_subject is is_seen
