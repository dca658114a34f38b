"""The recipe: one TOML file that says what a training is made of.

This module decides which fields there are and how a mistake in them is told. The tables
are the values that Python users hand over themselves (``FixedWindows``, ``TimeTo``,
``Split``, ``FitSettings``, ...), so that a recipe and a script say the same in the same
words. A recipe names models by their registered names; nothing in it is executed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engram.errors import InputError
from engram.training.settings import FitSettings, Framing
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.splits import Split
from engram.windows.targets import EventColumn, RecordingColumn, Target, TimeTo

__all__ = ["ModelTable", "Recipe", "TargetTable", "WindowsTable", "mistakes", "read_recipe"]


class _Table(BaseModel):
    """A table of a recipe: every field known, none changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Choice(_Table):
    """A table that holds exactly one of several tables."""

    @model_validator(mode="after")
    def _is_one(self) -> _Choice:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are" if given else "nothing is"
            raise InputError(f"{found} given here. Give exactly one of {', '.join(type(self).model_fields)}.")
        return self

    @property
    def value(self) -> Any:
        """The one that is given."""
        return next(value for name in type(self).model_fields if (value := getattr(self, name)) is not None)


class WindowsTable(_Choice):
    """Which stretches of the recordings are the examples: exactly one of the two."""

    fixed: FixedWindows | None = None
    """Windows of one length, one after another: ``[windows.fixed]``."""
    events: EventWindows | None = None
    """Windows at events: ``[windows.events]``."""


class TargetTable(_Choice):
    """What is predicted: exactly one of the three.

    A signal is predicted from Python, by ``engram.fit``: the networks that a recipe can name give one
    row of outputs per window.
    """

    recording: RecordingColumn | None = None
    """A column of participants.tsv or another descriptive field: ``[target.recording]``."""
    event: EventColumn | None = None
    """A column of the window's own event: ``[target.event]``."""
    time_to: TimeTo | None = None
    """Seconds from the anchor to another event: ``[target.time_to]``."""


class ModelTable(_Table):
    """Which network is trained, and what it is compared with."""

    name: str
    """Class name of a model of braindecode, such as ``"EEGNeX"``, or of Engram's own: ``"BandPowerNet"``,
    ``"MultiScaleNet"``, ``"PatchAttentionNet"``, ``"TimeLocalizer"``."""
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    """Its keyword arguments. Channels, times, rate and outputs are filled in from the windows."""
    baselines: tuple[Literal["ridge"], ...] = ("ridge",)
    """What is fitted and scored beside it."""
    framing: Framing = Field(default_factory=Framing)
    """What stands before and behind it: ``[model.framing]``."""


class Recipe(_Table):
    """Everything that a training is made of.

    Examples
    --------
    >>> import tempfile
    >>> text = '''
    ... store = "store"
    ... [windows.fixed]
    ... signal = "eeg"
    ... window_size_s = 2.0
    ... [target.recording]
    ... column = "age"
    ... [model]
    ... name = "EEGNeX"
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "recipe.toml")
    ...     _ = path.write_text(text)
    ...     recipe = read_recipe(path)
    >>> recipe.model.name, recipe.windows.value.window_size_s, recipe.training.epochs
    ('EEGNeX', 2.0, 10)
    """

    name: str = "training"
    """What the training is called in its ledger and report."""
    store: str
    """Folder of the store; a relative path counts from the recipe's own folder."""
    windows: WindowsTable
    """Which stretches of the recordings are the examples."""
    target: TargetTable
    """What is predicted from each."""
    split: Split = Field(default_factory=Split)
    """Which windows train, which stop the training, and which score it."""
    model: ModelTable
    """The network and its baselines."""
    training: FitSettings = Field(default_factory=FitSettings)
    """How it is trained."""

    @property
    def target_value(self) -> Target:
        """What is predicted, as the windows take it."""
        value: Target = self.target.value
        return value

    def to_dict(self) -> dict[str, Any]:
        """Give every field, defaults included, as plain dicts, lists, text and numbers."""
        content: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return content


def read_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and hold it to the rules.

    Parameters
    ----------
    path
        The TOML file.
    changes
        Fields to set in it by their dotted names: ``{"training.seed": 1}``.

    Raises
    ------
    InputError
        If it cannot be read, or a field is unknown, missing or against its rule; every such
        field is named.

    Examples
    --------
    >>> read_recipe(Path("nowhere.toml"))
    Traceback (most recent call last):
    ...
    engram.errors.InputError: There is no recipe nowhere.toml. Correct the path.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no recipe {path}. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Give a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}. Correct that line.") from error
    for name, value in (changes or {}).items():
        _set(content, name.split("."), value)
    try:
        # By way of JSON, where strictness lets a list be a tuple but no text be a number.
        recipe = Recipe.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise InputError(f"{path}: {mistakes(error)}") from error
    return recipe.model_copy(update={"store": str(path.parent / recipe.store)})


def _set(table: dict[str, Any], names: list[str], value: Any) -> None:
    for depth, name in enumerate(names[:-1], 1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(
                f"{'.'.join(names)} cannot be set: {'.'.join(names[:depth])} is {table!r} and no table. "
                "Correct the name."
            )
    table[names[-1]] = value


def mistakes(error: ValidationError) -> str:
    """Tell every mistake by the field's dotted name, with the value and the remedy."""
    lines = [_line(mistake) for mistake in error.errors(include_url=False)]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} fields are wrong.", *lines])


def _line(mistake: Any) -> str:
    names = [str(name) for name in mistake["loc"]]
    field, kind, value = ".".join(names), mistake["type"], mistake["input"]
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        return f"{field} is no field of a recipe. {_instead(names)}"
    if kind in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        return f"{field} is missing. Add it."
    if kind == "value_error":
        return f"{field}: {mistake['ctx']['error']}"
    if kind == "tuple_type" and isinstance(value, str):
        return f"{field} is {value!r} and has to be a list. Write [{json.dumps(value)}]."
    # What TOML calls a table, JSON calls an object.
    rule = mistake["msg"].replace("Input should be", "has to be", 1).replace("an object", "a table")
    return f"{field} is {value!r} and {rule}."


def _instead(names: list[str]) -> str:
    """Name the fields that the table has, the nearest alone if one is near."""
    known = _fields_at(names[:-1])
    near = get_close_matches(names[-1], known, n=1)
    return f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(known)}, or remove it."


def _fields_at(names: list[str]) -> list[str]:
    """List the fields of the table at a dotted name, by the recipe's own schema."""
    schema = Recipe.model_json_schema()
    table: Mapping[str, Any] = schema
    for name in names:
        inner = table.get("items", {}) if name.isdigit() else table.get("properties", {}).get(name, {})
        table = _resolved(inner, schema)
    return sorted(table.get("properties", {}))


def _resolved(table: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = [choice for choice in table.get("anyOf", ()) if choice.get("type") != "null"]
    if choices:
        table = choices[0]
    reference = table.get("$ref")
    found: Mapping[str, Any] = schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else table
    return found
