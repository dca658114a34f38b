"""The ledger: what a training was told, what it took, and how well it did.

Every training leaves one ``ledger.json`` and one ``predictions.parquet`` in its folder.
This module decides what is in them; ``engram.training`` writes, ``engram.report`` reads.
A ledger is data: numbers and text, nothing that is executed or unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from engram.atomic import replacing
from engram.errors import InputError

__all__ = [
    "LEDGER",
    "PREDICTIONS",
    "EpochLine",
    "Ledger",
    "MemoryLine",
    "Score",
    "SideLine",
]

LEDGER = "ledger.json"
"""Name of the ledger in a training's folder."""

PREDICTIONS = "predictions.parquet"
"""Name of the table of predictions beside it: side, window, recording, subject, anchor_s, then
``target`` and ``prediction`` (regression, one column each; ``target_1``, ... for further outputs)
or ``target``, ``prediction`` and ``p_<class>`` (classification)."""

_VERSION = 1

# Ten thousand epochs and some thousand lines of memory are 3 MB. A larger file is no ledger,
# and parsing it would take ten times its size in memory.
_LARGEST_BYTES = 64 * 1000**2


@dataclass(frozen=True, slots=True)
class EpochLine:
    """One pass over the training windows."""

    epoch: int
    """From 0."""
    train_loss: float
    """Mean loss over the epoch's windows, as trained: with dropout, without the penalty."""
    valid_loss: float | None
    """Mean loss over the validation windows, or None without validation."""
    valid_score: float | None
    """The metric that is reported, on the validation windows."""
    duration_s: float
    """Wall time of the training steps, without validation."""
    windows_per_s: float
    """Windows trained per second of that time."""
    learning_rate: float
    """Of the first group of parameters, at the epoch's end."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """Memory at one moment of a training, and since the line before it."""

    time_s: float
    """Since the training began, resumed parts added up."""
    step: int
    """Optimizer steps done."""
    used_bytes: int
    """Unreclaimable memory of the process tree: the most that was seen since the line before."""
    device_bytes: int = 0
    """Memory reserved on the GPU; 0 without one."""


@dataclass(frozen=True, slots=True)
class SideLine:
    """One side of the split."""

    side: str
    """``"train"``, ``"valid"`` or ``"test"``."""
    n_windows: int
    """Windows on this side."""
    n_recordings: int
    """Recordings they come from."""
    n_subjects: int
    """Subjects they come from."""


@dataclass(frozen=True, slots=True)
class Score:
    """One figure beside the figure of chance."""

    model: str
    """``"network"``, ``"ridge"``, ..."""
    side: str
    """``"valid"`` or ``"test"``."""
    metric: str
    """``"nrmse"``, ``"pearson_r"``, ``"balanced_accuracy"``, ..."""
    value: float
    """The score; NaN where it is not defined."""
    chance: float
    """What a predictor that ignores the recordings gets."""
    higher_is_better: bool
    """Which way is up."""
    n_windows: int
    """Windows it was computed on."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything that is kept of one training.

    The four mappings hold what JSON knows: numbers, text, booleans, None, lists and mappings
    with text as keys. NumPy's numbers become Python's, tuples lists, and a number that is not
    finite becomes text (``"nan"``), here already, so that a ledger equals what is read back.

    Raises
    ------
    InputError
        If a mapping holds anything else.

    Examples
    --------
    >>> ledger = Ledger(name="demo", task="regression", main_metric="nrmse")
    >>> Ledger.from_dict(ledger.to_dict()) == ledger
    True
    """

    name: str
    """What its maker calls it."""
    task: str
    """``"regression"`` or ``"classification"``."""
    main_metric: str
    """The metric that the training is judged by."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Every setting, defaults included."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of engram, Python and the libraries that computed."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Cores, accelerator and the memory limit that bound."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The store's size and recordings, the windows' fingerprint, and how many were refused for
    what. A mapping from reason to count is shown as a table (``"refused"``, ``"unused"``)."""
    sides: tuple[SideLine, ...] = ()
    """The sides of the split."""
    within_subject: bool = False
    """True if subjects are on two sides: the score then says nothing about unseen people."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty for regression."""
    epochs: tuple[EpochLine, ...] = ()
    """One line per epoch."""
    memory: tuple[MemoryLine, ...] = ()
    """Memory over time, thinned to at most a few thousand lines."""
    peak_bytes: int = 0
    """Most unreclaimable memory that was seen."""
    allowed_bytes: int = 0
    """Memory at which the training would have stopped itself."""
    scores: tuple[Score, ...] = ()
    """Scores of the network and of the baselines."""
    best_epoch: int | None = None
    """The epoch whose weights were scored."""
    n_parameters: int = 0
    """Trainable parameters of the network."""
    duration_s: float = 0.0
    """Wall time, resumed parts added up."""
    stopped: str = ""
    """Why it ended, in words: all epochs done, early stopping, ..."""
    notes: tuple[str, ...] = ()
    """What a reader has to know beside the figures."""

    def __post_init__(self) -> None:
        for name in ("recipe", "versions", "machine", "data"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))

    @property
    def windows_per_s(self) -> float:
        """Windows trained per second of all epochs together; NaN without epochs."""
        duration_s = sum(line.duration_s for line in self.epochs)
        n_windows = sum(line.duration_s * line.windows_per_s for line in self.epochs)
        return n_windows / duration_s if duration_s > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Give plain dicts, lists, numbers and text, the version among them."""
        return {"version": _VERSION, **_plain(asdict(self), "ledger")}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a ledger from ``to_dict``.

        Raises
        ------
        InputError
            If it is of another version, or a field is unknown, missing or of another type.
        """
        if content.get("version") != _VERSION:
            raise InputError(
                f"This ledger has version {content.get('version')!r}, this Engram reads {_VERSION}. "
                "Use the Engram that wrote it."
            )
        values = {name: value for name, value in content.items() if name != "version"}
        return cls(**_checked(cls, values))

    def write(self, folder: Path) -> Path:
        """Write ``ledger.json`` into a folder, whole or not at all.

        Returns
        -------
        Path
            The file.
        """
        # Escaped to ASCII: a name that the file system could not decode is text with lone
        # surrogates, which UTF-8 refuses and JSON's escapes carry.
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        path = folder / LEDGER
        with replacing(path) as file:
            file.write(text.encode("ascii"))
        return path

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the ledger of a training's folder.

        Raises
        ------
        InputError
            If there is none, or it cannot be understood.
        """
        path = folder / LEDGER
        if not path.is_file():
            if (folder / "checkpoints").is_dir():
                raise InputError(
                    f"The training in {folder} has not ended. Train in the same folder again."
                ) from None
            raise InputError(f"{folder} holds no {LEDGER}. Name the folder of a training.")
        if (n_bytes := path.stat().st_size) > _LARGEST_BYTES:
            raise InputError(
                f"{path} has {n_bytes} bytes, a ledger has at most {_LARGEST_BYTES}. Restore it."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}. Restore it, or train again.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} is no ledger. Restore it, or train again.")
        try:
            return cls.from_dict(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

_LINES: Mapping[str, type] = {line.__name__: line for line in (EpochLine, MemoryLine, SideLine, Score)}

# A field's annotation, and what JSON gives for it.
_TYPES: Mapping[str, type] = {"str": str, "bool": bool, "Any": object}


def _plain(value: Any, where: str) -> Any:
    """Turn tuples to lists, NumPy's numbers to Python's, and numbers that JSON lacks to text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(
        f"{where} is of type {type(value).__name__}; a ledger holds numbers, text, lists and mappings. "
        "Give it as text."
    )


def _checked(kind: type, content: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Check the fields of a ledger or of one of its lines, each by its annotation."""
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(set(content) - set(known)):
        raise InputError(
            f"{where or 'The ledger'} has a field {_short(unknown[0])} that is not known. Restore the file."
        )
    required = {name for name, each in known.items() if _is_required(each)}
    if missing := sorted(required - set(content)):
        raise InputError(f"{where or 'The ledger'} lacks its field {missing[0]!r}. Restore the file.")
    prefix = f"{where}." if where else ""
    return {name: _value(str(known[name].type), value, prefix + name) for name, value in content.items()}


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _value(kind: str, value: Any, where: str) -> Any:
    """Check one value against an annotation, and turn text for numbers that JSON lacks back."""
    kind, _, none = kind.partition(" | ")
    if none and value is None:
        return None
    if kind.startswith("tuple["):
        if isinstance(value, list):
            inner = kind.removeprefix("tuple[").removesuffix(", ...]")
            return tuple(_value(inner, each, f"{where}[{i}]") for i, each in enumerate(value))
    elif kind.startswith("Mapping[str, "):
        if isinstance(value, dict):
            inner = kind.removeprefix("Mapping[str, ").removesuffix("]")
            return {key: _value(inner, each, f"{where}.{key}") for key, each in value.items()}
    elif kind in _LINES:
        if isinstance(value, dict):
            return _LINES[kind](**_checked(_LINES[kind], value, where))
    elif kind == "float" and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    elif kind in {"int", "float"}:
        # JSON's integers have no bounds; beyond 64 bits they cannot even be shown as a float.
        if (type(value) is int and abs(value) < 2**63) or (type(value) is float and kind == "float"):
            return value
    elif isinstance(value, _TYPES[kind]):
        return value
    raise InputError(f"{where} is {_short(value)}, not of the kind {kind}. Restore the file.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."
