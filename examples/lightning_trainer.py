"""Your own LightningModule and Lightning's Trainer, with Engram's loaders.

A loader has a state, which Lightning keeps in its checkpoints: a training that goes on from one
written in the middle of an epoch ends with the same weights, bit for bit.

Usage: python lightning_trainer.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import engram
from engram.batches import Batch, SplitWindows
from engram.preparation.steps import HighPass
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.windows import EventWindows, Side, Split, TimeTo

AFTER_TARGET = EventWindows(
    signal="eeg",
    anchor=("left_target", "right_target"),
    trial_start_offset_s=0.5,
    trial_duration_s=2.0,
)
RESPONSE_TIME = TimeTo(("left_buttonPress", "right_buttonPress"))


class ResponseTimes(LightningModule):
    """Predicts response times."""

    def __init__(self, n_chans: int, n_times: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.BatchNorm1d(n_chans),
            nn.Conv1d(n_chans, 8, kernel_size=20),
            nn.ELU(),
            nn.AvgPool1d(20),
            nn.Flatten(),
            nn.Linear(8 * ((n_times - 19) // 20), 1),
        )
        self.loss_of = nn.MSELoss()
        self.epoch_losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Unpack a batch as any other."""
        X, y, _ = batch
        loss: Tensor = self.loss_of(self.network(X), y)
        self.log("train_loss", loss, batch_size=len(batch), on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's mean."""
        self.epoch_losses.append(float(self.trainer.callback_metrics["train_loss"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on subjects that are not trained on."""
        X, y, _ = batch
        self.log("valid_loss", self.loss_of(self.network(X), y), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Choose how weights are changed."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(folder: Path) -> None:
    """Train; then go on from a checkpoint of the middle of an epoch."""
    corpus = folder / "corpus"  # here: your BIDS folder
    if not corpus.exists():
        write_hbn(corpus, HbnCorpus(3, ("R1",), n_runs=1, n_trials=12, rest_s=10, quirks=frozenset()))

    engram.prepare(corpus, folder / "store", steps=[HighPass(0.5)], memory="2 GB")
    with engram.open(folder / "store") as store:
        windows = store.windows(AFTER_TARGET, RESPONSE_TIME)
        sides = windows.split(Split(valid=Side(fraction=0.34)))
        assert sides.n_subjects == {"train": 2, "valid": 1}

        model = train(sides, folder / "checkpoints")
        first, last = model.epoch_losses[0], model.epoch_losses[-1]
        print(f"training loss {first:.2f} in the first epoch, {last:.2f} in the last")
        assert last < first

        # An epoch has three steps: the seventh is the first of the third epoch.
        resumed = train(sides, folder / "checkpoints", checkpoint="step=7.ckpt")
        for weight, same in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(weight, same)


def train(sides: SplitWindows, folder: Path, checkpoint: str | None = None) -> ResponseTimes:
    """Train from the beginning, or from a checkpoint."""
    torch.manual_seed(0)
    model = ResponseTimes(sides.train.n_chans, sides.train.n_times)
    trainer = Trainer(
        max_epochs=6,
        callbacks=[ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=7)],
        use_distributed_sampler=False,  # on several devices: give each loader its rank and world
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        sides.train.loader(batch_size=8, mode="shuffled", memory="2 GB"),
        sides["valid"].loader(batch_size=8, memory="2 GB"),
        ckpt_path=None if checkpoint is None else folder / checkpoint,
    )
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
