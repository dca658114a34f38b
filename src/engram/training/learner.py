"""Learner: any network, its loss, its optimizer and its gradient steps, as one LightningModule.

This module decides what one optimizer step is. Lightning brings devices, precision and
processes; when to step is decided here by "manual optimization", since three things must be
exact that Lightning's automatic one leaves open: accumulated gradients weighted by rows, also
where the last batch is short; a state that can be saved between any two steps; and a stop
before a gradient that is not finite touches the weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer, lr_scheduler

from engram.batches.batch import Batch
from engram.batches.transforms import Draws, add_noise, drop_channels, mask_time
from engram.batches.windows import Windows
from engram.errors import InputError
from engram.training.settings import FitSettings, LossName
from engram.windows.order import Order
from engram.windows.targets import SignalTarget, Target

__all__ = ["Evaluator", "Learner", "evaluating", "measured", "row_losses"]

_LOSSES = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
}
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax}


def row_losses(
    loss: LossName,
    output: Tensor,
    y: Tensor,
    lengths: Tensor | None = None,
    *,
    time_axis: int = 1,
    huber_delta: float = 1.0,
) -> Tensor:
    """Compute the loss of each window.

    Parameters
    ----------
    loss
        Which one.
    output
        (window, ...) what the network gave.
    y
        (window, ...) float32 targets of the same shape; (window,) int64 for ``cross_entropy``.
    lengths
        (window,) int64 true samples of each window, where ``y`` is a signal padded with zeros;
        what is behind them does not count. None: everything counts.
    time_axis
        Which axis of ``y`` the lengths are of.
    huber_delta
        Error beyond which ``huber`` grows linearly.

    Returns
    -------
    Tensor
        (window,) float32, each the mean over the window's own values.

    Examples
    --------
    >>> y = torch.tensor([[[1.0, 2.0, 0.0]], [[1.0, 1.0, 1.0]]])
    >>> row_losses("mse", torch.zeros(2, 1, 3), y, torch.tensor([2, 3]), time_axis=2).tolist()
    [2.5, 1.0]
    """
    output = output.float()
    if loss == "cross_entropy":
        return functional.cross_entropy(output, y, reduction="none")
    if loss == "huber":
        values = functional.huber_loss(output, y, reduction="none", delta=huber_delta)
    else:
        values = _LOSSES[loss](output, y, reduction="none")
    if lengths is None:
        return values.flatten(1).mean(1)
    counted = measured(y, lengths, time_axis)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)


def measured(y: Tensor, lengths: Tensor, time_axis: int) -> Tensor:
    """Mark the values of padded signals that were measured.

    Parameters
    ----------
    y
        (window, channel, time) or (window, time, ...), padded behind.
    lengths
        (window,) true samples.
    time_axis
        Which axis they are of.

    Returns
    -------
    Tensor
        Booleans of the shape of ``y``.
    """
    shape = [1] * y.ndim
    shape[time_axis] = -1
    places = torch.arange(y.shape[time_axis], device=y.device).reshape(shape)
    return (places < lengths.reshape(-1, *[1] * (y.ndim - 1))).expand_as(y)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode without gradients, and every module back as it was.

    Modules that their owner froze in evaluation mode stay frozen, which ``network.train()`` would undo.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Evaluator:
    """Calls a network on a batch, checks what it gives, and computes the loss of each window.

    The network is called with ``X``: the tensor of the one signal, or a dict of them by name where
    there are several; stored integers as float32. If its ``forward`` has a parameter ``lengths``, it
    is also given the true samples of each window, (window,) int64 or a dict of such; if it has one
    named ``recordings``, the id of each window's recording, for readouts that differ by session.

    Parameters
    ----------
    network
        Any module.
    settings
        For the loss.
    target
        What is predicted; None for targets that the user computed.
    classes
        Names of the classes, none for regression.

    Raises
    ------
    InputError
        If the loss does not fit the task.

    Examples
    --------
    >>> evaluator = Evaluator(nn.Sequential(nn.Flatten(), nn.Linear(6, 1)), FitSettings())
    >>> X, y = torch.zeros(4, 2, 3), torch.ones(4, 1)
    >>> batch = Batch({"eeg": X}, {"eeg": torch.full((4,), 3)}, y, torch.arange(4), 4)
    >>> output, losses = evaluator(batch)
    >>> output.shape, losses.shape
    (torch.Size([4, 1]), torch.Size([4]))
    """

    def __init__(
        self,
        network: nn.Module,
        settings: FitSettings,
        target: Target | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.network = network
        """Any module."""
        self.classes = tuple(classes)
        """Names of the classes, none for regression."""
        self.loss: LossName = settings.loss or ("cross_entropy" if classes else "mse")
        if bool(classes) != (self.loss == "cross_entropy"):
            task = f"classification of {len(classes)} classes" if classes else "regression"
            fitting = "'cross_entropy'" if classes else "'mse', 'l1' or 'huber'"
            raise InputError(f"loss={self.loss!r} does not fit a {task}. Use {fitting}.")
        self._huber_delta = settings.huber_delta
        self.signal = target.signal if isinstance(target, SignalTarget) else None
        """Name of the signal that is the target, or None."""
        self._extras = {"lengths", "recordings"} & set(inspect.signature(network.forward).parameters)

    def __call__(self, batch: Batch, windows: Windows | None = None) -> tuple[Tensor, Tensor]:
        """Give the network's output and (window,) float32 losses.

        Parameters
        ----------
        batch
            On the network's device.
        windows
            Whose windows these are; needed where ``forward`` takes ``recordings``.

        Raises
        ------
        InputError
            If windows have no target, or the output does not fit it.
        """
        if batch.y is None:
            raise InputError(
                "These windows have no target to train on. Name one: store.windows(spec, target)."
            )
        output = self.output(batch, windows)
        self._check_shape(output, batch.y)
        lengths = self.lengths_of_target(batch)
        axis, delta = batch.y_time_axis, self._huber_delta
        return output, row_losses(self.loss, output, batch.y, lengths, time_axis=axis, huber_delta=delta)

    def lengths_of_target(self, batch: Batch) -> Tensor | None:
        """Give the true lengths of a target that is a signal, if its windows differ in length."""
        if self.signal is None:
            return None
        lengths = batch.lengths[self.signal]
        return lengths if int(lengths.min()) < int(lengths.max()) else None

    def output(self, batch: Batch, windows: Windows | None = None) -> Tensor:
        """Call the network, whether there is a target or not.

        Parameters
        ----------
        batch, windows
            As for calling the evaluator.

        Raises
        ------
        InputError
            If the network gives anything but a tensor.
        """
        given = {name: x if x.is_floating_point() else x.float() for name, x in batch.signals.items()}
        lengths = {name: batch.lengths[name] for name in given}
        one = next(iter(given)) if len(given) == 1 else None
        extras: dict[str, Any] = {}
        if "lengths" in self._extras:
            extras["lengths"] = lengths[one] if one else lengths
        if "recordings" in self._extras:
            assert windows is not None
            places = windows.index.locate(batch.numbers.cpu().numpy()).recording
            extras["recordings"] = [windows.index.tables.ids[place] for place in places]
        output = self.network(given[one] if one else given, **extras)
        if not isinstance(output, Tensor):
            raise InputError(
                f"The model gives a {type(output).__name__}, where one tensor is needed. Wrap it in a "
                "module whose forward returns the prediction."
            )
        return output

    def _check_shape(self, output: Tensor, y: Tensor) -> None:
        wanted = (len(y), len(self.classes)) if self.classes else tuple(y.shape)
        if tuple(output.shape) != wanted:
            what = f"{len(self.classes)} classes need" if self.classes else "the target has"
            raise InputError(
                f"The model's output has shape {tuple(output.shape)}, {what} {wanted}. Change the "
                "model's last layer."
            )


class Learner(LightningModule):
    """What Lightning trains: a network with its loss, optimizer and schedule.

    Parameters
    ----------
    evaluator
        The network and its loss.
    settings
        How to train it.
    order
        Of the training windows.
    windows
        The training windows; needed where the network is told their recordings.

    Notes
    -----
    The weights change once per *accumulation*: ``settings.accumulate`` batches, fewer at the end of
    an epoch. Each batch's losses are summed and divided by the rows of the whole accumulation over
    all processes, so that the gradient is that of one large batch, on any number of processes and
    however short the last batch is. Under Lightning's DDP, gradients are averaged: the loss of each
    process is scaled by their number.

    Networks with BatchNorm learn something else from four batches of 16 than from one of 64: each
    batch is normalised by its own mean and variance, and the running statistics see four updates.
    """

    def __init__(
        self, evaluator: Evaluator, settings: FitSettings, order: Order, windows: Windows | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = evaluator.network
        self.evaluate = evaluator
        self.settings = settings
        self.order = order
        self._windows = windows
        self.epoch = 0
        """The epoch under way, counted over all resumed parts."""
        self.n_batches = 0
        """Batches of it that were trained."""
        self.n_steps = 0
        """Optimizer steps done."""
        self.loss_sum = 0.0
        """Sum of the losses of this process's windows in this epoch."""
        self.n_windows = 0
        """Windows trained in this epoch, over all processes."""
        self._not_finite: list[int] = []
        self.scheduler: lr_scheduler.LRScheduler | None = None

    @property
    def is_between_steps(self) -> bool:
        """True where nothing is accumulated: the only moments at which a state may be saved."""
        return self.n_batches % self.settings.accumulate == 0 or self.is_trained

    @property
    def is_trained(self) -> bool:
        """True if every batch of the epoch was trained."""
        return self.n_batches == self.order.n_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.order.n_batches // self.settings.accumulate)

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer, and the schedule that is stepped here, not by Lightning."""
        settings = self.settings
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        if not weights:
            raise InputError("The model has no weights that need gradients. Unfreeze some of them.")
        optimizer: Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                weights, settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
            )
        else:
            kind = _OPTIMIZERS[settings.optimizer]
            optimizer = kind(weights, settings.learning_rate, weight_decay=settings.weight_decay)
        self.scheduler = _schedule(optimizer, settings, self.steps_per_epoch)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch's gradient; change the weights if it closes an accumulation.

        Parameters
        ----------
        batch
            This process's share of the batch.
        batch_idx
            Lightning's count, which begins anew where a training is resumed: not used.

        Raises
        ------
        InputError
            If the loss or gradient is not finite, or this process has no window of the batch.
        """
        if not len(batch):
            raise InputError(
                f"Batch {self.n_batches} of epoch {self.epoch + 1} has {batch.n_global} windows for "
                f"{self.trainer.world_size} processes. Use fewer devices, or another mode."
            )
        _, losses = self.evaluate(self._transformed(batch), self._windows)
        is_last = self._closes_accumulation()
        loss = losses.sum() * (self.trainer.world_size / self._rows_of_accumulation())
        if is_last:
            loss = loss + self._penalty()
        with nullcontext() if is_last else self._unsynchronised():
            self.manual_backward(loss)
        self._count(batch, losses.detach())
        if is_last:
            self._step()

    def _transformed(self, batch: Batch) -> Batch:
        """Change what is delivered as (window, channel, time) by noise and masks; all else stays."""
        settings, draws = self.settings, Draws(self.settings.seed, self.epoch, batch.numbers)
        if not (settings.noise or settings.channel_dropout or settings.time_mask_samples):
            return batch
        signals = {}
        for name, X in batch.signals.items():  # noqa: N806 - braindecode's word
            signals[name] = X
            has_channels = X.ndim == 3 if self._windows is None else self._windows.has_channels(name)
            if not has_channels or not X.is_floating_point():
                continue
            if settings.noise:
                signals[name] = add_noise(signals[name], settings.noise, draws)
            if settings.channel_dropout:
                signals[name] = drop_channels(signals[name], settings.channel_dropout, draws)
            if settings.time_mask_samples:
                signals[name] = mask_time(signals[name], settings.time_mask_samples, draws)
            if settings.noise and int(batch.lengths[name].min()) < X.shape[2]:
                signals[name] = signals[name] * measured(X, batch.lengths[name], 2)  # zeros stay behind
        return replace(batch, signals=signals)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient, or stop: the last moment before the weights change.

        Gradients are unscaled here under mixed precision. A float16 gradient beyond its range is no
        error: PyTorch's scaler leaves the step out and tries a smaller scale.
        """
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm or math.inf)
        if self.settings.precision != "16-mixed" and not bool(torch.isfinite(norm)):
            raise self._not_finite_error("gradient")

    def _closes_accumulation(self) -> bool:
        done = self.n_batches + 1
        return done % self.settings.accumulate == 0 or done == self.order.n_batches

    def _rows_of_accumulation(self) -> int:
        first = self.n_batches - self.n_batches % self.settings.accumulate
        stop = min(first + self.settings.accumulate, self.order.n_batches)
        return sum(len(self.order.batch(self.epoch, number)) for number in range(first, stop))

    def _unsynchronised(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _penalty(self) -> Tensor:
        """Sum the elastic net over the weights: not over biases and norms, which have one axis."""
        total = torch.zeros((), device=self.device)
        for weight in self.network.parameters():
            if weight.requires_grad and weight.ndim > 1:
                if self.settings.l1:
                    total = total + self.settings.l1 * weight.abs().sum()
                if self.settings.l2:
                    total = total + self.settings.l2 * weight.square().sum()
        return total

    def _count(self, batch: Batch, losses: Tensor) -> None:
        self._not_finite += batch.numbers[~torch.isfinite(losses)].tolist()
        self.loss_sum += float(losses.double().sum())
        self.n_windows += batch.n_global
        self.n_batches += 1

    def _step(self) -> None:
        # With several processes, one that stopped here would leave the others waiting for its
        # gradient; there the gradient itself, the same for all, says so in a moment.
        if self._not_finite and self.trainer.world_size == 1:
            raise self._not_finite_error("loss")
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._not_finite.clear()
        self.n_steps += 1
        if self.scheduler is not None and not isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()

    def _not_finite_error(self, what: str) -> InputError:
        named = ", ".join(str(number) for number in self._not_finite[:8])
        more = f" and {len(self._not_finite) - 8} more" if len(self._not_finite) > 8 else ""
        where = f"at windows {named}{more}" if named else "while no loss of this process's windows was"
        step = f"optimizer step {self.n_steps + 1} (epoch {self.epoch + 1})"
        return InputError(
            f"The {what} is not finite at {step}, {where}. "
            f"Lower learning_rate (now {self.settings.learning_rate}), or look at these windows."
        )


def _schedule(
    optimizer: Optimizer, settings: FitSettings, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """Make the schedule; None where the learning rate stays."""
    n_steps = settings.epochs * steps_per_epoch
    if settings.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=3)
    if settings.scheduler == "onecycle":
        # As in PyTorch it moves Adam's first beta too; the momentum of SGD is told, and stays.
        moves_beta = settings.optimizer != "sgd"
        return lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=n_steps + 1, cycle_momentum=moves_beta
        )
    n_warmup = round(settings.warmup_epochs * steps_per_epoch)
    if settings.scheduler == "constant" and not n_warmup:
        return None

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / (n_warmup + 1)
        # A warm-up of nearly all epochs may round to all steps: of none that follow, none is done.
        done = (step - n_warmup) / max(1, n_steps - n_warmup)
        if settings.scheduler == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if settings.scheduler == "linear" else 1.0

    return lr_scheduler.LambdaLR(optimizer, factor)
