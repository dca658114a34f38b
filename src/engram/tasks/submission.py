"""Submissions to the EEG Foundation Challenge: plain PyTorch and weights, tried before they are written.

This module decides what the zip holds. ``submission.py`` is the text of ``engram.training.networks``, an
expression for each challenge that builds the network, and the class that the scorer asks for; it imports
neither Engram nor NumPy. Networks of braindecode are named and not copied: for those it imports
braindecode, which the scorer has. Weights are plain tensors, read with ``weights_only``.

References
----------
https://eeg2025.github.io/submission: class ``Submission(SFREQ, DEVICE)``, both getters, file names; the
folders where weights were found: entries of the challenge's participants.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram.atomic import replacing
from engram.batches.windows import Windows
from engram.errors import InputError
from engram.store.writer import disk_errors
from engram.tasks.eeg_challenge import N_CHANS, N_TIMES, SFREQ, steps_of
from engram.tasks.entry import group_trainings
from engram.training import networks
from engram.training.learner import evaluating
from engram.training.networks import InUnit, MeanOf
from engram.training.recipe import Recipe
from engram.training.train import open_training

__all__ = ["CheckedSubmission", "Trial", "write_submission"]

_GPU_BYTES = 20 * 10**9
"""What the scorer's GPU holds."""
_AS_AT_THE_SCORER = (
    "ATCNet",
    "AttentionBaseNet",
    "BDTCN",
    "ContraWR",
    "Deep4Net",
    "EEGInceptionERP",
    "EEGInceptionMI",
    "EEGMiner",
    "EEGNeX",
    "EEGNet",
    "EEGSimpleConv",
    "MSVTNet",
    "SCCNet",
    "SPARCNet",
    "ShallowFBCSPNet",
    "SleepStagerChambon2018",
    "TIDNet",
    "TSception",
    "USleep",
)
"""Networks of braindecode 1.8.1 that were tried in 1.2.0, which the scorer has, and give the same there.
Others are not in it, do not take the weights, or (CTNet, SyncNet) say something else."""
_FACTORS = {"uV": 1e6, "µV": 1e6, "mV": 1e3, "V": 1.0}
"""The scorer hands over volts: how many of the store's unit are one."""
_N_TRIED = 16
"""Windows of each challenge that are predicted by both sides before the zip is written."""
_TRIAL_TIMEOUT_S = 600.0
_TOLERANCE = 1e-4
"""Largest difference of a prediction, in the target's unit or relative to it: float32 in another order."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one challenge's network did in a process of its own."""

    challenge: str
    """Name of the challenge."""
    n_networks: int
    """Networks whose mean it predicts."""
    weights_bytes: int
    """Bytes of its weights in the zip, before they are compressed."""
    window_s: float
    """Seconds per window, batch of one, on this machine."""
    largest_difference: float
    """Between its predictions and those of the trained networks."""
    n_windows: int
    """Windows that were tried."""


@dataclass(frozen=True, slots=True)
class CheckedSubmission:
    """A submission that was written, and what was seen when it was tried."""

    path: Path
    """The zip."""
    n_bytes: int
    """Its size."""
    trials: tuple[Trial, ...]
    """Of each challenge."""
    peak_bytes: int
    """Most memory of the trying process, PyTorch included."""
    gpu_bytes: int | None
    """Most memory on the GPU; None where it was tried on a CPU."""
    libraries: tuple[str, ...]
    """What ``submission.py`` imports beside Python's own."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What the zip holds for one challenge, and what it has to say."""

    name: str
    expression: str
    network: nn.Module
    X: Tensor
    expected: NDArray[np.float32]
    n_networks: int


def write_submission(folders: Sequence[Path | str], path: Path | str) -> CheckedSubmission:
    """Write a submission of trained networks, after trying it as the scorer would.

    Parameters
    ----------
    folders
        Trainings, at least one for each challenge; which it is for, its target says. The networks of one
        challenge are averaged.
    path
        The zip. It is written when the trial has passed, and not before.

    Returns
    -------
    CheckedSubmission
        What was written, and what the trial measured.

    Raises
    ------
    InputError
        If a challenge has no training, a training is of another target, unit, rate or form, was trained
        on R5 or on a store with steps, is given twice, or is of a network that the scorer's braindecode is
        not known to have alike; or if the submission does not do in a bare process what the trained networks
        do.
    StoreMissing, StoreDamaged
        If a training's store cannot be read.
    StoreNotWritable, DoesNotFit
        If the zip cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} is no file in a folder that is there. Name one, such as submission.zip.")
    with disk_errors(path.parent):  # known better now than after the trial
        tempfile.TemporaryFile(dir=path.parent).close()
    by_challenge = group_trainings(folders)
    for name, found in by_challenge.items():
        if not found:
            raise InputError(f"No training predicts the target of {name}. Give one for each challenge.")
    entries = [_entry(name, found) for name, found in by_challenge.items()]
    content = {"submission.py": _program(entries).encode()}
    content |= {f"weights_{_numbered(entry.name)}.pt": _weights(entry.network) for entry in entries}
    packed = _zipped(content)
    trials, peak_bytes, gpu_bytes = _try(packed, entries, content)
    with disk_errors(path.parent), replacing(path) as file:
        file.write(packed)
    is_needed = b"import braindecode.models" in content["submission.py"]
    libraries = ("torch", "braindecode") if is_needed else ("torch",)
    return CheckedSubmission(path, len(packed), trials, peak_bytes, gpu_bytes, libraries)


def _entry(name: str, folders: Sequence[Path]) -> _Entry:
    """Join the networks of one challenge, and predict some windows with each of them."""
    parts: list[nn.Module] = []
    expressions, expected = [], []
    X = torch.empty(0)  # noqa: N806 - braindecode's word
    factors: list[float] = []
    for folder in folders:
        with open_training(folder) as training:
            windows = training.sides.test or training.sides.valid or training.sides.train
            _check_network(training.recipe.model.name, folder)
            factors.append(_factor(windows, folder))
            if len(set(factors)) > 1:
                raise InputError(f"The trainings of {name} differ in unit. Prepare all in microvolts.")
            if not parts:
                numbers = np.unique(np.linspace(0, len(windows) - 1, _N_TRIED).astype(np.int64))
                X = windows.read(numbers).signals[windows.inputs[0]].clone()  # noqa: N806 - as above
            network = training.network.cpu()
            with evaluating(network):
                expected.append(network(X).numpy(force=True)[:, 0])
            if not np.isfinite(expected[-1]).all():
                raise InputError(f"{folder} predicts what is no finite number. Train it again, more slowly.")
            parts.append(network)
            expressions.append(_expression(training.recipe, windows))
    factor = factors[0]
    joined = InUnit(MeanOf(parts), factor)
    text = f"InUnit(MeanOf([{', '.join(expressions)}]), {factor!r})"
    return _Entry(name, text, joined, X / factor, np.mean(expected, axis=0), len(parts))


def _check_network(name: str, folder: Path) -> None:
    if not hasattr(networks, name) and name not in _AS_AT_THE_SCORER:
        raise InputError(
            f"{folder} trained {name}, and it is not known that braindecode 1.2.0, which the scorer has, "
            f"gives the same. Use a network of Engram's, or one of: {', '.join(_AS_AT_THE_SCORER)}."
        )


def _factor(windows: Windows, folder: Path) -> float:
    """Check steps, rate, form and unit of what a training read; give units per volt."""
    if windows.sfreq != SFREQ:
        raise InputError(
            f"{folder} was trained at {windows.sfreq:g} Hz, and the scorer has {SFREQ} Hz. Prepare the "
            "challenge's own files."
        )
    if steps := steps_of(windows.store):
        raise InputError(
            f"{folder} was trained on a store that was prepared with {', '.join(steps)}, and the scorer "
            "hands over recordings as they were released. Prepare without steps, and train on that."
        )
    if (windows.n_chans, windows.n_times) != (N_CHANS, N_TIMES):
        raise InputError(
            f"{folder} reads windows of {windows.n_chans} channels and {windows.n_times} samples, and the "
            f"scorer hands over {N_CHANS} and {N_TIMES}. Train on all channels and 2 s (crop_s = 2.0)."
        )
    units = windows.units
    if len(units) != 1 or units[0] not in _FACTORS:
        raise InputError(
            f"{folder} was trained on channels in {', '.join(units) or 'no unit'}, and the scorer has volts. "
            "Prepare in microvolts."
        )
    return _FACTORS[units[0]]


def _expression(recipe: Recipe, windows: Windows) -> str:
    """Spell the network as Python without its weights, as ``engram.training.models`` builds it."""
    framing, name = recipe.model.framing, recipe.model.name
    n_times = -(-windows.n_times // framing.downsample)
    facts = {
        "n_chans": windows.n_chans,
        "n_times": n_times,
        "sfreq": windows.sfreq / framing.downsample,
        "n_outputs": windows.n_outputs,
    }
    own = getattr(networks, name, None)
    if own is not None:
        facts = {key: value for key, value in facts.items() if key in own.__init__.__code__.co_varnames}
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recipe.model.arguments.items()
    }
    arguments = ", ".join(f"{key}={_literal(value)}" for key, value in {**facts, **given}.items())
    text = f"{'' if own is not None else 'braindecode.models.'}{name}({arguments})"
    layers = []
    if framing.scaling == "window":
        layers.append("WindowScaling()")
    if framing.scaling == "channel":
        layers.append(f"ChannelScaling(torch.zeros({windows.n_chans}), torch.ones({windows.n_chans}))")
    if framing.downsample > 1:
        layers.append(f"Downsample({framing.downsample})")
    if layers:
        text = f"nn.Sequential({', '.join(layers)}, {text})"
    if framing.reach is not None:
        text = f"Bounded({text}, 0.0, {framing.reach!r})"
    if framing.test_shifts:
        text = f"ShiftedMean({text}, {framing.test_shifts!r})"
    return text


def _literal(value: Any) -> str:
    """Spell an argument: a number, a truth, a tuple of them, or a layer of ``torch.nn`` by its name."""
    if isinstance(value, str):
        for home in (nn, _braindecode_modules()):
            if isinstance(getattr(home, value, None), type):
                return f"{'nn' if home is nn else 'braindecode.modules'}.{value}"
    return repr(value)


def _braindecode_modules() -> ModuleType | None:
    return sys.modules.get("braindecode.modules")


def _program(entries: Sequence[_Entry]) -> str:
    text = (files("engram.tasks") / "submission_template.txt").read_text(encoding="utf-8")
    own = (files("engram.training") / "networks.py").read_text(encoding="utf-8")
    own = own.partition("__all__ = [")[0] + own.partition("__all__ = [")[2].partition("]\n")[2]
    builders = "\n\n\n".join(
        f"def _{_numbered(entry.name)}() -> nn.Module:\n    return {entry.expression}" for entry in entries
    )
    needs_braindecode = any("braindecode.models." in entry.expression for entry in entries)
    imports = "\nimport braindecode.models\nimport braindecode.modules\n" if needs_braindecode else ""
    # A docstring and an import of the future come first in a file: the networks' own begin it.
    return f"{own.rstrip()}\n\n{imports}\n{text.replace('BUILDERS', builders)}"


def _numbered(name: str) -> str:
    """Give the organisers' other spelling: ``challenge_1``."""
    return f"{name[:-1]}_{name[-1]}"


def _weights(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def _zipped(content: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            # A fixed time: the same networks give the same zip.
            packed.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


_TRIAL = """
import json, resource, sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "engram":
            raise ImportError("a submission may not import engram")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch

windows = torch.load(sys.argv[2], weights_only=True)
from submission import Submission

def no_bridge(*_, **__):
    raise RuntimeError("a submission may not go by way of NumPy")

def predict(name, X, device):
    network = getattr(Submission(100, device), f"get_model_{name}")()
    network.eval()
    bridges = torch.from_numpy, torch.Tensor.numpy
    torch.from_numpy = torch.Tensor.numpy = no_bridge
    out, begin = [], time.perf_counter()
    with torch.inference_mode():
        for i in range(len(X)):
            out.append(float(network.forward(X[i : i + 1].to(device))[0][0]))
    torch.from_numpy, torch.Tensor.numpy = bridges
    return {"predictions": out, "window_s": (time.perf_counter() - begin) / len(X)}

# Compared on the CPU: a GPU rounds convolutions to 10 bits, in the scorer too.
said = {name: predict(name, X, torch.device("cpu")) for name, X in windows.items()}
said["gpu_bytes"] = None
if torch.cuda.is_available():
    for name, X in windows.items():
        on_gpu = predict(name, X, torch.device("cuda"))
        said[name] |= {"window_s": on_gpu["window_s"], "on_gpu": on_gpu["predictions"]}
    said["gpu_bytes"] = torch.cuda.max_memory_reserved()
said["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(said))
"""
"""What the scorer does: unpacked in an empty folder, one window at a time, in a process of its own."""


def _try(
    packed: bytes, entries: Sequence[_Entry], content: Mapping[str, bytes]
) -> tuple[tuple[Trial, ...], int, int | None]:
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, "unpacked")
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            archive.extractall(unpacked)
        windows = Path(folder, "windows.pt")
        torch.save({_numbered(entry.name): entry.X for entry in entries}, windows)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _TRIAL, str(unpacked), str(windows)],
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,
                env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
                timeout=_TRIAL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"The submission takes longer than {_TRIAL_TIMEOUT_S:g} s for {2 * _N_TRIED} windows. Use "
                "smaller networks."
            ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise InputError(f"The submission does not run by itself: {last[0]}. Use another model.")
    said = json.loads(done.stdout.splitlines()[-1])
    trials = tuple(_trial(entry, said[_numbered(entry.name)], content) for entry in entries)
    gpu_bytes = said["gpu_bytes"]
    if gpu_bytes is not None and gpu_bytes > _GPU_BYTES:
        raise InputError(
            f"The submission takes {gpu_bytes / 1e9:.1f} GB of the GPU, and the scorer's has "
            f"{_GPU_BYTES / 1e9:.0f} GB. Give fewer or smaller networks."
        )
    return trials, int(said["peak_bytes"]), gpu_bytes


def _trial(entry: _Entry, said: Mapping[str, Any], content: Mapping[str, bytes]) -> Trial:
    predictions = np.array(said["predictions"])
    difference = np.abs(predictions - entry.expected)
    allowed = _TOLERANCE * np.maximum(1.0, np.abs(entry.expected))
    if not (difference <= allowed).all():
        worst = int(np.argmax(difference - allowed))
        raise InputError(
            f"The submission predicts {predictions[worst]:.6f} for a window of {entry.name}, the trained "
            f"networks {entry.expected[worst]:.6f}. This is a mistake of Engram's: please report it."
        )
    if not np.isfinite(said.get("on_gpu", 0.0)).all():
        raise InputError(
            f"On the GPU the networks of {entry.name} predict what is no finite number. Use others."
        )
    n_bytes = len(content[f"weights_{_numbered(entry.name)}.pt"])
    return Trial(
        entry.name, entry.n_networks, n_bytes, said["window_s"], float(difference.max()), len(predictions)
    )
