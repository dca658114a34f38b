"""FitSettings: everything that a training is told beside its model and its windows.

This module decides the defaults and what may be combined; it computes nothing and loads no
torch. The same value is the ``[training]`` table of a recipe.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from engram.errors import InputError
from engram.units import parse_bytes
from engram.windows.order import Mode, whole_number

__all__ = ["FitSettings", "Framing", "LossName", "OptimizerName", "Precision", "Scaling", "SchedulerName"]

LossName: TypeAlias = Literal["mse", "l1", "huber", "cross_entropy"]
"""What is minimised: for regression one of the first three, for classification the last."""
OptimizerName: TypeAlias = Literal["adamw", "adam", "adamax", "sgd"]
"""Rules of `torch.optim` by which weights are changed."""
SchedulerName: TypeAlias = Literal["constant", "linear", "cosine", "onecycle", "plateau"]
"""How the learning rate goes over a training."""
Precision: TypeAlias = Literal["32-true", "bf16-mixed", "16-mixed"]
"""Lightning's words for the number format that the model computes in."""

Scaling: TypeAlias = Literal["none", "window", "channel"]
"""How samples are scaled before a network sees them."""

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "mode": get_args(Mode),
    "loss": (None, *get_args(LossName)),
    "optimizer": get_args(OptimizerName),
    "scheduler": get_args(SchedulerName),
    "precision": get_args(Precision),
}
_AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "accumulate",
    "devices",
    "memory_every_steps",
    "checkpoint_every_steps",
)
_POSITIVE = ("huber_delta", "learning_rate")
_NOT_NEGATIVE = ("l1", "l2", "weight_decay", "momentum", "warmup_epochs", "noise", "channel_dropout")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral)


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What stands before and behind a network, and is a part of it wherever it goes.

    Raises
    ------
    InputError
        If a value breaks its rule.

    Examples
    --------
    >>> Framing(scaling="window", downsample=2).reach is None
    True
    """

    scaling: Scaling = "none"
    """``window``: each channel of each window to mean zero and deviation one; ``channel``: by median and
    interquartile range of each channel over the training windows; ``none``: the signal's own unit."""
    downsample: int = 1
    """Keep every n-th sample, after a filter against aliasing."""
    reach: float | None = None
    """Farthest departure of a prediction from the mean of the training targets; None: any."""
    test_shifts: tuple[int, ...] = ()
    """Where it is not trained, average the predictions of windows moved by so many samples each."""

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            words = ", ".join(repr(choice) for choice in get_args(Scaling))
            raise InputError(f"scaling={self.scaling!r} is unknown. Use one of {words}.")
        if not _is_whole(self.downsample) or self.downsample < 1:
            raise InputError(f"downsample={self.downsample!r} keeps no samples. Use 1 or more.")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise InputError(f"reach={self.reach} leaves no room. Use such as 0.3, or none.")
        if not all(map(_is_whole, self.test_shifts)):
            raise InputError(
                f"test_shifts={self.test_shifts!r} are no counts of samples. Use such as (-2, 0, 2)."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a model is trained; every field has its default and its rule.

    Raises
    ------
    InputError
        If a value breaks its rule, or two do not go together.

    Examples
    --------
    >>> settings = FitSettings(epochs=20, learning_rate=2e-3, patience=5)
    >>> settings.batch_size, settings.optimizer
    (64, 'adamw')
    >>> FitSettings(epochs=0)
    Traceback (most recent call last):
    ...
    engram.errors.InputError: epochs=0 is below 1. Use 1 or more.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    epochs: int = 10
    """Passes over the training windows, unless early stopping ends them."""
    batch_size: int = 64
    """Windows that go through the model together, over all devices."""
    mode: Mode = "shuffled"
    """In which order the training windows come, as for ``Windows.loader``."""
    by: str | None = None
    """The column that groups windows, for the modes ``groups`` and ``balanced``."""
    seed: int = 0
    """Of the order, and of the random numbers that the model draws (dropout)."""
    loss: LossName | None = None
    """None: ``mse`` for regression, ``cross_entropy`` for classification."""
    huber_delta: float = 1.0
    """Error, in units of the target, beyond which ``huber`` grows linearly."""
    l1: float = 0.0
    """Weight of the sum of absolute weights that is added to the loss; biases and norms are left out."""
    l2: float = 0.0
    """Weight of the sum of squared weights that is added to the loss; with ``l1``, an elastic net."""
    optimizer: OptimizerName = "adamw"
    """Rule by which weights are changed."""
    learning_rate: float = 1e-3
    """The highest learning rate of the training."""
    weight_decay: float = 0.0
    """The optimizer's own: decoupled for ``adamw``, else added to the gradient."""
    momentum: float = 0.0
    """Of ``sgd``."""
    scheduler: SchedulerName = "constant"
    """``constant``; ``linear`` or ``cosine`` to zero over all steps; ``onecycle`` as PyTorch's
    ``OneCycleLR``; ``plateau`` divides by 10 after 3 epochs without a better validation loss."""
    warmup_epochs: float = 0.0
    """The learning rate grows linearly from zero over so many epochs; not with ``onecycle``, which has
    its own, nor with ``plateau``."""
    patience: int | None = None
    """Stop after so many epochs without a better validation score; None: never. Needs a validation
    side: training windows do not decide when to stop."""
    metrics: tuple[str, ...] = ()
    """Scores to report; the first one judges. Empty: those of the task."""
    accumulate: int = 1
    """Batches whose gradients are added before the weights change: the same step as one batch of
    ``accumulate * batch_size`` windows, in the memory of ``batch_size``. Not the same with BatchNorm,
    which normalises each batch by its own mean and variance."""
    clip_norm: float | None = None
    """Longest gradient, as a Euclidean norm over all weights; a longer one is shortened. None: any."""
    noise: float = 0.0
    """Deviation of the Gaussian noise that is added to every window in training, in the signal's unit."""
    channel_dropout: float = 0.0
    """Probability with which a channel of a window is set to zero in training."""
    time_mask_samples: int = 0
    """Longest stretch of each window that is set to zero in training, in all channels; its length and
    place are drawn."""
    precision: Precision = "32-true"
    """Number format that the model computes in; weights stay float32."""
    accelerator: str = "auto"
    """Lightning's name of the kind of device: ``"cpu"``, ``"gpu"``, ``"auto"``, ..."""
    devices: int = 1
    """Devices to train on, one process each."""
    memory: int | str | None = None
    """What the whole training may hold, the libraries' 400 MB included, such as ``"2 GB"``: the loader
    is planned within it, and past it the training writes a checkpoint and stops. None: ``memory_share``
    of the limit that binds."""
    memory_share: float = 0.8
    """Share of the memory limit that binds at which the training writes a checkpoint and stops."""
    memory_every_steps: int = 20
    """Optimizer steps after which the highest memory since the last look is noted and judged."""
    checkpoint_every_steps: int = 200
    """Optimizer steps between two checkpoints; each epoch ends with one anyway."""

    def __post_init__(self) -> None:
        for name in (*_AT_LEAST_ONE, *_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            kind, said = (
                (numbers.Integral, "whole number") if name in _AT_LEAST_ONE else (numbers.Real, "number")
            )
            if not isinstance(value, kind):
                raise InputError(f"{name}={value!r} is no {said}. Write one, without quotes.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                words = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise InputError(f"{name}={getattr(self, name)!r} is unknown. Use one of {words}.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is below 1. Use 1 or more.")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} is not above zero. Use such as 0.001.")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} is negative or no number. Use 0 or more.")
        whole_number("seed", self.seed)
        self._check_optional()
        self._check_together()

    def _check_optional(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience={self.patience} is below 1. Use 1 or more, or none to never stop.")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise InputError(f"clip_norm={self.clip_norm} is not above zero. Use such as 1.0, or none.")
        if self.channel_dropout > 1:
            raise InputError(f"channel_dropout={self.channel_dropout} is no probability. Use 0 to 1.")
        if not _is_whole(self.time_mask_samples) or self.time_mask_samples < 0:
            raise InputError(
                f"time_mask_samples={self.time_mask_samples!r} is no count of samples. Use 0 or more."
            )
        if not 0 < self.memory_share <= 1:
            raise InputError(f"memory_share={self.memory_share} is no share. Use above 0, at most 1.")
        if self.memory is not None:
            try:
                parse_bytes(self.memory)
            except ValueError as error:
                raise InputError(f"memory: {error}") from error

    def _check_together(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"momentum={self.momentum} is for 'sgd', not {self.optimizer!r}. Leave it out.")
        if self.warmup_epochs and self.scheduler in {"onecycle", "plateau"}:
            raise InputError(
                f"warmup_epochs={self.warmup_epochs} does not go with {self.scheduler!r}. Leave it out."
            )
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of {self.epochs} epochs. Use fewer."
            )
