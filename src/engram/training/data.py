"""The training windows as Lightning wants them: from the place where the training stands to the epoch's end.

This module decides nothing about order or reading. It is asked by Lightning for a loader at the start
of every epoch, and gives what is left of that epoch: Lightning's own count of epochs and batches begins
anew where a training is resumed, and no state of its loops has to be restored.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule

from engram.batches.batch import Batch
from engram.batches.loader import Loader, shared_budget
from engram.batches.windows import Windows
from engram.training.learner import Learner
from engram.training.settings import FitSettings
from engram.windows.order import Cursor, Order

__all__ = ["Rest", "TrainingData", "evaluation_loader"]


class Rest:
    """What is left of an epoch: sized, and iterable any number of times.

    Parameters
    ----------
    loader
        The loader.
    cursor
        Where to begin.
    """

    def __init__(self, loader: Loader, cursor: Cursor) -> None:
        self._loader = loader
        self._cursor = cursor

    def __len__(self) -> int:
        return len(self._loader) - self._cursor.n_batches

    def __iter__(self) -> Iterator[Batch]:
        self._loader.load_state_dict(self._cursor.to_dict())
        return iter(self._loader)


class TrainingData(LightningDataModule):
    """Gives Lightning the training batches.

    Parameters
    ----------
    windows
        The training side.
    learner
        Whose place in the order counts: batches that were trained, not those that were read.
    settings
        For the loader's memory budget.
    """

    def __init__(self, windows: Windows, learner: Learner, settings: FitSettings) -> None:
        super().__init__()
        self._windows = windows
        self._learner = learner
        self._settings = settings
        self._loader: Loader | None = None

    def train_dataloader(self) -> Rest:
        """Give the rest of the epoch under way; of the next one where every batch of it was trained."""
        learner = self._learner
        if self._loader is None:
            assert self.trainer is not None
            rank, world = self.trainer.global_rank, self.trainer.world_size
            self._loader = _loader(
                self._windows, learner.order, self._settings, rank=rank, world=world, is_drawn=True
            )
        place = (learner.epoch + 1, 0) if learner.is_trained else (learner.epoch, learner.n_batches)
        return Rest(self._loader, Cursor(learner.order.fingerprint, *place))


def evaluation_loader(windows: Windows, settings: FitSettings, *, rank: int = 0, world: int = 1) -> Loader:
    """Make a loader that visits every window exactly once.

    Parameters
    ----------
    windows
        Any side.
    settings
        Batch size and budget. Where training batches hold one group each, these do as well, since
        groups may differ in form.
    rank, world
        This process's number, and how many there are.
    """
    in_groups = settings.mode == "groups"
    order = windows.order(
        settings.batch_size,
        mode="groups" if in_groups else "sequential",
        by=settings.by if in_groups else None,
        drop_last=False,
    )
    return _loader(windows, order, settings, rank=rank, world=world)


def _loader(
    windows: Windows, order: Order, settings: FitSettings, *, rank: int, world: int, is_drawn: bool = False
) -> Loader:
    budget = shared_budget(settings.memory, windows, order)
    return Loader(windows, order, budget=budget, rank=rank, world=world, is_drawn=is_drawn)
