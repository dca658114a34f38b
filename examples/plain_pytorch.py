"""A plain PyTorch loop: prepare, open, windows, loader, loop.

The response time of every trial is predicted from the two seconds that begin half a second after
its target. The same windows then go through PyTorch's own ``DataLoader`` with worker processes.

Usage: python plain_pytorch.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import engram
from engram.batches import Windows
from engram.preparation.steps import HighPass
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.windows import EventWindows, TimeTo

AFTER_TARGET = EventWindows(
    signal="eeg",
    anchor=("left_target", "right_target"),
    trial_start_offset_s=0.5,
    trial_duration_s=2.0,
)
RESPONSE_TIME = TimeTo(("left_buttonPress", "right_buttonPress"))


def main(folder: Path) -> None:
    """Train with Engram's loader, then with PyTorch's."""
    corpus = folder / "corpus"  # here: your BIDS folder
    if not corpus.exists():
        write_hbn(corpus, HbnCorpus(3, ("R1",), n_runs=1, n_trials=12, rest_s=10, quirks=frozenset()))

    engram.prepare(corpus, folder / "store", steps=[HighPass(0.5)], memory="2 GB")
    with engram.open(folder / "store") as store:
        windows = store.windows(AFTER_TARGET, RESPONSE_TIME)
        loader = windows.loader(batch_size=12, mode="shuffled", memory="2 GB")
        first, last = train(loader)

        assert len(windows) == 36  # 3 subjects, 12 trials each
        assert (windows.n_chans, windows.n_times, windows.sfreq) == (129, 200, 100.0)
        print(f"Engram's loader: loss {first:.2f} in the first epoch, {last:.2f} in the last")
        assert last < first
        use_stock_loader(windows)


def train(loader: Iterable[Any], n_epochs: int = 10) -> tuple[float, float]:
    """Train a small network, and return the mean loss of the first and the last epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(129), nn.Conv1d(129, 8, 20), nn.ELU(), nn.AvgPool1d(20), nn.Flatten(), nn.Linear(72, 1)
    )
    loss_of, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=3e-3)
    means = []
    for _ in range(n_epochs):
        losses = []
        for X, y, _ in loader:  # (window, channel, time), (window, 1), numbers of the windows
            loss = loss_of(model(X), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means[0], means[-1]


def use_stock_loader(windows: Windows) -> None:
    """Give the same windows to PyTorch's ``DataLoader``, in its order and in Engram's."""
    # A map-style dataset: the DataLoader shuffles, and reads a whole batch at once.
    dataset = windows.dataset()
    X, y, place = dataset[0]
    assert (X.shape, y.shape, len(place)) == ((129, 200), (1,), 3)
    first, last = train(DataLoader(dataset, batch_size=12, shuffle=True, num_workers=2))
    print(f"DataLoader:      loss {first:.2f} in the first epoch, {last:.2f} in the last")
    assert last < first

    # Whole batches in Engram's order: those of its loader, whatever the number of workers.
    stream = windows.iterable(batch_size=12, mode="shuffled", seed=7)
    loader = windows.loader(batch_size=12, mode="shuffled", seed=7)
    for batch, same in zip(loader, DataLoader(stream, batch_size=None, num_workers=2), strict=True):
        assert torch.equal(batch.numbers, same.numbers)
        assert torch.equal(batch.signals["eeg"], same.signals["eeg"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
