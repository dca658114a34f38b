"""Training within a memory limit that the kernel enforces, with two meters."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engram
from engram.ledger import Ledger
from engram.testing.cgroup import LimitedRun, cgroup_unavailable, limited

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cgroup_unavailable() is not None, reason=f"no memory limit: {cgroup_unavailable()}"),
]

MB = 1_000_000
SHARE = 0.8
"""Of the limit: where a training stops itself unless it is told otherwise."""

RECIPE = """
store = "store"

[windows.fixed]
signal = "eeg"
window_size_s = 4.0

[target.recording]
column = "age"

[split]
test = { values = ["s00"] }

[model]
name = "SCCNet"
arguments = { n_spatial_filters = 4, n_spatial_filters_smooth = 4 }

[training]
epochs = 1
batch_size = 32
accelerator = "cpu"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside its store of 68 recordings: 877 MB, 8,500 windows."""
    folder = tmp_path_factory.mktemp("recipe")
    noise = np.random.default_rng(0).normal(0, 10, (50_000, 129)).astype("float32")
    recordings = {
        f"r{i:02}": engram.ArrayRecording(
            {"eeg": engram.ArraySignal(noise, 100.0)}, fields={"subject": f"s{i:02}", "age": 5.0 + i}
        )
        for i in range(68)
    }
    engram.prepare(engram.ArraySource(recordings), folder / "store").store.close()
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def train(recipe: Path, folder: Path, limit_bytes: int, changes: tuple[str, ...] = ()) -> LimitedRun:
    """Run the command line under a real limit, as a user would."""
    command = [sys.executable, "-m", "engram", "train", str(recipe), str(folder)]
    options = [text for change in changes for text in ("--set", change)]
    return limited([*command, *options], limit_bytes, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_an_epoch_of_a_store_larger_than_the_limit_is_trained_within_it(recipe: Path, tmp_path: Path) -> None:
    """Both meters, the kernel's and our own, stay below the share of it, the libraries included.

    And both see what a step holds for a moment: 53 MB on a processor where oneDNN lays each of the 129
    channels out eightfold, nothing on others.
    """
    limit_bytes = 680 * MB
    run = train(recipe, tmp_path, limit_bytes)
    assert run.returncode == 0, run.stderr
    ledger = Ledger.read(tmp_path)

    assert ledger.data["store_bytes"] > limit_bytes
    before_bytes = ledger.memory[0].used_bytes
    assert ledger.data["store_bytes"] > 3 * (limit_bytes - before_bytes)  # of what the libraries leave
    assert sum(side.n_windows for side in ledger.sides) == 68 * 125
    assert not run.oom_killed
    assert run.peak_unreclaimable_bytes <= SHARE * limit_bytes
    assert ledger.peak_bytes <= ledger.allowed_bytes <= SHARE * limit_bytes
    assert ledger.peak_bytes == pytest.approx(run.peak_unreclaimable_bytes, rel=0.05)


LARGE = (
    "model.name=Deep4Net",
    "model.arguments={n_filters_time=4,n_filters_spat=4,n_filters_2=8,n_filters_3=500,n_filters_4=1000}",
    "model.baselines=[]",
    "windows.fixed.where={subject=['s00','s01','s02']}",
    "windows.fixed.window_size_s=5.0",
    "windows.fixed.stop_offset_s=240",
    "training.batch_size=8",
    "training.memory_every_steps=5",
)
"""A network of 4.6 million weights: the first step brings gradients and what Adam remembers of them."""


def test_a_limit_too_small_stops_with_77_and_a_larger_one_ends_with_the_same_weights(
    recipe: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch, by the very same command, as if the training had never been broken off."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = train(recipe, whole, 1500 * MB, LARGE)
    assert run.returncode == 0, run.stderr
    ledger = Ledger.read(whole)
    # How much the libraries take differs between machines: the limit lies between what this one
    # needed before the first step and what it needed from then on.
    before_bytes = max(line.used_bytes for line in ledger.memory if line.step == 0)
    after_bytes = min(line.used_bytes for line in ledger.memory if line.step > 0)
    assert after_bytes - before_bytes > 40 * MB
    too_small_bytes = int((before_bytes + after_bytes) / 2 / SHARE)

    stopped = train(recipe, parts, too_small_bytes, LARGE)
    assert stopped.returncode == 77, stopped.stderr
    assert not stopped.oom_killed
    assert "after optimizer step 5, in epoch 1" in stopped.stderr
    assert "train in the same folder again under a larger limit" in stopped.stderr
    assert not (parts / "ledger.json").exists()
    resumed = train(recipe, parts, 1500 * MB, LARGE)
    assert resumed.returncode == 0, resumed.stderr

    assert "resumed" in resumed.stdout
    for name in ("last", "best"):
        expected, found = (weights(folder, name) for folder in (whole, parts))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read a network's weights from a checkpoint."""
    content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    found: dict[str, torch.Tensor] = content["model"]
    return found
