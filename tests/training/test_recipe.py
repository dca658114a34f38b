from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from engram.errors import InputError
from engram.training.recipe import Recipe, read_recipe
from engram.training.settings import FitSettings
from engram.windows.spec import EventWindows, Span
from engram.windows.splits import Side, Split
from engram.windows.targets import TimeTo

TEXT = """
name = "response time"
store = "store"

[windows.events]
signal = "eeg"
anchor = ["left_target", "right_target"]
trial_start_offset_s = 0.5
trial_duration_s = 2
where = { task = ["contrastChangeDetection"] }
beside = [{ signal = "stim", offset_samples = -32, window_size_samples = 33 }]

[target.time_to]
events = ["left_buttonPress", "right_buttonPress"]

[split]
test = { by = "release", values = ["R2"] }
valid = { fraction = 0.25 }

[model]
name = "EEGNeX"
arguments = { drop_prob = 0.3 }

[training]
epochs = 3
memory = "500 MB"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe that is right."""
    file = tmp_path / "recipe.toml"
    file.write_text(TEXT)
    return file


def told(path: Path, changes: dict[str, Any]) -> str:
    """Return what is said about a recipe with changes, without its path."""
    with pytest.raises(InputError) as caught:
        read_recipe(path, changes)
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_tables_become_the_values_that_python_users_write(path: Path) -> None:
    """A recipe and a script say the same with the same values."""
    recipe = read_recipe(path)
    assert recipe.windows.value == EventWindows(
        signal="eeg",
        anchor=("left_target", "right_target"),
        trial_start_offset_s=0.5,
        trial_duration_s=2.0,
        where={"task": ("contrastChangeDetection",)},
        beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
    )
    assert recipe.target_value == TimeTo(("left_buttonPress", "right_buttonPress"))
    assert recipe.split == Split(test=Side(by="release", values=("R2",)), valid=Side(fraction=0.25))
    assert recipe.training == FitSettings(epochs=3, memory="500 MB")


def test_the_store_is_found_beside_the_recipe(path: Path) -> None:
    """A relative path of a store counts from the recipe's folder, an absolute one stays."""
    assert read_recipe(path).store == str(path.parent / "store")
    assert read_recipe(path, {"store": "/data/store"}).store == "/data/store"


def test_what_a_recipe_holds_can_be_read_as_one_again(path: Path) -> None:
    """``to_dict`` gives every field; read again it is the same recipe."""
    recipe = read_recipe(path)
    content = recipe.to_dict()
    assert content["training"]["batch_size"] == 64
    assert Recipe.model_validate(content) == recipe


def test_changes_replace_fields_by_their_dotted_names(path: Path) -> None:
    """A change sets one field, also in a table that the file does not have."""
    recipe = read_recipe(path, {"training.seed": 4, "split.seed": 5, "model.arguments.drop_prob": 0.1})
    assert (recipe.training.seed, recipe.split.seed, recipe.model.arguments) == (4, 5, {"drop_prob": 0.1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nme": 1}, "nme is no field of a recipe. Did you mean name?"),
        (
            {"training.learnig_rate": 1.0},
            "training.learnig_rate is no field of a recipe. Did you mean learning_rate?",
        ),
        (
            {"model.colour": 1},
            (
                "model.colour is no field of a recipe. "
                "Use one of arguments, baselines, framing, name, or remove it."
            ),
        ),
        (
            {"windows.events.beside": [{"signal": "x", "offst": 1}]},
            "windows.events.beside.0.offst is no field of a recipe. Did you mean offset_s?",
        ),
        ({"model": {}}, "model.name is missing. Add it."),
        (
            {"windows.events.anchor": "square"},
            "windows.events.anchor is 'square' and has to be a list. Write [\"square\"].",
        ),
        ({"training.epochs": "3"}, "training.epochs is '3' and has to be a valid integer."),
        ({"model": 3}, "model is 3 and has to be a table."),
        ({"training.epochs": 0}, "training: epochs=0 is below 1. Use 1 or more."),
        (
            {"target": {}},
            "target: nothing is given here. Give exactly one of recording, event, time_to.",
        ),
        (
            {"windows.fixed": {"signal": "eeg"}},
            "windows: fixed and events are given here. Give exactly one of fixed, events.",
        ),
    ],
)
def test_a_mistake_is_told_by_field_and_remedy(path: Path, changes: dict[str, Any], words: str) -> None:
    """A field that is unknown, missing or against its rule is named with the value and what to do."""
    assert told(path, changes) == words


def test_all_mistakes_are_told_at_once(path: Path) -> None:
    """Two mistakes are two lines of one error."""
    text = told(path, {"nme": 1, "training.epochs": 0})
    assert text.startswith("2 fields are wrong.\n")
    assert "nme" in text
    assert "epochs" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"store = ", "is not TOML"), (b"\xff", "cannot be read"), (b"", "store is missing")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """Broken TOML, other bytes and an empty file are input errors."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_recipe(path)


def test_every_field_is_documented() -> None:
    """The schema that editors read has a sentence for every field of the recipe's own tables."""
    schema = Recipe.model_json_schema()
    for table in (schema, *(schema["$defs"][name] for name in ("WindowsTable", "TargetTable", "ModelTable"))):
        for name, field in table["properties"].items():
            assert field.get("description"), name


def test_a_recipe_is_data(path: Path) -> None:
    """Text in a recipe stays text: TOML has no code, and no field is looked up as such."""
    recipe = read_recipe(path, {"name": "__import__('os').system('true')", "model.name": "os.system"})
    assert recipe.name == "__import__('os').system('true')"
    assert tomllib.loads(TEXT)["model"]["name"] == "EEGNeX"


def test_a_change_below_what_is_no_table_is_refused(path: Path) -> None:
    """The name that leads nowhere is told with what is there."""
    with pytest.raises(InputError, match=r"store\.x cannot be set: store is 'store' and no table"):
        read_recipe(path, {"store.x": 1})
