"""fit: train a network on windows, in a folder that a training can always be continued from.

This module decides the course of a training: when a checkpoint is written, when an epoch is judged,
when to stop, and what is left in the folder. Lightning's Trainer is the loop over batches and brings
devices, precision and processes; what one step is, ``engram.training.learner`` says.

The folder holds ``checkpoints/last.ckpt`` (everything that the next step depends on),
``checkpoints/best.ckpt`` (the weights that are scored), and, once the training has ended,
``predictions.parquet`` and ``ledger.json``.
"""

from __future__ import annotations

import logging
import math
import platform
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np
import pyarrow as pa
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler

from engram.batches.batch import Batch
from engram.batches.windows import SplitWindows, Windows
from engram.errors import InputError
from engram.ledger import LEDGER, PREDICTIONS, EpochLine, Ledger, Score, SideLine
from engram.store.format import MANIFEST
from engram.store.writer import disk_errors
from engram.training.data import TrainingData, evaluation_loader
from engram.training.learner import Evaluator, Learner
from engram.training.metrics import Task, default_metrics, find_metric, score_predictions
from engram.training.predict import (
    Predictions,
    predict,
    predictions_table,
    train_targets,
    write_table,
)
from engram.training.resume import (
    History,
    check_same,
    get_rng,
    read_checkpoint,
    set_rng,
    write_checkpoint,
)
from engram.training.settings import FitSettings, Precision
from engram.training.watch import MemoryWatch, SignalWatch, heed_signals
from engram.windows.spec import EventWindows

__all__ = ["BEST", "LAST", "Fitted", "Progress", "fit"]

LAST = "checkpoints/last.ckpt"
"""In a training's folder: everything that the next step depends on."""
BEST = "checkpoints/best.ckpt"
"""In a training's folder: the weights that are scored."""

_FREE = ("memory", "memory_share", "memory_every_steps", "checkpoint_every_steps")
"""Settings that no weight depends on: they may change where a training is resumed."""
_LIBRARIES = ("engram", "torch", "lightning", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is, for those who show it."""

    epoch: int
    """The epoch under way, from 0."""
    n_epochs: int
    """Epochs there will be at most."""
    batch: int
    """Batches of it that were trained."""
    n_batches: int
    """Batches of an epoch."""
    metric: str
    """Name of the metric that judges the epochs."""
    used_bytes: int
    """Unreclaimable memory of the process tree when it was last read."""
    message: str = ""
    """What happened just now, in words; empty for one more step."""
    line: EpochLine | None = None
    """The epoch that was finished just now."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fitted:
    """A training that has ended."""

    folder: Path
    """Where everything is."""
    ledger: Ledger
    """What it took, and how well it did."""
    model: nn.Module
    """The network that was given, with the best weights, on the CPU."""

    def __repr__(self) -> str:
        # A notebook shows what its last line gives: the ledger alone would be pages.
        return f"Fitted({str(self.folder)!r}: {self.ledger.stopped})"


class _Asked(Exception):
    """A signal asked for a stop, and the state is saved."""


def fit(
    model: nn.Module,
    sides: SplitWindows,
    folder: Path | str,
    settings: FitSettings | None = None,
    *,
    name: str = "network",
    progress: Callable[[Progress], None] | None = None,
    resume: bool = True,
) -> Fitted:
    """Train a network, score it, and leave a ledger; go on where an earlier call was stopped.

    Called again with the same model, windows, settings and folder, a training goes on from its last
    checkpoint and ends with the very weights that it would have had unbroken, bit for bit, on the
    same kind of machine. A finished one is not repeated: what is there is returned.

    Parameters
    ----------
    model
        Any module. It is called with ``X``: (window, channel, time) float32 of the one signal, or a
        dict of tensors by name where there are several; with ``lengths``, the true samples of each
        window, and with ``recordings``, a list of their ids, if its ``forward`` has such parameters:
        ``forward(X, lengths, recordings)``. It gives (window, 1) for a number,
        (window, class) for classes, or the shape of the signal that is the target. Its weights are
        changed in place.
    sides
        Windows to train on, to stop early and choose the best epoch by, and to report scores of.
    folder
        Where the training is kept; made if it is not there.
    settings
        How to train; None for the defaults.
    name
        What the training is called in its ledger.
    progress
        Called after every optimizer step and whenever something happened; by one process only.
    resume
        False: refuse a folder that already holds a training.

    Returns
    -------
    Fitted
        With the best weights: those of the epoch with the best main metric on the validation
        side; without one, the last.

    Raises
    ------
    InputError
        If settings, windows and model do not go together; if the training windows have no target, or
        are all of one class; if the folder holds a training with other
        settings, windows or model, or is in use; if a loss or gradient is not finite.
    MemoryExceeded
        If memory passed ``memory``, or ``memory_share`` of the limit that binds. A checkpoint was
        written.
    DoesNotFit
        If the loader does not fit beside what the process holds already; with ``resource="disk"``, if
        the disk is full: the checkpoint before is kept.
    StoreNotWritable
        If the folder cannot be written.
    KeyboardInterrupt
        After SIGINT. A checkpoint was written.
    SystemExit
        With 143, after SIGTERM, which batch systems send before they kill. A checkpoint was written.

    Notes
    -----
    Global random generators and PyTorch's switches for determinism are put back as they were. Where
    PyTorch has no deterministic kernel for an operation on the GPU, it warns; resuming is then not
    exact. Under several processes, BatchNorm normalises each process's rows on their own, and its
    running statistics are those of the first one.

    Examples
    --------
    >>> import tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> from engram.windows.splits import Side, Split
    >>> from engram.windows.targets import RecordingColumn
    >>> eeg = engram.ArraySignal(np.ones((800, 2), "float32"), 100.0)
    >>> recordings = {
    ...     name: engram.ArrayRecording({"eeg": eeg}, fields={"subject": name, "age": age})
    ...     for name, age in (("a", 9.0), ("b", 10.0), ("c", 11.0))
    ... }
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(engram.ArraySource(recordings), f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=1.0), RecordingColumn("age"))
    ...     sides = windows.split(Split(test=Side(values=("c",))))
    ...     network = nn.Sequential(nn.Flatten(), nn.Linear(200, 1))
    ...     settings = FitSettings(epochs=2, batch_size=8, accelerator="cpu")
    ...     fitted = fit(network, sides, f"{folder}/training", settings)
    ...     store.close()
    >>> len(fitted.ledger.epochs), fitted.ledger.stopped
    (2, 'all 2 epochs done')
    """
    settings = FitSettings() if settings is None else settings
    folder = Path(folder)
    _check_sides(sides)
    course = _Course(model, sides, folder, settings, name=name, progress=progress)
    with _as_it_was(), _locked(folder, settings):
        course.find(resume=resume)
        if course.history.stopped and (folder / LEDGER).exists():
            course.tell(f"{folder} holds this training, finished: {course.history.stopped}")
        else:
            _train(course, settings, folder)
        model.load_state_dict(read_checkpoint(course.best)["model"])
        return Fitted(folder, Ledger.read(folder), model.cpu())


def _check_sides(sides: SplitWindows) -> None:
    """Refuse windows from which nothing could be learned, however long it took."""
    if not isinstance(sides, SplitWindows):
        raise InputError(
            f"A training needs sides, not {sides!r}. Split the windows: windows.split(Split(test=Side(...)))."
        )
    index = sides.train.index
    if index.task is None:
        raise InputError("These windows have no target. Give one, or use with_targets(values).")
    if index.classes:
        found = np.unique(train_targets(sides.train))
        if len(found) == 1:
            raise InputError(
                f"All {len(sides.train):,} training windows are of the class {index.classes[found[0]]!r}: "
                "there is nothing to tell it from. Compare the names of events and classes with those "
                "of the store (engram inspect)."
            )


def _train(course: _Course, settings: FitSettings, folder: Path) -> None:
    course.watch_memory()
    trainer = _make_trainer(course, settings, folder)
    data = TrainingData(course.sides.train, course.learner, settings)
    try:
        trainer.fit(course.learner, datamodule=data)
    except _Asked:
        assert course.signals is not None
        name = "" if course.signals.received is None else course.signals.received.name
        course.tell(f"stopped by {name}; a checkpoint is written, and the same call goes on from it")
        if name == "SIGTERM":
            sys.exit(128 + 15)  # what a shell shows of a process that SIGTERM ended
        raise KeyboardInterrupt from None
    except SystemExit as error:
        # Lightning turns the KeyboardInterrupt of a second SIGINT into an exit; a notebook that
        # called us is to survive it.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _make_trainer(course: _Course, settings: FitSettings, folder: Path) -> Trainer:
    # On SLURM, Lightning would by default save and requeue from inside a signal handler, in the
    # middle of an accumulation.
    plugins: list[Any] = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy="ddp" if settings.devices > 1 else "auto",
            precision=settings.precision,
            # Lightning counts from where it starts; one epoch at least, so that it starts at all
            # where only the scoring is left.
            max_epochs=max(1, settings.epochs - course.learner.epoch),
            callbacks=[course],
            plugins=plugins,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            reload_dataloaders_every_n_epochs=1,
            # Lightning would wrap the loader and with it the order.
            use_distributed_sampler=False,
            deterministic="warn",
            benchmark=False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".!")
        raise InputError(
            f"accelerator={settings.accelerator!r} with devices={settings.devices} is not to be had here: "
            f'{reason}. Use accelerator = "auto", or "cpu".'
        ) from error


class _Course(Callback):
    """Steers a training from Lightning's hooks; one object from the first look at the folder to the end."""

    def __init__(
        self,
        model: nn.Module,
        sides: SplitWindows,
        folder: Path,
        settings: FitSettings,
        *,
        name: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        index = sides.train.index
        self.task: Task = "classification" if index.classes else "regression"
        self.metrics = settings.metrics or default_metrics(self.task)
        for metric in self.metrics:
            find_metric(metric, self.task)
        if settings.patience is not None and sides.valid is None:
            raise InputError(
                f"patience={settings.patience} needs validation windows to stop by. Split off a "
                "validation side, or leave patience out."
            )
        order = sides.train.order(settings.batch_size, mode=settings.mode, by=settings.by, seed=settings.seed)
        self.sides, self.folder, self.settings, self.name = sides, folder, settings, name
        evaluator = Evaluator(model, settings, index.target, index.classes)
        self.learner = Learner(evaluator, settings, order, sides.train)
        self.history = History()
        self.last = folder / LAST
        self.best = folder / BEST
        self.signals: SignalWatch | None = None
        self._progress = progress
        self._found: dict[str, Any] | None = None
        self._train_targets = train_targets(sides.train)
        self._stack = ExitStack()
        self._memory: MemoryWatch | None = None
        self._clock = 0.0
        self._n_evaluated = 0
        self._rank, self._world = 0, 1

    # ------------------------------------------------------------ what is there

    def find(self, *, resume: bool) -> None:
        """Read the folder's last checkpoint, if it has one, and take the place where it stopped."""
        if not self.last.exists():
            return
        if not resume:
            raise InputError(f"{self.folder} already holds a training. Name another folder, or resume it.")
        found = read_checkpoint(self.last)
        if "trained_with" not in found:
            raise InputError(f"{self.last} holds weights alone, nothing to go on from. Restore it.")
        # Settings that are younger than the checkpoint were as they are by default.
        defaults = {f"settings.{key}": value for key, value in asdict(FitSettings()).items()}
        wanted = self._trained_with()
        told = {key: value for key, value in defaults.items() if key in wanted} | found["trained_with"]
        check_same(told, wanted, self.folder)
        cursor = found["cursor"]
        self.learner.epoch, self.learner.n_batches = cursor["epoch"], cursor["n_batches"]
        self.learner.n_steps, self.learner.n_windows = found["n_steps"], found["n_windows"]
        self.history = History.from_dict(found["history"])
        self._found = found

    def _trained_with(self) -> dict[str, Any]:
        """Name everything that the weights depend on and that somebody might change."""
        settings = {f"settings.{key}": value for key, value in asdict(self.settings).items()}
        windows = {f"windows.{side}": windows.index.fingerprint for side, windows in self.sides.items()}
        weights = self.learner.network.state_dict()
        return {
            **{key: value for key, value in settings.items() if key.partition(".")[2] not in _FREE},
            **windows,
            "order": self.learner.order.fingerprint,
            **{f"model.{key}": _described(value) for key, value in weights.items()},
            **_layers(self.learner.network),
        }

    def tell(self, message: str = "", line: EpochLine | None = None) -> None:
        """Let those who show progress know."""
        if self._progress is not None and self._rank == 0:
            learner = self.learner
            place = (learner.epoch, self.settings.epochs, learner.n_batches, learner.order.n_batches)
            used_bytes = 0 if self._memory is None else self._memory.used_bytes
            self._progress(Progress(*place, self.metrics[0], used_bytes, message, line))

    # ------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue where the last checkpoint was written, or write the first one."""
        self._rank, self._world = trainer.global_rank, trainer.world_size
        # From here on: Lightning has set its own handlers just before.
        self.signals = self._stack.enter_context(heed_signals())
        assert self._memory is not None
        self._stack.enter_context(self._memory.sampling())
        if self._found is None:
            _seed(self.settings.seed, self._rank)
            self._save(trainer)
            if self._rank == 0:
                # What cannot be read back is better known now than after a day.
                read_checkpoint(self.last)
        else:
            self._restore(trainer, self._found)
            self._found = None  # its tensors are copied: free them
            self.tell(f"resumed in epoch {self.learner.epoch + 1}, after batch {self.learner.n_batches}")
        self._read_memory()
        self._heed(trainer)
        if self.history.stopped:
            trainer.should_stop = True
        elif self.learner.is_trained:
            self._finish_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Between two optimizer steps: note memory, write a checkpoint if it is time, heed a stop."""
        learner = self.learner
        if not learner.is_between_steps:
            return
        if learner.n_steps % self.settings.memory_every_steps == 0:
            self._read_memory()
        is_time = learner.n_steps % self.settings.checkpoint_every_steps == 0
        if is_time or learner.is_trained:
            self._save(trainer)
        self.tell()
        self._heed(trainer, is_saved=is_time or learner.is_trained)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the epoch."""
        self._finish_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the best weights and write the ledger."""
        with self._stack:
            self._score(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and stop sampling; what fails then is not to hide what failed."""
        self._stack.__exit__(type(exception), exception, exception.__traceback__)

    # ------------------------------------------------------------ checkpoints

    def _save(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``. Never called inside an accumulation: its gradient would be lost."""
        learner = self.learner
        assert learner.is_between_steps
        self._tick()
        ranks = self._gather({"rng": get_rng(), "loss_sum": learner.loss_sum})
        if self._rank != 0:
            return
        content = {
            "trained_with": self._trained_with(),
            "model": learner.network.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": {} if learner.scheduler is None else learner.scheduler.state_dict(),
            "scaler": trainer.precision_plugin.state_dict(),
            "cursor": {
                "fingerprint": learner.order.fingerprint,
                "epoch": learner.epoch,
                "n_batches": learner.n_batches,
            },
            "n_steps": learner.n_steps,
            "n_windows": learner.n_windows,
            "history": self.history.to_dict(),
            "ranks": ranks,
        }
        self.last.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.last, content)

    def _restore(self, trainer: Trainer, found: Mapping[str, Any]) -> None:
        if len(found["ranks"]) != self._world:
            raise InputError(
                f"The training in {self.folder} was of {len(found['ranks'])} processes, not {self._world}. "
                "Use as many, or train in a new folder."
            )
        learner = self.learner
        learner.network.load_state_dict(found["model"])
        trainer.optimizers[0].load_state_dict(found["optimizer"])
        if learner.scheduler is not None:
            learner.scheduler.load_state_dict(found["scheduler"])
        if found["scaler"]:
            trainer.precision_plugin.load_state_dict(found["scaler"])
        own = found["ranks"][self._rank]
        learner.loss_sum = own["loss_sum"]
        set_rng(own["rng"])

    def _gather(self, value: Any) -> list[Any]:
        """Collect a value of every process, in all of them."""
        values: list[Any] = [None] * self._world
        if self._world == 1:
            return [value]
        torch.distributed.all_gather_object(values, value)
        return values

    def _tick(self, *, trains: bool = True) -> None:
        """Add the time since the last tick to what is kept."""
        now = time.perf_counter()
        self.history.duration_s += now - self._clock
        if trains:
            self.history.epoch_s += now - self._clock
        self._clock = now

    # ------------------------------------------------------------ stopping

    def watch_memory(self) -> None:
        """Begin to watch; stop here where the libraries alone take more than is allowed."""
        self._clock = time.perf_counter()
        self._memory = MemoryWatch(self.settings.memory_share, self.settings.memory)
        self._read_memory()
        # With several processes, the others would wait for one that stops before they have met.
        if self._memory.is_exceeded and self.settings.devices == 1:
            raise self._memory.error("before it began, with little more than PyTorch loaded")

    def _read_memory(self) -> None:
        assert self._memory is not None
        time_s = self.history.duration_s + time.perf_counter() - self._clock
        self.history.note_memory(self._memory.line(time_s=time_s, step=self.learner.n_steps))

    def _heed(self, trainer: Trainer, *, is_saved: bool = True) -> None:
        """Stop all processes, with a checkpoint, if one of them was asked to or is short of memory."""
        assert self._memory is not None
        assert self.signals is not None
        asked = torch.tensor(
            [self.signals.received is not None, self._memory.is_exceeded],
            dtype=torch.int32,
            device=trainer.strategy.root_device,
        )
        if self._world > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        by_signal, by_memory = asked.tolist()
        if not (by_signal or by_memory):
            return
        if not is_saved:
            self._save(trainer)
        if by_memory:
            step = self.learner.n_steps
            self._memory.used_bytes = max(self._gather(self._memory.used_bytes))
            raise self._memory.error(f"after optimizer step {step}, in epoch {self.learner.epoch + 1}")
        raise _Asked

    def _heed_between(self, trainer: Trainer) -> None:
        """Heed a stop in the middle of an evaluation: the state was saved before it began."""
        self._n_evaluated += 1
        if self._n_evaluated % self.settings.memory_every_steps == 0:
            self._read_memory()
        # Processes meet at its end only; one that stopped alone would leave the others waiting.
        if self._world == 1:
            self._heed(trainer)

    # ------------------------------------------------------------ epochs

    def _finish_epoch(self, trainer: Trainer) -> None:
        """Validate, write the epoch's line, decide whether it is the best or the last one."""
        learner, history, settings = self.learner, self.history, self.settings
        self._tick()
        train_loss = sum(self._gather(learner.loss_sum)) / learner.n_windows
        if not math.isfinite(train_loss):
            raise InputError(
                f"The training loss of epoch {learner.epoch + 1} is {train_loss}. Lower learning_rate (now "
                f"{settings.learning_rate}), or use precision='32-true'."
            )
        valid_loss, valid_score = self._validate(trainer)
        if isinstance(learner.scheduler, lr_scheduler.ReduceLROnPlateau):
            learner.scheduler.step(train_loss if valid_loss is None else valid_loss)
        line = EpochLine(
            epoch=learner.epoch,
            train_loss=train_loss,
            valid_loss=valid_loss,
            valid_score=valid_score,
            duration_s=history.epoch_s,
            windows_per_s=learner.n_windows / history.epoch_s,
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
        )
        history.epochs.append(line)
        self._read_memory()
        self._judge(line)
        learner.epoch, learner.n_batches = learner.epoch + 1, 0
        learner.loss_sum, learner.n_windows = 0.0, 0
        self._tick(trains=False)
        history.epoch_s = 0.0
        self._save(trainer)
        self.tell(line=line)
        self._heed(trainer)
        trainer.should_stop = bool(history.stopped)

    def _validate(self, trainer: Trainer) -> tuple[float | None, float | None]:
        if self.sides.valid is None:
            return None, None
        predictions = self._predict(trainer, self.sides.valid)
        score = self._scores("valid", predictions, self.metrics[:1])[0]
        return predictions.loss, score.value

    def _judge(self, line: EpochLine) -> None:
        """Keep the weights if they are the best; say why if the training ends."""
        history, settings = self.history, self.settings
        history.n_worse += 1
        if line.valid_score is not None and self._is_better(line.valid_score):
            history.best_epoch, history.best_score, history.n_worse = line.epoch, line.valid_score, 0
            self._save_best(line.epoch)
        if settings.patience is not None and history.n_worse >= settings.patience:
            history.stopped = f"no better validation score for {history.n_worse} epochs"
        elif line.epoch + 1 == settings.epochs:
            history.stopped = f"all {settings.epochs} epochs done"
        if history.stopped and history.best_epoch is None:
            history.best_epoch = line.epoch
            self._save_best(line.epoch)

    def _is_better(self, score: float) -> bool:
        best = self.history.best_score
        if math.isnan(score) or best is None:
            return not math.isnan(score)
        return score > best if find_metric(self.metrics[0], self.task).higher_is_better else score < best

    def _save_best(self, epoch: int) -> None:
        if self._rank == 0:
            write_checkpoint(self.best, {"model": self.learner.network.state_dict(), "epoch": epoch})

    # ------------------------------------------------------------ predictions and scores

    def _predict(self, trainer: Trainer, windows: Windows) -> Predictions:
        if self._world > 1:
            # BatchNorm's statistics are each process's own until DDP's next forward pass.
            for buffer in self.learner.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        return predict(
            self.learner.evaluate,
            evaluation_loader(windows, self.settings, rank=self._rank, world=self._world),
            device=trainer.strategy.root_device,
            # Not the setting: Lightning takes bfloat16 for float16 on a CPU.
            precision=cast("Precision", trainer.precision),
            between=lambda: self._heed_between(trainer),
        )

    def _scores(self, side: str, predictions: Predictions, metrics: tuple[str, ...]) -> tuple[Score, ...]:
        return score_predictions(
            "network", side, metrics, predictions.target, predictions.prediction, self._train_targets
        )

    def _score(self, trainer: Trainer) -> None:
        """Predict validation and test windows with the best weights; write table and ledger."""
        trainer.strategy.barrier()
        self.learner.network.load_state_dict(read_checkpoint(self.best)["model"])
        scores: list[Score] = []
        tables: list[pa.Table] = []
        notes = _anchor_notes(self.sides.train)
        for side, windows in self.sides.items():
            if side != "train":
                predictions = self._predict(trainer, windows)
                scores += self._scores(side, predictions, self.metrics)
                tables.append(predictions_table(windows, side, predictions))
                notes += _notes(side, windows, predictions)
                self._read_memory()  # a target signal of a million values is at its most here
        self._tick(trains=False)
        if self._rank == 0:
            with disk_errors(self.folder):
                if tables:
                    write_table(
                        self.folder / PREDICTIONS, pa.concat_tables(tables, promote_options="default")
                    )
                self._ledger(tuple(scores), tuple(notes), trainer).write(self.folder)
        trainer.strategy.barrier()

    def _ledger(self, scores: tuple[Score, ...], notes: tuple[str, ...], trainer: Trainer) -> Ledger:
        assert self._memory is not None
        history, network = self.history, self.learner.network
        return Ledger(
            name=self.name,
            task=self.task,
            main_metric=self.metrics[0],
            recipe=_recipe(self.sides.train, self.settings, network),
            versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            machine={
                "n_threads": torch.get_num_threads(),
                "device": _device_name(trainer.strategy.root_device),
                "n_processes": self._world,
                "limit": self._memory.limit.kind,
                "limit_bytes": self._memory.limit.allowed_bytes,
            },
            data=_data(self.sides),
            sides=tuple(_side_line(side, windows) for side, windows in self.sides.items()),
            within_subject=self.sides.within_subject,
            classes=self.sides.train.classes,
            epochs=tuple(history.epochs),
            memory=tuple(history.memory),
            peak_bytes=history.peak_bytes,
            allowed_bytes=self._memory.allowed_bytes,
            scores=scores,
            best_epoch=history.best_epoch,
            n_parameters=sum(weight.numel() for weight in network.parameters() if weight.requires_grad),
            duration_s=history.duration_s,
            stopped=history.stopped,
            notes=notes,
        )


# ---------------------------------------------------------------- what the ledger tells


def _anchor_notes(windows: Windows) -> list[str]:
    """Name anchors that no recording has: most often a slip of the pen, which only counts would show."""
    index = windows.index
    if not isinstance(index.spec, EventWindows):
        return []
    there_are = index.tables.event_texts("description").values
    missing = [name for name in index.spec.anchor if name not in there_are]
    return [f"No recording has an event {', '.join(missing)}, which the anchor names."] if missing else []


def _notes(side: str, windows: Windows, predictions: Predictions) -> list[str]:
    notes = []
    if not windows.classes and windows.target_signal is None and np.ptp(predictions.target) == 0:
        notes.append(f"{side}: every window has the same target, so that nRMSE and r are not defined.")
    if windows.classes and len(np.unique(predictions.target)) == 1:
        notes.append(f"{side}: every window is of one class; the score is over that class alone.")
    if predictions.values_per_kept > 1:
        notes.append(f"{side}: scored on every {predictions.values_per_kept}th value of the target signal.")
    if windows.target_signal is not None and predictions.target.shape[1] == 1:
        notes.append(f"{side}: one row per value of the target signal; correlations are over all of them.")
    return notes


def _recipe(windows: Windows, settings: FitSettings, network: nn.Module) -> dict[str, Any]:
    index = windows.index
    return {
        "model": {"name": type(network).__name__},
        "windows": _named(index.spec),
        "target": _named(index.target),
        "training": asdict(settings),
    }


def _named(value: Any) -> dict[str, Any]:
    return {} if value is None else {"kind": type(value).__name__, **asdict(value)}


def _data(sides: SplitWindows) -> dict[str, Any]:
    store = sides.train.store
    return {
        "store_bytes": sum(stamp.size_bytes for stamp in store.manifest.files.values()),
        "n_recordings": store.recordings.num_rows,
        "n_windows": sum(len(windows) for windows in sides.values()),
        "fingerprints": {side: windows.index.fingerprint for side, windows in sides.items()},
        "refused": dict(sides.train.counts()),
        "unused": dict(sides.unused),
    }


def _side_line(side: str, windows: Windows) -> SideLine:
    return SideLine(
        side,
        len(windows),
        len(np.unique(windows.index.column("recording").codes)),
        len(np.unique(windows.index.subjects().codes)),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _layers(network: nn.Module) -> dict[str, str]:
    """Write out the layers, so that another dropout, which no weight shows, is told by name."""
    said = {
        f"layer {name}": module.extra_repr() if list(module.children()) else repr(module)
        for name, module in network.named_modules()
    }
    # A layer that holds a function shows its address, which is another in every process.
    return {name: re.sub(r" at 0x[0-9a-f]+", "", text) for name, text in said.items() if text}


def _described(value: Any) -> str:
    """Describe an entry of a state dict, so that another architecture is told by name."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


# ---------------------------------------------------------------- surroundings


def _seed(seed: int, rank: int) -> None:
    """Seed the generators that models draw from; each process draws its own dropout."""
    own = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)  # noqa: NPY002 - models may draw from the global generator
    torch.manual_seed(own)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what a training changes for the whole process."""
    rng = get_rng()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)  # it prints its advice from INFO on
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 makes a tree in the way that PyTorch 2.13 deprecates; theirs to mend.
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        log.setLevel(level)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        torch.backends.cudnn.benchmark = benchmark
        set_rng(rng)


@contextmanager
def _locked(folder: Path, settings: FitSettings) -> Iterator[None]:
    """Let one training at a time into a folder; its further processes belong to the first."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Name a folder.")
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} is a store. Name another folder for the training.")
    is_new = not folder.exists()
    is_first = settings.devices == 1 or getattr(rank_zero_only, "rank", 0) == 0
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if is_first:
                lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"Another process trains in {folder}. Wait for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
        if is_new and is_first and {path.name for path in folder.iterdir()} <= {".lock"}:
            shutil.rmtree(folder)  # nothing came of it
