"""Checkpoints: everything that the next optimizer step depends on, in one file.

This module decides what is in a checkpoint, how it is written (whole or not at all) and
read (as data, never executed), and which training may continue from it. When one is written
is ``engram.training.fit``'s: only between optimizer steps, where no gradient is pending.
"""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from engram.atomic import replacing
from engram.errors import InputError
from engram.ledger import EpochLine, MemoryLine
from engram.store.writer import disk_errors

__all__ = ["History", "check_same", "get_rng", "read_checkpoint", "set_rng", "write_checkpoint"]

_VERSION = 1
_MOST_LINES = 2000


@dataclass(slots=True)
class History:
    """What a training remembers beside its tensors: lines for the ledger, and the best so far.

    Examples
    --------
    >>> history = History(duration_s=1.5)
    >>> History.from_dict(history.to_dict()) == history
    True
    """

    epochs: list[EpochLine] = field(default_factory=list)
    """One line per finished epoch."""
    memory: list[MemoryLine] = field(default_factory=list)
    """Memory over time, at most 2000 lines."""
    n_readings: int = 0
    """Readings of memory that were taken."""
    readings_per_line: int = 1
    """How many of them make a line; doubled whenever there are too many."""
    peak_bytes: int = 0
    """The highest reading."""
    duration_s: float = 0.0
    """Wall time, resumed parts added up."""
    epoch_s: float = 0.0
    """Wall time of the training steps of the epoch under way."""
    best_epoch: int | None = None
    """The epoch with the best validation score so far."""
    best_score: float | None = None
    """That score."""
    n_worse: int = 0
    """Epochs since then."""
    stopped: str = ""
    """Why the training ended, in words; empty while it has not."""

    def note_memory(self, line: MemoryLine) -> None:
        """Keep a reading; every second line goes when there are too many."""
        self.peak_bytes = max(self.peak_bytes, line.used_bytes)
        if self.n_readings % self.readings_per_line == 0:
            self.memory.append(line)
        self.n_readings += 1
        if len(self.memory) > _MOST_LINES:
            self.memory = self.memory[::2]
            self.readings_per_line *= 2

    def to_dict(self) -> dict[str, Any]:
        """Give plain dicts, lists, numbers and text."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild from ``to_dict``."""
        epochs = [EpochLine(**line) for line in content["epochs"]]
        memory = [MemoryLine(**line) for line in content["memory"]]
        return cls(**{**content, "epochs": epochs, "memory": memory})


def get_rng() -> dict[str, Any]:
    """Take the state of every global random generator of this process, as tensors and numbers.

    Python's, NumPy's and PyTorch's, the last one on the CPU and on every CUDA device in use.

    Examples
    --------
    >>> state = get_rng()
    >>> first = torch.rand(())
    >>> set_rng(state)
    >>> bool(torch.rand(()) == first)
    True
    """
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - models may draw from it
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call] # unannotated there
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng(state: Mapping[str, Any]) -> None:
    """Put back what ``get_rng`` took.

    Parameters
    ----------
    state
        From this process, or from one with as many CUDA devices.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as in get_rng
    torch.set_rng_state(state["torch"])
    for device, of_device in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(of_device, device)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all: a kill or power cut leaves the one before.

    Parameters
    ----------
    path
        The file; its folder exists.
    content
        Tensors, numbers, text, and lists and dicts of them.

    Raises
    ------
    DoesNotFit
        If the disk is full.
    StoreNotWritable
        If it refuses to be written.
    """
    try:
        with replacing(path) as file:
            torch.save({"version": _VERSION, **content}, file)
    except (OSError, RuntimeError) as error:
        # A full disk fails PyTorch's writer a second time, when it closes the archive, with words of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        with disk_errors(path):
            raise cause from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data: nothing in it is executed.

    Raises
    ------
    InputError
        If it cannot be read, or is of another version.
    """
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, numbers and text. If your model defines get_extra_state, "
            "let it return a tensor; else restore the file."
        ) from error
    except Exception as error:  # a damaged byte leads PyTorch's unpickler to any error there is
        raise InputError(f"{path} cannot be read: {error}. Restore it, or train in a new folder.") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise InputError(f"{path} is no checkpoint that this Engram reads. Use the Engram that wrote it.")
    return content


def _check_sums(path: Path) -> None:
    """Compare the checksums that PyTorch writes and does not read: a flipped bit would be another weight."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} has another checksum")


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a training with anything changed that its weights depend on.

    Parameters
    ----------
    found
        What the checkpoint was trained with, by name.
    wanted
        What is asked for now.
    folder
        The training's, for the message.

    Raises
    ------
    InputError
        If a value differs: the first one, in the order of ``wanted``.
    """
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) == wanted.get(name):
            continue
        kind, _, side = name.partition(".")
        if kind == "windows":
            # Two digests would tell nobody anything.
            raise InputError(
                f"The training in {folder} has other windows on its side {side}: the store, the windows, "
                "the target or the split was another. Train in a new folder, or ask for the same again."
            )
        raise InputError(
            f"The training in {folder} has {name} = {found.get(name)!r}, not {wanted.get(name)!r}. "
            "Train in a new folder, or ask for the same again."
        )
