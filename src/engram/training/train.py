"""A recipe carried out: trained, scored again on other recordings, used to predict.

This module decides what a recipe's tables are handed to. The training itself is
``engram.training.fit``'s, the networks and baselines are ``engram.training.models``'.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from engram.batches.windows import SplitWindows, Windows
from engram.errors import InputError, StoreMissing
from engram.ledger import LEDGER, Ledger, Score
from engram.store.reader import Store
from engram.training.data import evaluation_loader
from engram.training.fit import BEST, Fitted, Progress, fit
from engram.training.learner import Evaluator
from engram.training.metrics import default_metrics, score_predictions
from engram.training.models import build_model, fit_ridge
from engram.training.predict import Predictions, predict, predictions_table, train_targets
from engram.training.recipe import Recipe, mistakes
from engram.training.resume import read_checkpoint
from engram.windows.targets import EventColumn, RecordingColumn, Target

__all__ = [
    "Evaluation",
    "Training",
    "evaluate",
    "open_training",
    "predict_windows",
    "start_at_mean",
    "train",
]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a trained network says of windows, and how well."""

    scores: tuple[Score, ...]
    """Each metric beside its chance level; none where targets were not looked at."""
    predictions: pa.Table
    """One row per window, as ``engram.ledger.PREDICTIONS`` describes."""
    refused: Mapping[str, int]
    """What was left out, by reason."""
    within_subject: bool
    """True if windows of the training are of the same subjects: the scores then say nothing about
    unseen people."""


def train(
    recipe: Recipe, folder: Path | str, *, progress: Callable[[Progress], None] | None = None
) -> Fitted:
    """Train what a recipe says; go on where an earlier call with the same recipe was stopped.

    Parameters
    ----------
    recipe
        As ``read_recipe`` gives it.
    folder
        Where the training is kept; made if it is not there.
    progress
        As for ``fit``.

    Returns
    -------
    Fitted
        Its ledger has the scores of the network and of the recipe's baselines.

    Raises
    ------
    InputError
        If the recipe does not go together with the store, or ``folder`` holds another training.
    StoreMissing, StoreFormatError, StoreDamaged
        If the store cannot be read.
    MemoryExceeded, DoesNotFit, KeyboardInterrupt, SystemExit
        As ``fit`` does, or because no ridge fits beside the trained network: the same call goes on
        where it was stopped.
    """
    folder = Path(folder)
    with Store(recipe.store) as store:
        sides = _split(recipe, store)
        seed = recipe.training.seed
        network = build_model(
            recipe.model.name,
            sides.train,
            recipe.model.arguments,
            seed=seed,
            framing=recipe.model.framing,
        )
        if not sides.train.classes:
            start_at_mean(network, train_targets(sides.train))
        fitted = fit(network, sides, folder, recipe.training, name=recipe.name, progress=progress)
        ledger = fitted.ledger
        # Of several processes the first one fits the baselines and writes them down.
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if is_first and "baselines" not in ledger.recipe.get("model", {}):
            # A path from folder to store, so that both can be moved together.
            content = recipe.to_dict() | {"store": os.path.relpath(recipe.store, folder)}
            ledger = replace(_with_baselines(ledger, recipe, sides), recipe=content)
            ledger.write(folder)
        return replace(fitted, ledger=ledger)


def start_at_mean(network: nn.Module, targets: NDArray[np.float32]) -> None:
    """Let a network begin with the mean of the training targets, by the bias of its last linear layer.

    From zero, response times of 1.3 s cost the first epochs: on a corpus of 40 subjects SCCNet then
    needed three times the learning rate for the same score. A network without such a layer stays as
    it is.

    Parameters
    ----------
    network
        From windows to (window, output).
    targets
        (window, output) float32 of the training side.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear | _Convolution)]
    if linear and linear[-1].bias is not None and linear[-1].bias.shape == targets.shape[1:]:
        with torch.no_grad():
            linear[-1].bias.copy_(torch.from_numpy(targets.mean(axis=0)))


def _split(recipe: Recipe, store: Store) -> SplitWindows:
    return _windows(recipe, store, recipe.target_value).split(recipe.split)


def _windows(recipe: Recipe, store: Store, target: Target | None) -> Windows:
    # Recordings may differ in form only where no batch mixes them.
    return store.windows(recipe.windows.value, target, same_form=recipe.training.mode != "groups")


def _with_baselines(ledger: Ledger, recipe: Recipe, sides: SplitWindows) -> Ledger:
    """Score the baselines on the windows and by the metrics that the network was scored by."""
    if not recipe.model.baselines:
        return ledger
    ridge = fit_ridge(sides, memory=recipe.training.memory)
    metrics = tuple(dict.fromkeys(score.metric for score in ledger.scores))
    seen = train_targets(sides.train)
    scores: list[Score] = []
    for side, prediction in ridge.predictions.items():
        windows = sides[side]
        scores += score_predictions("ridge", side, metrics, train_targets(windows), prediction, seen)
    return replace(ledger, scores=(*ledger.scores, *scores), notes=(*ledger.notes, ridge.note))


def evaluate(
    folder: Path | str,
    *,
    side: str = "test",
    store: Path | str | None = None,
    memory: int | str | None = None,
) -> Evaluation:
    """Score a trained network on a side of its own split, or on every window of another store.

    Parameters
    ----------
    folder
        Of a training by ``train``.
    side
        ``"train"``, ``"valid"`` or ``"test"`` of its own store.
    store
        Another store, all of whose windows are scored. None for the training's own.
    memory
        What evaluating may hold, the libraries included; None for what there is.

    Raises
    ------
    InputError
        If the folder holds no finished training of a recipe, its split has no such side, its store
        has changed, or the other store's windows have another form than those that it was trained on.
    StoreMissing, StoreFormatError, StoreDamaged
        If a store cannot be read. The training's own is needed for the other's chance level, too.
    """
    folder = Path(folder)
    ledger, recipe = _told(folder)
    with _own_store(folder, recipe) as own, Store(store or recipe.store) as other:
        sides = _split(recipe, own)
        _check_unchanged(ledger, sides, recipe.store)
        if store is None:
            if side not in sides:
                raise InputError(f"This training has no side {side!r}. Use one of: {', '.join(sides)}.")
            windows = sides[side]
        else:
            target = recipe.target_value
            if isinstance(target, EventColumn | RecordingColumn) and ledger.classes:
                # Numbered as the network knows them, whichever of them occur here.
                target = replace(target, classes=ledger.classes)
            windows, side = _windows(recipe, other, target), "other"
        evaluator = _evaluator(folder, ledger, recipe, windows)
        predictions = _predicted(evaluator, windows, recipe, memory)
        metrics = recipe.training.metrics or default_metrics(
            "classification" if ledger.classes else "regression"
        )
        trained = train_targets(sides.train)
        scores = score_predictions(
            "network", side, metrics, predictions.target, predictions.prediction, trained
        )
        # The validation side chose the epoch: its people are not unseen either.
        seen = _people(sides.train) | (_people(sides.valid) if sides.valid else set())
        is_other = store is not None
        is_shared = not seen.isdisjoint(_people(windows)) if is_other else sides.within_subject
        is_shared |= side == "train"
        table = predictions_table(windows, side, predictions)
        return Evaluation(scores, table, windows.counts(), is_shared)


def predict_windows(folder: Path | str, store: Path | str, *, memory: int | str | None = None) -> Evaluation:
    """Predict every window of a store, whether its target is known or not.

    Parameters
    ----------
    folder
        Of a training by ``train``.
    store
        Whose windows are predicted.
    memory
        What predicting may hold, the libraries included; None for what there is.

    Returns
    -------
    Evaluation
        Without scores; its table has no column ``target``.

    Raises
    ------
    InputError
        If the folder holds no finished training of a recipe, or the store's windows have another
        form than those that it was trained on.
    StoreMissing, StoreFormatError, StoreDamaged
        If the store cannot be read.
    """
    folder = Path(folder)
    ledger, recipe = _told(folder)
    with Store(store) as opened:
        windows = _windows(recipe, opened, None)
        evaluator = _evaluator(folder, ledger, recipe, windows)
        predictions = _predicted(evaluator, windows, recipe, memory)
        table = predictions_table(windows, "predicted", predictions)
        return Evaluation((), table, windows.counts(), within_subject=False)


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """A training that has ended, opened again."""

    ledger: Ledger
    """What it took, and how well it did."""
    recipe: Recipe
    """What it was told; its store is found from the folder."""
    sides: SplitWindows
    """Its windows."""
    network: nn.Module
    """With the best weights, on the CPU."""


@contextmanager
def open_training(folder: Path | str) -> Iterator[Training]:
    """Open a training of a recipe; its store is closed at the end.

    Parameters
    ----------
    folder
        Of a training by ``train``.

    Raises
    ------
    InputError
        If the folder holds no finished training of a recipe, or its store has changed.
    StoreMissing, StoreFormatError, StoreDamaged
        If its store cannot be read.
    """
    folder = Path(folder)
    ledger, recipe = _told(folder)
    with _own_store(folder, recipe) as store:
        sides = _split(recipe, store)
        _check_unchanged(ledger, sides, recipe.store)
        yield Training(ledger, recipe, sides, _evaluator(folder, ledger, recipe, sides.train).network)


def _told(folder: Path) -> tuple[Ledger, Recipe]:
    """Read back what a training was told, its store found from the folder."""
    ledger = Ledger.read(folder)
    if "store" not in ledger.recipe:  # as a fit in Python leaves it
        raise InputError(
            f"{folder} holds a training that was not made from a recipe. Evaluate it where it was made, "
            "in Python, or train with engram train."
        )
    try:
        recipe = Recipe.model_validate_json(json.dumps(ledger.recipe), strict=True)
    except ValidationError as error:
        raise InputError(f"The recipe in {folder / LEDGER}: {mistakes(error)} Restore it.") from error
    return ledger, recipe.model_copy(update={"store": str(folder / recipe.store)})


def _own_store(folder: Path, recipe: Recipe) -> Store:
    try:
        return Store(recipe.store)
    except StoreMissing as error:
        raise StoreMissing(
            f"The store that {folder} was trained on is not at {recipe.store} any more; chance is computed "
            "from its training windows. Put it back, or move store and training together."
        ) from error


def _people(windows: Windows) -> set[str | None]:
    return {*windows.index.subjects().values}


def _check_unchanged(ledger: Ledger, sides: SplitWindows, store: str) -> None:
    """Refuse a store that splits otherwise now: who was trained on could be among the tested."""
    found = {side: windows.index.fingerprint for side, windows in sides.items()}
    if found != ledger.data.get("fingerprints"):
        raise InputError(
            f"{store} has changed since this training: its windows are not the same. Restore it, or give "
            "the recordings that are new as a store of their own."
        )


def _evaluator(folder: Path, ledger: Ledger, recipe: Recipe, windows: Windows) -> Evaluator:
    """Build the network for windows of this form, with the best weights."""
    outputs = windows
    if windows.index.task is None:
        # Only their number matters, to the size of the last layer.
        zero = 0 if ledger.classes else 0.0
        outputs = windows.with_targets(np.full(len(windows), zero), ledger.classes)
    network = build_model(
        recipe.model.name,
        outputs,
        recipe.model.arguments,
        framing=recipe.model.framing,
        has_constants=False,
    )
    try:
        network.load_state_dict(read_checkpoint(folder / BEST)["model"])
    except RuntimeError as error:
        # PyTorch names every weight; the first says enough.
        reason = " ".join(str(error).partition("\n")[2].strip().partition("\n")[0].split())
        raise InputError(
            f"The weights in {folder} are of another network, or of windows of another form: "
            f"{textwrap.shorten(reason, 200).rstrip('.')}. Give windows with the same channels and samples, "
            f"and {LEDGER} as it was."
        ) from error
    return Evaluator(network, recipe.training, windows.index.target, ledger.classes)


def _predicted(
    evaluator: Evaluator, windows: Windows, recipe: Recipe, memory: int | str | None
) -> Predictions:
    loader = evaluation_loader(windows, replace(recipe.training, memory=memory))
    return predict(evaluator, loader, device=torch.device("cpu"))
