"""What a batch is."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engram.batches.batch import Batch


def make_batch(signals: Mapping[str, Tensor]) -> Batch:
    """Two windows, of a global batch of three."""
    lengths = {name: torch.tensor([100, 80]) for name in signals}
    return Batch(signals, lengths, torch.zeros(2, 1), torch.tensor([4, 9]), 3)


def test_one_signal_is_x_itself() -> None:
    """``X`` is the tensor where there is one signal, and unpacks with target and numbers."""
    eeg = torch.rand(2, 3, 100)
    batch = make_batch({"eeg": eeg})
    data, y, numbers = batch

    assert data is batch.X
    assert data is eeg
    assert y is batch.y
    assert numbers is batch.numbers
    assert len(batch) == 2


def test_several_signals_are_a_dict() -> None:
    """``X`` names its tensors where there are several."""
    batch = make_batch({"stim": torch.zeros(2, 33, 9, 9), "eye": torch.zeros(2, 2, 33)})
    assert isinstance(batch.X, dict)
    assert batch.X.keys() == {"stim", "eye"}


def test_every_tensor_moves() -> None:
    """``to`` moves every tensor and keeps the size of the global batch."""
    moved = make_batch({"eeg": torch.zeros(2, 3, 100)}).to("meta")
    tensors = [*moved.signals.values(), *moved.lengths.values(), moved.y, moved.numbers]

    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    assert moved.n_global == 3
    assert Batch({}, {}, None, torch.zeros(0), 0).to("meta").y is None


def test_bytes_are_those_of_all_tensors() -> None:
    """A batch knows what it holds."""
    batch = make_batch({"eeg": torch.zeros(2, 3, 100)})
    assert batch.n_bytes == 4 * 600 + 8 * 2 + 4 * 2 + 8 * 2


def test_a_batch_travels() -> None:
    """A pickled batch is the same, and a ``DataLoader`` of whole batches hands it on as it is."""
    batch = make_batch({"eeg": torch.rand(2, 3, 100)})
    travelled = pickle.loads(pickle.dumps(batch))
    (handed,) = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset to it

    assert torch.equal(travelled.signals["eeg"], batch.signals["eeg"])
    assert travelled.n_global == 3
    assert handed is batch
