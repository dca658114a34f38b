from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InputError
from engram.ledger import LEDGER, EpochLine, Ledger, MemoryLine, Score, SideLine

LINES = (EpochLine, MemoryLine, SideLine, Score)

FULL = Ledger(
    name="demo",
    task="classification",
    main_metric="balanced_accuracy",
    recipe={"training": {"epochs": 3, "betas": [0.9, 0.999], "by": None}},
    versions={"engram": "0.1"},
    machine={"n_cores": 2},
    data={"fingerprint": "00ff", "refusals": {"gap": 3}},
    sides=(SideLine("train", 40, 4, 2), SideLine("test", 20, 2, 1)),
    within_subject=True,
    classes=("left", "right"),
    epochs=(
        EpochLine(0, math.nan, None, None, 1.5, 20.0, 1e-3),
        EpochLine(1, 0.5, 0.7, 0.6, 1.5, 20.0, 1e-3),
    ),
    memory=(MemoryLine(0.0, 0, 1 << 30), MemoryLine(2.5, 10, 2 << 30, 5)),
    peak_bytes=2 << 30,
    allowed_bytes=4 << 30,
    scores=(Score("network", "test", "pearson_r", math.nan, -math.inf, True, 20),),
    best_epoch=1,
    n_parameters=1234,
    duration_s=3.0,
    stopped="all epochs done",
    notes=("short recordings",),
)


def fields_of(kind: type) -> dict[str, str]:
    """Name the fields of a dataclass with their annotations."""
    return {each.name: str(each.type) for each in dataclasses.fields(kind)}


# Lone surrogates are what Python makes of a file name that is not valid UTF-8.
texts = st.text(st.characters(exclude_categories=()), max_size=8)
wholes = st.integers(-(2**63) + 1, 2**63 - 1)
reals = st.floats(allow_nan=True, allow_infinity=True)
plain = st.recursive(
    st.none() | st.booleans() | wholes | reals | texts,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(texts, each, max_size=3),
    max_leaves=6,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": wholes,
    "float": reals,
    "float | None": st.none() | reals,
    "int | None": st.none() | wholes,
    "str": texts,
    "bool": st.booleans(),
    "tuple[str, ...]": st.lists(texts, max_size=3).map(tuple),
    "Mapping[str, str]": st.dictionaries(texts, texts, max_size=3),
    "Mapping[str, Any]": st.dictionaries(texts, plain, max_size=3),
}
for line in LINES:
    VALUES[f"tuple[{line.__name__}, ...]"] = st.lists(
        st.builds(line, **{name: VALUES[kind] for name, kind in fields_of(line).items()}), max_size=3
    ).map(tuple)
ledgers = st.builds(Ledger, **{name: VALUES[kind] for name, kind in fields_of(Ledger).items()})


@given(ledgers)
def test_a_ledger_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, ledger: Ledger) -> None:
    """Whatever a ledger holds, NaN, infinity and undecodable names among it, survives the file."""
    folder = tmp_path_factory.mktemp("training")
    ledger.write(folder)
    # Compared by their text: NaN does not equal itself, and -0.0 equals 0.0.
    assert repr(Ledger.read(folder)) == repr(ledger)


@given(ledgers)
def test_a_ledger_is_json_for_everybody(ledger: Ledger) -> None:
    """Its text is strict JSON, without the NaN and Infinity that only some parsers know."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(json.dumps(ledger.to_dict(), allow_nan=False), parse_constant=refuse)


def test_the_speed_is_that_of_all_epochs_together() -> None:
    """A slow epoch counts by its time, and without epochs there is no speed."""
    epochs = (
        EpochLine(0, 1.0, None, None, 1.0, 300.0, 1e-3),
        EpochLine(1, 1.0, None, None, 3.0, 100.0, 1e-3),
    )
    assert dataclasses.replace(FULL, epochs=epochs).windows_per_s == 150.0
    assert math.isnan(dataclasses.replace(FULL, epochs=()).windows_per_s)


def test_numbers_of_numpy_become_numbers() -> None:
    """What a training computes is NumPy's more often than Python's."""
    numbers: Any = (np.int64(0), np.float32(0.5), None, np.float64("nan"), np.float64(2), np.float32(8), 1e-3)
    epoch = EpochLine(*numbers)
    ledger = Ledger("demo", "regression", "nrmse", recipe={"lr": np.float32(0.5), "n": (np.int64(3),)})
    ledger = dataclasses.replace(ledger, epochs=(epoch,), within_subject=numbers[1] > 0)

    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))

    assert again.recipe == ledger.recipe == {"lr": 0.5, "n": [3]}
    assert again.epochs[0].train_loss == 0.5
    assert again.within_subject is True


@pytest.mark.parametrize("value", [Path("store"), {1, 2}, b"bytes", np.zeros(3), object()])
def test_what_json_does_not_know_is_refused_at_once(value: object) -> None:
    """The error comes when the ledger is built, with the place, and not when a training ends."""
    with pytest.raises(InputError, match=r"recipe\.windows\[1\]\.x is of type"):
        Ledger("demo", "regression", "nrmse", recipe={"windows": [0, {"x": value}]})


def test_a_failed_write_leaves_the_old_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk costs the new ledger only, and leaves no half file behind."""
    FULL.write(tmp_path)
    before = (tmp_path / LEDGER).read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(FULL, name="another").write(tmp_path)

    assert (tmp_path / LEDGER).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LEDGER]


def test_a_folder_without_a_ledger_is_named(tmp_path: Path) -> None:
    """Whoever names the wrong folder, or a file, is told so."""
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match=r"holds no ledger\.json"):
            Ledger.read(folder)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_version_is_refused_by_name(version: object) -> None:
    """The message names both versions."""
    with pytest.raises(InputError, match=f"version {version!r}, this Engram reads 1"):
        Ledger.from_dict({**FULL.to_dict(), "version": version})


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Give the dict of a full ledger with one change."""
    content: dict[str, Any] = json.loads(json.dumps(FULL.to_dict()))
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), "The ledger has a field 'colour'"),
        (lambda c: c["scores"][0].update(colour="red"), r"scores\[0\] has a field 'colour'"),
        (lambda c: c.pop("name"), "The ledger lacks its field 'name'"),
        (lambda c: c["epochs"][1].pop("epoch"), r"epochs\[1\] lacks its field 'epoch'"),
        (lambda c: c.update(name=7), "name is 7, not of the kind str"),
        (lambda c: c.update(peak_bytes=1.5), "peak_bytes is 1.5, not of the kind int"),
        (lambda c: c.update(peak_bytes=True), "peak_bytes is True, not of the kind int"),
        (lambda c: c.update(peak_bytes=10**400), "peak_bytes is 1000.* not of the kind int"),
        (lambda c: c.update(duration_s=10**400), "duration_s is 1000.* not of the kind float"),
        (lambda c: c.update(duration_s=None), "duration_s is None, not of the kind float"),
        (lambda c: c.update(epochs={}), r"epochs is {}, not of the kind tuple\[EpochLine, ...\]"),
        (lambda c: c.update(epochs=[3]), r"epochs\[0\] is 3, not of the kind EpochLine"),
        (lambda c: c.update(classes="ab"), "classes is 'ab', not of the kind tuple"),
        (lambda c: c.update(classes=[1]), r"classes\[0\] is 1, not of the kind str"),
        (lambda c: c["versions"].update(engram=1), r"versions\.engram is 1, not of the kind str"),
        (lambda c: c.update(recipe=[]), r"recipe is \[\], not of the kind Mapping"),
        (lambda c: c["memory"][1].update(step="x" * 999), r"memory\[1\]\.step is 'x{39} \.\.\."),
    ],
)
def test_a_ledger_changed_by_hand_is_refused_with_the_field(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    """The message names the file, the field, its value and what it should be."""
    (tmp_path / LEDGER).write_text(json.dumps(changed(change)), encoding="utf-8")
    with pytest.raises(InputError, match=rf"ledger\.json: {message}"):
        Ledger.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", '"text"', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
def test_a_file_that_is_no_ledger_is_refused(text: str, tmp_path: Path) -> None:
    """However it is damaged, the error is one that names the file."""
    (tmp_path / LEDGER).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"ledger\.json"):
        Ledger.read(tmp_path)


def test_every_cut_of_a_ledger_is_refused(tmp_path: Path) -> None:
    """A prefix of a ledger is no ledger, and bytes that are no text are none either."""
    whole = FULL.write(tmp_path).read_bytes()
    for damaged in (*(whole[:length] for length in range(0, len(whole), 7)), b"\xff\xfe" + whole):
        (tmp_path / LEDGER).write_bytes(damaged)
        with pytest.raises(InputError):
            Ledger.read(tmp_path)


def test_a_file_too_large_for_a_ledger_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size alone refuses it: reading a stranger's gigabytes would take ten times as much memory."""
    with (tmp_path / LEDGER).open("wb") as file:
        file.truncate(64 * 1000**2 + 1)
    monkeypatch.delattr(json, "loads")
    with pytest.raises(InputError, match="64000001 bytes"):
        Ledger.read(tmp_path)


def test_a_training_that_has_not_ended_is_told_from_a_folder_of_another_kind(tmp_path: Path) -> None:
    """Checkpoints without a ledger are a training to go on with."""
    with pytest.raises(InputError, match="Name the folder of a training"):
        Ledger.read(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has not ended"):
        Ledger.read(tmp_path)
