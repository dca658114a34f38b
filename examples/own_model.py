"""``engram.fit`` with a network of your own: split by subject, scored beside chance, resumed.

A second training is interrupted as if by Ctrl-C. The same call again goes on where it stopped and
ends with the weights of the first one, bit for bit.

Usage: python own_model.py [FOLDER]
"""

from __future__ import annotations

import math
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import engram
from engram.batches import SplitWindows
from engram.preparation.steps import HighPass
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.training.fit import Fitted, Progress
from engram.windows import EventColumn, EventWindows, Side, Split

# Windows of two seconds, from two seconds after the instruction until the eighteenth: nine each.
AT_REST = EventWindows(
    signal="eeg",
    anchor=("instructed_toOpenEyes", "instructed_toCloseEyes"),
    trial_start_offset_s=2.0,
    trial_duration_s=18.0,
    window_size_s=2.0,
)
EYES = EventColumn("description", task="classification")
BY_SUBJECT = Split(test=Side(fraction=0.25), valid=Side(fraction=0.34))
SETTINGS = engram.FitSettings(epochs=5, batch_size=16, memory="2 GB")


class SmallNet(nn.Module):
    """Any module will do that takes (window, channel, time) and gives (window, class)."""

    def __init__(self, n_chans: int, n_outputs: int) -> None:
        super().__init__()
        self.filters = nn.Sequential(nn.BatchNorm1d(n_chans), nn.Conv1d(n_chans, 8, kernel_size=25))
        self.readout = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Tell classes by the power behind each of eight filters."""
        logits: Tensor = self.readout(self.filters(x).square().mean(dim=2).log())
        return logits


def main(folder: Path) -> None:
    """Prepare, split, train, score; again; and again with an interruption."""
    corpus = folder / "corpus"  # here: your BIDS folder
    if not corpus.exists():
        write_hbn(corpus, HbnCorpus(4, ("R1",), n_runs=1, n_trials=2, quirks=frozenset()))

    engram.prepare(corpus, folder / "store", steps=[HighPass(0.5)], memory="2 GB")
    with engram.open(folder / "store") as store:
        windows = store.windows(AT_REST, EYES)
        sides = windows.split(BY_SUBJECT)
        assert sides.n_subjects == {"train": 2, "valid": 1, "test": 1}

        fitted = engram.fit(first_weights(sides), sides, folder / "training", SETTINGS)
        for score in fitted.ledger.scores:
            print(f"{score.side:5} {score.metric:9} {score.value:6.3f}, chance {score.chance:6.3f}")
            assert math.isfinite(score.value)

        again = engram.fit(first_weights(sides), sides, folder / "training", SETTINGS)
        assert again.ledger == fitted.ledger  # finished: returned, not repeated

        resumed = fit_interrupted(sides, folder / "interrupted")
        for weight, same in zip(fitted.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(weight, same)


def first_weights(sides: SplitWindows) -> SmallNet:
    """Build the network; the same seed, the same first weights."""
    torch.manual_seed(0)
    return SmallNet(sides.train.n_chans, sides.train.n_outputs)


def fit_interrupted(sides: SplitWindows, folder: Path) -> Fitted:
    """Train, interrupt it in the third epoch, and go on."""

    def press_ctrl_c(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 1):
            signal.raise_signal(signal.SIGINT)

    try:
        engram.fit(first_weights(sides), sides, folder, SETTINGS, progress=press_ctrl_c)
    except KeyboardInterrupt:
        print("interrupted; a checkpoint was written")
    return engram.fit(first_weights(sides), sides, folder, SETTINGS, progress=tell)


def tell(progress: Progress) -> None:
    """Print what happened, step by step where something did."""
    if progress.message:
        print(progress.message)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
