"""A small training that the tests break off: a store, its sides, and networks that draw random numbers.

Loaded by path from the tests, and a program of its own where real processes are killed:
``python program.py STORE FOLDER SETTINGS [KILL_AT [NETWORK]]``, the settings as JSON; or by
``runpy.run_path`` with the same and a pipe as ``ARGUMENTS``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import engram
from engram.batches.windows import SplitWindows
from engram.store.reader import Store
from engram.training.fit import Fitted, fit
from engram.training.settings import FitSettings
from engram.windows.spec import FixedWindows
from engram.windows.splits import Side, Split
from engram.windows.targets import RecordingColumn

SPEC = FixedWindows(signal="eeg", window_size_s=0.5)


def make_store(path: Path, *, n_recordings: int = 8, n_samples: int = 500) -> Store:
    """Prepare recordings of 4 channels at 100 Hz, of one subject each, whose age is their amplitude."""
    rng = np.random.default_rng(0)
    recordings = {}
    for number in range(n_recordings):
        eeg = engram.ArraySignal(rng.normal(0, 5 + number, (n_samples, 4)).astype("float32"), 100.0)
        fields: dict[str, Any] = {
            "subject": f"s{number}",
            "age": 5.0 + number,
            "group": "old" if number % 2 else "young",
        }
        recordings[f"r{number}"] = engram.ArrayRecording({"eeg": eeg}, fields=fields)
    return engram.prepare(engram.ArraySource(recordings), path).store


def make_sides(store: Store, target: Any = None, *, valid: bool = True) -> SplitWindows:
    """Split so that the last two subjects are tested, the two before validate, the others train."""
    windows = store.windows(SPEC, RecordingColumn("age") if target is None else target)
    return windows.split(
        Split(test=Side(values=("s6", "s7")), valid=Side(values=("s4", "s5")) if valid else None)
    )


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and what was not on disk is lost."""


class Network(nn.Module):
    """BatchNorm, dropout by PyTorch, noise by NumPy: everything that a resumed training could get wrong."""

    def __init__(self, n_outputs: int = 1, kill_at: int = -1, *, by_signal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv1d(4, 6, 5)
        self.norm = nn.BatchNorm1d(6)
        self.readout = nn.Linear(6, n_outputs)
        self.kill_at, self.by_signal, self.n_calls = kill_at, by_signal, 0

    def forward(self, x: Tensor) -> Tensor:
        """Map (window, channel, time) to (window, output); die at the call asked for."""
        if self.n_calls == self.kill_at:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed
        self.n_calls += 1
        hidden = nn.functional.dropout(self.norm(self.convolution(x)).relu(), 0.3, self.training)
        if self.training:
            hidden = hidden * float(np.random.uniform(0.9, 1.1))  # noqa: NPY002 - the global generator on purpose
        out: Tensor = self.readout(hidden.square().mean(2))
        return out


class Plain(nn.Module):
    """Nothing that depends on which windows are in a batch together, and nothing random."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.hidden, self.readout = nn.Linear(200, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (window, channel, time) to (window, 1)."""
        out: Tensor = self.readout(self.hidden(x.flatten(1)).tanh())
        return out


def train(sides: SplitWindows, folder: Path, kill_at: int = -1, **settings: Any) -> Fitted:
    """Train the network in 3 epochs of 5 batches, unless the settings say otherwise."""
    defaults: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "accelerator": "cpu",
        "checkpoint_every_steps": 1,
        "learning_rate": 1e-2,
    }
    n_outputs = len(sides.train.classes) or 1
    return fit(Network(n_outputs, kill_at), sides, folder, FitSettings(**{**defaults, **settings}))


def weights(folder: Path, name: str = "last") -> dict[str, Tensor]:
    """Read the weights, and the losses of the epochs, from a training's checkpoint."""
    content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    found: dict[str, Tensor] = content["model"]
    return found


def main(
    store_path: str,
    folder: str,
    settings: str,
    kill_at: str = "-1",
    network: str = "Network",
    told: Connection | None = None,
) -> None:
    """Train once in this process; die by SIGKILL at a call of the network, or tell of every step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = engram.open(store_path)
    model = Plain() if network == "Plain" else Network(kill_at=int(kill_at), by_signal=True)
    tell = None if told is None else lambda _: told.send_bytes(b".")
    fit(model, make_sides(store), folder, FitSettings(**json.loads(settings)), progress=tell)
    store.close()


if __name__ == "__main__":
    main(*globals().get("ARGUMENTS", sys.argv[1:]))
