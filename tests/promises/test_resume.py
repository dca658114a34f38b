"""A training killed at any moment goes on to the same bytes of weights."""

from __future__ import annotations

import json
import multiprocessing
import random
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engram.ledger import Ledger

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[1] / "training" / "program.py"
SETTINGS = {
    "epochs": 40,
    "batch_size": 8,
    "accumulate": 2,
    "scheduler": "cosine",
    "learning_rate": 0.01,
    "accelerator": "cpu",
    "checkpoint_every_steps": 1,
}
N_KILLS = 20


def train_until(store: Path, folder: Path, n_told: int | None, patience_s: float = 0.0) -> int | None:
    """Train in a process of its own; SIGKILL it some time after it has told of so many steps.

    Returns its exit code. The process comes from a server that has imported PyTorch and Lightning,
    which saves their start in each of twenty; it shares nothing else with the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram.training.fit"])
    told, tell = context.Pipe(duplex=False)
    arguments = [str(store), str(folder), json.dumps(SETTINGS), "-1", "Network", tell]
    process = context.Process(target=runpy.run_path, args=(PROGRAM, {"ARGUMENTS": arguments}, "__main__"))
    process.start()
    tell.close()
    try:
        for _ in range(10**9 if n_told is None else n_told):
            told.recv_bytes()
        process.join(patience_s)
        process.kill()
    except EOFError:  # it ended before
        pass
    process.join()
    told.close()
    code = process.exitcode
    process.close()
    return code


def epochs_of(folder: Path) -> list[Any]:
    """Give what does not depend on the clock."""
    lines = Ledger.read(folder).epochs
    return [(line.epoch, line.train_loss, line.valid_loss, line.learning_rate) for line in lines]


def test_twenty_kills_change_no_byte_of_the_weights(tmp_path: Path) -> None:
    """Each at a random moment of what the one before had left; then the training goes on to its end."""
    program = runpy.run_path(str(PROGRAM))
    program["make_store"](tmp_path / "store").close()
    assert train_until(tmp_path / "store", tmp_path / "whole", None) == 0

    moments = random.Random(0)
    for _ in range(N_KILLS):
        n_told, patience_s = moments.randrange(7), moments.uniform(0, 0.03)
        code = train_until(tmp_path / "store", tmp_path / "parts", n_told, patience_s)
        assert code == -signal.SIGKILL
    assert train_until(tmp_path / "store", tmp_path / "parts", None) == 0

    for name in ("last", "best"):
        whole = program["weights"](tmp_path / "whole", name)
        parts = program["weights"](tmp_path / "parts", name)
        for key, weight in whole.items():
            assert torch.equal(weight, parts[key]), key
    assert epochs_of(tmp_path / "whole") == epochs_of(tmp_path / "parts")
    predictions = [(tmp_path / name / "predictions.parquet").read_bytes() for name in ("whole", "parts")]
    assert predictions[0] == predictions[1]
