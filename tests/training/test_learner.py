"""What one optimizer step is: its loss, its rows, its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional

from engram.batches.batch import Batch
from engram.errors import InputError
from engram.training.learner import Evaluator, Learner, evaluating, row_losses
from engram.training.settings import FitSettings
from engram.windows.order import Order
from engram.windows.targets import SignalTarget

# Lightning 2.6 makes a tree in the way that PyTorch 2.13 deprecates; theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")

X = torch.randn(40, 3, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 1, generator=torch.Generator().manual_seed(1))


def make_batch(numbers: Sequence[int] | Tensor, y: Tensor = Y) -> Batch:
    """Take windows of X and their targets."""
    rows = torch.as_tensor(numbers)
    lengths = {"eeg": torch.full((len(rows),), X.shape[2])}
    return Batch({"eeg": X[rows]}, lengths, y[rows], rows, len(rows))


class Small(nn.Module):
    """A network with or without BatchNorm."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.norm = nn.Linear(24, 4), nn.BatchNorm1d(4) if norm else nn.Identity()
        self.readout = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (window, channel, time) to (window, 1)."""
        out: Tensor = self.readout(self.norm(self.hidden(x.flatten(1))).tanh())
        return out


class Batches:
    """Batches of an order as Lightning takes them: sized, and iterable again."""

    def __init__(self, order: Order, y: Tensor = Y) -> None:
        self.order, self.y = order, y

    def __len__(self) -> int:
        return self.order.n_batches

    def __iter__(self) -> Iterator[Batch]:
        return (make_batch(torch.from_numpy(self.order.batch(0, n)), self.y) for n in range(len(self)))


def train_epoch(network: nn.Module, settings: FitSettings, y: Tensor = Y) -> Learner:
    """Train one epoch over 40 windows, the short last batch included."""
    order = Order.of("index", 40, settings.batch_size, mode="shuffled", drop_last=False)
    learner = Learner(Evaluator(network, settings), settings, order)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, Batches(order, y))
    return learner


def difference(one: nn.Module, other: nn.Module) -> float:
    """Find the largest difference of two networks' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(5, 4), (3, 4), (7, 2), (1, 16), (40, 1)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_is_the_large_batch(
    batch_size: int, accumulate: int, optimizer: Literal["sgd", "adamw"]
) -> None:
    """Also where the last batch is short and where the last accumulation has fewer batches."""
    settings = {"optimizer": optimizer, "learning_rate": 0.02, "l2": 0.01, "clip_norm": 0.5}
    small, large = Small(), Small()
    learner = train_epoch(small, FitSettings(batch_size=batch_size, accumulate=accumulate, **settings))  # type: ignore[arg-type] # one dict of several types
    train_epoch(large, FitSettings(batch_size=batch_size * accumulate, **settings))  # type: ignore[arg-type] # as above
    assert difference(large, Small()) > 1e-3
    assert difference(small, large) < 2e-6
    assert learner.n_steps == math.ceil(math.ceil(40 / batch_size) / accumulate)


def test_with_batchnorm_accumulation_is_not_the_large_batch() -> None:
    """Each batch is normalised by its own mean and variance: told in the docstring, and true."""
    small, large = Small(norm=True), Small(norm=True)
    train_epoch(small, FitSettings(batch_size=5, accumulate=4, optimizer="sgd", learning_rate=0.02))
    train_epoch(large, FitSettings(batch_size=20, optimizer="sgd", learning_rate=0.02))
    assert difference(small, large) > 1e-4
    assert "BatchNorm" in str(Learner.__doc__)


def test_a_step_is_that_of_a_plain_loop() -> None:
    """Mean squared error, elastic net over weights but not biases, clipping, SGD."""
    settings = FitSettings(
        batch_size=10, optimizer="sgd", learning_rate=0.05, momentum=0.9, l1=0.01, l2=0.02, clip_norm=0.3
    )
    network, plain = Small(), Small()
    train_epoch(network, settings)
    order = Order.of("index", 40, 10, mode="shuffled", drop_last=False)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, 0.9)
    for number in range(4):
        rows = torch.from_numpy(order.batch(0, number))
        loss = functional.mse_loss(plain(X[rows]), Y[rows])
        for weight in (plain.hidden.weight, plain.readout.weight):
            loss = loss + 0.01 * weight.abs().sum() + 0.02 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # unannotated in PyTorch
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
    assert difference(network, plain) < 1e-6


@pytest.mark.parametrize("changed", [{"noise": 2.0}, {"channel_dropout": 0.4}, {"time_mask_samples": 6}])
def test_windows_are_changed_in_training_alike_in_every_batch(changed: dict[str, Any]) -> None:
    """By seed, epoch and window: in accumulated batches as in a large one; never where they are scored."""
    small, large, plain = Small(), Small(), Small()
    settings = {"optimizer": "sgd", "learning_rate": 0.02}
    learner = train_epoch(small, FitSettings(batch_size=5, accumulate=4, **settings, **changed))  # type: ignore[arg-type] # as below
    train_epoch(large, FitSettings(batch_size=20, **settings, **changed))  # type: ignore[arg-type] # as below
    train_epoch(plain, FitSettings(batch_size=20, **settings))  # type: ignore[arg-type] # one dict of several types
    assert difference(small, large) < 2e-6
    assert difference(large, plain) > 1e-4
    batch = make_batch([3, 1])
    with torch.no_grad():
        assert torch.equal(learner.evaluate(batch)[0], small(X[[3, 1]]))


def test_noise_does_not_reach_behind_a_shorter_window() -> None:
    """Zeros that fill a batch up stay zeros, as they are where windows are scored."""
    settings = FitSettings(noise=2.0, batch_size=2)
    learner = Learner(
        Evaluator(Small(), settings), settings, Order.of("index", 40, 2, mode="shuffled", drop_last=False)
    )
    padded = replace(make_batch([3, 1]), lengths={"eeg": torch.tensor([8, 5])})
    changed = learner._transformed(padded).signals["eeg"]
    assert not changed[1, :, 5:].any()
    assert changed[1, :, :5].all()
    assert changed[0].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad: float) -> None:
    """The error names step, epoch and windows."""
    y = Y.clone()
    y[17] = bad
    network = Small()
    where = next(
        n for n in range(8) if 17 in Order.of("index", 40, 5, mode="shuffled", drop_last=False).batch(0, n)
    )
    settings = FitSettings(batch_size=5, accumulate=8, learning_rate=0.1)
    with pytest.raises(
        InputError, match=r"loss is not finite at optimizer step 1 \(epoch 1\), at windows 17\."
    ):
        train_epoch(network, settings, y)
    assert difference(network, Small()) == 0
    with pytest.raises(InputError, match=f"optimizer step {where + 1} "):
        train_epoch(network, FitSettings(batch_size=5, learning_rate=0.1), y)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    """A finite loss may have a gradient that is none: the square root at zero."""

    class Root(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.readout.bias * 0).sqrt()

    network = Root()
    with pytest.raises(InputError, match="gradient is not finite at optimizer step 1"):
        train_epoch(network, FitSettings(batch_size=20))
    assert difference(network, Small()) == 0


def test_only_weights_that_need_gradients_are_trained() -> None:
    """Frozen layers stay; a model without any is refused."""
    network = Small()
    network.hidden.requires_grad_(requires_grad=False)
    train_epoch(network, FitSettings(batch_size=10, l1=0.1))
    assert torch.equal(network.hidden.weight, Small().hidden.weight)
    assert not torch.equal(network.readout.weight, Small().readout.weight)
    with pytest.raises(InputError, match="no weights that need gradients"):
        train_epoch(Small().requires_grad_(requires_grad=False), FitSettings())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scheduler": "constant"}, [1, 1, 1, 1]),
        ({"scheduler": "constant", "warmup_epochs": 0.5}, [1 / 3, 2 / 3, 1, 1]),
        ({"scheduler": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"scheduler": "linear", "warmup_epochs": 0.9}, [0.2, 0.4, 0.6, 0.8]),
        ({"scheduler": "cosine"}, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_the_learning_rate_follows_its_schedule(settings: dict[str, Any], expected: list[float]) -> None:
    """One value per optimizer step: 4 steps of 2 batches."""
    seen = []

    class Watched(Learner):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    fit_settings = FitSettings(epochs=1, batch_size=5, accumulate=2, learning_rate=1.0, **settings)
    order = Order.of("index", 40, 5, mode="shuffled", drop_last=False)
    learner = Watched(Evaluator(Small(), fit_settings), fit_settings, order)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, Batches(order))
    np.testing.assert_allclose(seen, expected)


# ---------------------------------------------------------------- losses and calls


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mse", functional.mse_loss), ("l1", functional.l1_loss), ("huber", functional.huber_loss)],
)
def test_losses_of_rows_average_to_pytorchs(name: Literal["mse", "l1", "huber"], theirs: Any) -> None:
    """Where all rows are of one length."""
    output, y = torch.randn(6, 2, 5), torch.randn(6, 2, 5)
    torch.testing.assert_close(row_losses(name, output, y).mean(), theirs(output, y))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_padding_does_not_count(lengths: list[int], channels_first: bool) -> None:
    """Whatever the output is behind a window's end, its loss is that of its own samples."""
    longest, n_units = max(lengths), 3
    shape = (len(lengths), n_units, longest) if channels_first else (len(lengths), longest, n_units)
    generator = torch.Generator().manual_seed(0)
    output, y = (torch.randn(shape, generator=generator) for _ in range(2))
    expected = []
    for row, length in enumerate(lengths):
        kept = (slice(None), slice(0, length)) if channels_first else (slice(0, length), slice(None))
        expected.append(functional.mse_loss(output[row][kept], y[row][kept]))
    axis = 2 if channels_first else 1
    found = row_losses("mse", output, y, torch.tensor(lengths), time_axis=axis)
    torch.testing.assert_close(found, torch.stack(expected))


class Listening(nn.Module):
    """Notes what it is called with."""

    def forward(self, x: Any, lengths: Any = None) -> Tensor:
        """Give zeros."""
        self.seen = (x, lengths)
        return torch.zeros(2, 1)


def test_a_network_is_given_what_its_forward_takes() -> None:
    """One tensor or a dict of several, integers as float32, and lengths if there is such a parameter."""
    frames = torch.ones(2, 5, 3, 3, dtype=torch.uint8)
    lengths = {"eeg": torch.tensor([8, 7]), "stim": torch.tensor([5, 5])}
    eeg = X[:2]
    network = Listening()
    evaluate = Evaluator(network, FitSettings())
    evaluate(Batch({"eeg": eeg, "stim": frames}, lengths, Y[:2], torch.arange(2), 2))
    given_x, given_lengths = network.seen
    assert given_x["stim"].dtype == torch.float32
    assert given_x["eeg"] is eeg
    assert given_lengths["eeg"].tolist() == [8, 7]

    evaluate(Batch({"stim": frames}, lengths, Y[:2], torch.arange(2), 2))
    given_x, given_lengths = network.seen
    assert given_x.dtype == torch.float32
    assert given_lengths.tolist() == [5, 5]


def test_an_output_of_another_shape_is_refused_with_both_shapes() -> None:
    """Broadcasting (window,) against (window, 1) would train on nonsense."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(24, 1), nn.Flatten(0))
    with pytest.raises(InputError, match=r"shape \(4,\), the target has \(4, 1\)"):
        Evaluator(flat, FitSettings())(make_batch(range(4)))
    two = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    with pytest.raises(InputError, match=r"shape \(4, 2\), 3 classes need \(4, 3\)"):
        Evaluator(two, FitSettings(), classes=("a", "b", "c"))(
            make_batch(range(4), torch.zeros(40, dtype=torch.int64))
        )


def test_a_model_that_gives_no_tensor_is_refused() -> None:
    """Its type is named."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(InputError, match="gives a tuple"):
        Evaluator(Pair(), FitSettings())(make_batch(range(4)))


def test_windows_without_target_are_refused() -> None:
    """There is nothing to learn."""
    batch = make_batch(range(4))
    with pytest.raises(InputError, match="have no target"):
        Evaluator(Small(), FitSettings())(Batch(batch.signals, batch.lengths, None, batch.numbers, 4))


@pytest.mark.parametrize(("loss", "classes"), [("mse", ("a", "b")), ("cross_entropy", ())])
def test_a_loss_of_the_other_task_is_refused(loss: Any, classes: tuple[str, ...]) -> None:
    """Both are named, with those that fit."""
    with pytest.raises(InputError, match="does not fit a"):
        Evaluator(Small(), FitSettings(loss=loss), classes=classes)


def test_a_signal_of_one_length_needs_no_mask() -> None:
    """Masks cost time, and most targets need none."""
    evaluate = Evaluator(Small(), FitSettings(), SignalTarget("robs"))
    for lengths, is_masked in (([4, 4], False), ([4, 3], True)):
        batch = Batch({}, {"robs": torch.tensor(lengths)}, Y[:2], torch.arange(2), 2)
        assert (evaluate.lengths_of_target(batch) is not None) == is_masked


def test_modules_are_put_back_into_their_own_mode() -> None:
    """What its owner froze in evaluation mode does not begin to train after the first validation."""
    network = Small(norm=True)
    network.norm.eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
    assert [network.training, network.norm.training] == [True, False]
