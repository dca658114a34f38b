"""The commands on trainings, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import engram
from engram.cli import app
from engram.errors import EngramError
from engram.testing.trials import make_trials
from engram.training.recipe import read_recipe

RECIPE = """
name = "trials"
store = "store"
[windows.events]
signal = "eeg"
anchor = ["square"]
trial_duration_s = 1.0
[target.time_to]
events = ["rt"]
[split]
test = { fraction = 0.25 }
valid = { fraction = 0.34 }
[model]
name = "SCCNet"
arguments = { n_spatial_filters = 2, n_spatial_filters_smooth = 2 }
[training]
epochs = 2
batch_size = 16
accelerator = "cpu"
"""


def run(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def process(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, for exit codes and both streams."""
    command = [sys.executable, "-m", "engram", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a recipe and a training of it."""
    root = tmp_path_factory.mktemp("cli")
    engram.prepare(make_trials(), root / "store", precision="float32").store.close()
    (root / "recipe.toml").write_text(RECIPE)
    result = run("train", root / "recipe.toml", root / "training")
    assert result.exit_code == 0
    (root / "told.txt").write_text(result.stdout)
    return root


def test_training_tells_each_epoch_and_what_it_came_to(folder: Path) -> None:
    """A line per epoch, then windows, memory, and every score beside chance and ridge."""
    told = (folder / "told.txt").read_text()
    line = r"epoch 2/2: loss [\d.]+, validation nrmse [\d.]+, [\d,]+ windows/s, memory [\d.]+ [MG]iB"
    assert re.search(line, told)
    for words in ("train windows", "test windows", "of 2 subjects", "16 no target", "memory at its peak"):
        assert words in told
    rows = [row.split() for row in told.splitlines() if row.strip().startswith("test ")]
    assert {row[2] for row in rows if row[1] == "nrmse"} == {"network", "ridge"}
    assert f"engram report {folder / 'training'}" in told


def test_training_again_says_that_it_is_there(folder: Path) -> None:
    """The same command after the end trains nothing, and shows the same table."""
    again = run("train", folder / "recipe.toml", folder / "training").stdout
    assert "holds this training, finished: all 2 epochs done" in again
    assert "epoch 2/2" not in again
    table = (folder / "told.txt").read_text().partition("what")[2]
    assert again.partition("what")[2] == table


def test_fields_are_set_from_the_command_line(folder: Path) -> None:
    """``--set`` changes fields of the recipe, numbers as numbers and words as text."""
    changes = [
        "training.epochs=1",
        "training.optimizer=adam",
        "split.seed=3",
        'windows.events.anchor=["square"]',
    ]
    options = [word for change in changes for word in ("--set", change)]
    told = json.loads(run("train", folder / "recipe.toml", folder / "set", *options, "--json").stdout)
    assert (told["recipe"]["training"]["epochs"], told["recipe"]["training"]["optimizer"]) == (1, "adam")
    assert told["recipe"]["split"]["seed"] == 3
    assert len(told["epochs"]) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "training.epochs"], "is no change of a field. Write --set training.seed=1."),
        (["--set", "training.epoch=3"], "training.epoch is no field of a recipe. Did you mean epochs?"),
        (["--set", "training.epochs=0"], "epochs=0 is below 1. Use 1 or more."),
        (["--set", "model.name=EEGNeXt"], "Did you mean 'EEGNeX'?"),
        (["--set", "training.seed=9"], "seed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, words: list[str], told: str) -> None:
    """Also another training in a folder that holds one: nothing there is touched."""
    before = (folder / "training" / "ledger.json").read_bytes()
    result = process("train", folder / "recipe.toml", folder / "training", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("engram: ")
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "training" / "ledger.json").read_bytes() == before


@pytest.mark.slow
def test_too_little_memory_is_exit_code_77_and_resumed_with_more(folder: Path) -> None:
    """A training stopped for want of memory goes on by the same command with more of it."""
    words = ("train", folder / "recipe.toml", folder / "small", "--json", "--set")
    stopped = process(*words, "training.memory=200 MB")
    assert stopped.returncode == 77
    assert "allowed 191 MiB" in stopped.stderr
    done = process(*words, "training.memory=4 GB")
    # In a process too: this one may compute with another number of threads, and round otherwise.
    whole = process("train", folder / "recipe.toml", folder / "whole", "--json")
    assert (done.returncode, whole.returncode) == (0, 0)
    scores = [json.loads(told.stdout)["scores"] for told in (done, whole)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["demo", "challenge1", "challenge2"])
def test_a_recipe_to_begin_with_is_shown_or_written(tmp_path: Path, name: str) -> None:
    """Both are the same text, which is a recipe; a file that is there already is left alone."""
    out = tmp_path / "recipe.toml"
    assert f"Wrote {out}" in run("recipe", name, "--out", out).stdout.replace("\n", "")
    assert read_recipe(out).model.name
    assert run("recipe", name).stdout.strip() == out.read_text().strip()
    out.write_text("mine")
    refused = process("recipe", name, "--out", out)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is there already" in refused.stderr
    assert out.read_text() == "mine"
    assert "There is no folder" in process("recipe", name, "--out", tmp_path / "nowhere" / "x.toml").stderr


def test_evaluating_and_predicting(folder: Path) -> None:
    """``evaluate`` shows scores beside chance, ``predict`` writes a row per window."""
    shown = run("evaluate", folder / "training", "--side", "valid").stdout
    assert "valid" in shown
    assert "left out, no target: 16" in shown
    scores = json.loads(run("evaluate", folder / "training", "--json").stdout)["scores"]
    assert {score["side"] for score in scores} == {"test"}

    out = folder / "predictions.parquet"
    assert "160 windows predicted" in run("predict", folder / "training", folder / "store", out).stdout
    assert pq.read_table(out).num_rows == 160


def test_subjects_that_were_trained_on_are_told(folder: Path) -> None:
    """A score of the training side is no score of unseen people, and says so."""
    assert "say nothing about unseen people" in run("evaluate", folder / "training", "--side", "train").stdout
    assert "unseen people" not in run("evaluate", folder / "training").stdout


def test_a_report_is_one_file(folder: Path) -> None:
    """``engram report`` writes the page where it is told, of one training or several."""
    out = folder / "page.html"
    assert f"Open {out}" in run("report", folder / "training", "--out", out).stdout
    assert "trials" in out.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "training", "--out", "."], ". is a folder. Name a file in it: report.html."),
        (["predict", "training", "store", "."], ". is a folder. Name a file in it: predictions.parquet."),
        (["report", "training", "--out", "recipe.toml/x.html"], "recipe.toml cannot be written: "),
        (["predict", "training", "store", "nowhere/x.parquet"], "nowhere cannot be written: "),
    ],
)
def test_where_nothing_can_be_written_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    """A page or table that has no place is a message, not a traceback."""
    monkeypatch.chdir(folder)
    with pytest.raises(EngramError) as refused:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert str(refused.value).startswith(told)


def test_the_demo_is_the_whole_job(tmp_path: Path) -> None:
    """From nothing to a page: the table has store, windows, memory, speed, score, chance and ridge."""
    result = process("demo", tmp_path / "demo", "--subjects", 2, "--seeds", 2)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    for words in (
        "store",
        "windows/s",
        "memory at its peak",
        "test nRMSE on 1 unseen subject",
        "chance",
        "ridge",
    ):
        assert words in result.stdout
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
    assert (tmp_path / "demo" / "recipe.toml").exists()
