"""An entry to the EEG Foundation Challenge: trainings of both challenges, scored on releases they never saw.

This module decides which trainings belong together, which releases say something about them, and what is
told of a score: chance, how far it can be trusted, and what was left out. The score itself is
``eeg_challenge``'s, the interval ``engram.report.predictions``', the page ``entry_page``'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engram.batches.windows import Windows
from engram.errors import InputError
from engram.ledger import Ledger
from engram.report.predictions import Predictions, interval, weighted_interval
from engram.store.reader import Store
from engram.tasks.eeg_challenge import (
    CHALLENGES,
    N_CHANS,
    N_TIMES,
    SFREQ,
    Challenge,
    ChallengeScore,
    challenge_of,
    check_cutting,
    overall,
    pool_scores,
    releases_in,
    releases_of,
    score_challenge,
    steps_of,
    trained_releases,
)
from engram.training.metrics import find_metric
from engram.training.networks import MeanOf
from engram.training.predict import train_targets
from engram.training.train import open_training

__all__ = ["ChallengeEntry", "EntryScore", "Member", "ReleaseScore", "group_trainings", "score_entry"]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One training of an entry."""

    folder: Path
    """Where it lies."""
    ledger: Ledger
    """What it took."""
    trained_on: tuple[str, ...]
    """Releases of its training side."""
    chosen_on: tuple[str, ...]
    """Releases of its validation side, which chose the epoch: scores on them are too good."""
    train_mean: float
    """Mean of its training targets."""

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.ledger.recipe["model"]["name"])

    @property
    def seed(self) -> int:
        """Seed of its first weights and of its order."""
        return int(self.ledger.recipe["training"]["seed"])


@dataclass(frozen=True, slots=True, eq=False)
class ReleaseScore:
    """How an entry did in one challenge on a release, or on several that are pooled."""

    releases: tuple[str, ...]
    """Which."""
    score: ChallengeScore
    """As the organisers score."""
    chance: float
    """Score of the constant that is the mean of the scored targets: 1.0, or NaN where they are all one."""
    chance_beforehand: float
    """Score of the constant that is the mean of the training targets, which is known before the test; of
    several trainings, the mean of their means."""
    interval: tuple[float, float] | None
    """95 % interval of the score over subjects, by ``engram.report.predictions.interval``; None with fewer
    than ten of them."""
    refused: Mapping[str, int]
    """What was left out, by reason."""

    @property
    def n_windows(self) -> int:
        """Windows that were scored."""
        return len(self.score.targets)

    @property
    def n_subjects(self) -> int:
        """Subjects that they come from."""
        return len(self.score.by_subject)

    @property
    def predictions(self) -> Predictions:
        """Targets and predictions as figures and intervals take them."""
        return _as_predictions(self.score)


@dataclass(frozen=True, slots=True, eq=False)
class ChallengeEntry:
    """How an entry did in one challenge."""

    challenge: Challenge
    """Which."""
    members: tuple[Member, ...]
    """Trainings whose networks are averaged."""
    releases: Mapping[str, ReleaseScore]
    """Each release by itself."""
    pooled: ReleaseScore
    """All of them together."""


@dataclass(frozen=True, slots=True, eq=False)
class EntryScore:
    """How an entry did."""

    store: Path
    """Where the windows were read from."""
    n_unprepared: int
    """Recordings that could not be prepared, and are not in the store."""
    steps: tuple[str, ...]
    """Names of the steps that the store was prepared with: the scorer's recordings have had none."""
    challenges: Mapping[str, ChallengeEntry]
    """By name; those that a training was given for."""
    overall: float | None = field(init=False)
    """The figure of the leaderboard, over all releases pooled; None if a challenge is missing."""
    interval: tuple[float, float] | None = field(init=False)
    """Its 95 % interval over subjects; a subject is drawn for both challenges at once."""

    def __post_init__(self) -> None:
        pooled = [each.pooled for each in self.challenges.values()]
        is_whole = set(self.challenges) == set(CHALLENGES)
        weighed = [(CHALLENGES[each.score.name].weight, each.predictions) for each in pooled]
        object.__setattr__(self, "overall", overall([each.score for each in pooled]) if is_whole else None)
        object.__setattr__(self, "interval", weighted_interval(weighed, "nrmse") if is_whole else None)

    @property
    def releases(self) -> tuple[str, ...]:
        """Releases that were scored."""
        return next(iter(self.challenges.values())).pooled.releases

    def chosen_on(self) -> dict[str, tuple[str, ...]]:
        """Name the trainings whose epoch was chosen by a release that is scored here: release -> folders."""
        members = [member for each in self.challenges.values() for member in each.members]
        found = {
            release: tuple(str(member.folder) for member in members if release in member.chosen_on)
            for release in self.releases
        }
        return {release: folders for release, folders in found.items() if folders}

    def to_dict(self) -> dict[str, Any]:
        """Give plain dicts, lists, numbers and text; None where a figure is not defined."""
        return {
            "challenge": "eeg2025",
            "store": str(self.store),
            "n_unprepared": self.n_unprepared,
            "steps": list(self.steps),
            "releases": list(self.releases),
            "overall": _plain(self.overall),
            "interval": self.interval and list(self.interval),
            "interval_is": (
                "95 %, whole subjects drawn 2,000 times with seed 0; null with fewer than ten subjects"
            ),
            "chosen_on": {release: list(folders) for release, folders in self.chosen_on().items()},
            "challenges": {
                name: {
                    "weight": each.challenge.weight,
                    "trainings": [_member_dict(member) for member in each.members],
                    "pooled": _release_dict(each.pooled),
                    "releases": {key: _release_dict(one) for key, one in each.releases.items()},
                }
                for name, each in self.challenges.items()
            },
        }


def _member_dict(member: Member) -> dict[str, Any]:
    ledger = member.ledger
    return {
        "folder": str(member.folder),
        "model": member.model,
        "seed": member.seed,
        "n_parameters": ledger.n_parameters,
        "trained_on": list(member.trained_on),
        "chosen_on": list(member.chosen_on),
        "train_mean": member.train_mean,
        "peak_bytes": ledger.peak_bytes,
        "allowed_bytes": ledger.allowed_bytes,
    }


def _release_dict(one: ReleaseScore) -> dict[str, Any]:
    return {
        "nrmse": _plain(one.score.nrmse),
        "chance": _plain(one.chance),
        "chance_beforehand": _plain(one.chance_beforehand),
        "interval": one.interval and list(one.interval),
        "n_windows": one.n_windows,
        "n_subjects": one.n_subjects,
        "refused": dict(one.refused),
        "by_subject": {subject: asdict(each) for subject, each in one.score.by_subject.items()},
    }


def _plain(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def group_trainings(folders: Sequence[Path | str]) -> dict[str, list[Path]]:
    """Group trainings by the challenge whose target they predict; prove that none has trained on R5.

    Parameters
    ----------
    folders
        Of trainings.

    Returns
    -------
    dict
        Name of each challenge -> its trainings, in the order given; none where there is none.

    Raises
    ------
    InputError
        If a training is given twice, predicts something else, counts times from another event or in
        windows that begin elsewhere, or was trained on R5 or on recordings without a release.
    StoreMissing, StoreFormatError, StoreDamaged
        If a training's store cannot be read.
    """
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError("A training is named twice and would count as two. Name every folder once.")
    found: dict[str, list[Path]] = {name: [] for name in CHALLENGES}
    for folder in map(Path, folders):
        with open_training(folder) as training:
            target = training.recipe.target_value
            challenge = challenge_of(target)
            if challenge is None:
                raise InputError(
                    f"{folder} predicts {target}, which is the target of neither challenge. Train with one "
                    "of them."
                )
            try:
                check_cutting(challenge, training.recipe.windows.value)
            except InputError as error:
                raise InputError(f"{folder}: {error}") from error
            trained_releases(folder, training.sides)
            found[challenge.name].append(folder)
    return found


def score_entry(
    folders: Sequence[Path | str],
    store: Path | str,
    releases: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> EntryScore:
    """Score trained networks on releases as the organisers do; those of one challenge are averaged.

    Parameters
    ----------
    folders
        Trainings, at least one.
    store
        Of HBN-EEG recordings at 100 Hz, in the unit that was trained in.
    releases
        Names of the releases that are scored; all of the store that no training has trained on if empty.
    device
        Where the networks predict.
    progress
        Called now and then with the challenge and release, windows of it that are scored, and windows of
        it in all.

    Raises
    ------
    InputError
        If ``group_trainings`` refuses a training, a release or a subject of it was trained on, no release
        is left, or the store's windows have another form than those that were trained on, or than the
        scorer's.
    StoreMissing, StoreFormatError, StoreDamaged
        If a store cannot be read.
    """
    if not folders:
        raise InputError("An entry is made of trainings. Name the folder of one.")
    opened = {
        name: [_open_member(folder) for folder in found]
        for name, found in group_trainings(folders).items()
        if found
    }
    everyone = [each for members in opened.values() for each in members]
    with Store(store) as other:
        chosen = _choose_releases(other, releases, [each.member for each in everyone])
        windows = {
            name: {release: CHALLENGES[name].of(other, (release,)) for release in chosen} for name in opened
        }
        for name, members in opened.items():
            _check_unseen(everyone, windows[name])
            _check_form(members, windows[name])
        challenges = {
            name: _score_members(CHALLENGES[name], members, windows[name], device, progress)
            for name, members in opened.items()
        }
        n_unprepared, steps = other.table("refusals").num_rows, steps_of(other)
    return EntryScore(Path(store), n_unprepared, steps, challenges)


@dataclass(frozen=True, slots=True)
class _Form:
    """What a network is given."""

    ch_names: tuple[str, ...]
    n_times: int
    sfreq: float
    units: tuple[str, ...]

    @classmethod
    def of(cls, windows: Windows) -> _Form:
        return cls(windows.ch_names, windows.n_times, windows.sfreq, windows.units)

    def __str__(self) -> str:
        channels = f"{len(self.ch_names)} channels ({self.ch_names[0]} to {self.ch_names[-1]})"
        return f"{channels} and {self.n_times} samples at {self.sfreq:g} Hz in {', '.join(self.units)}"


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A member with what is only needed while it is scored."""

    member: Member
    network: nn.Module
    form: _Form
    subjects: frozenset[str | None]


def _open_member(folder: Path) -> _Opened:
    with open_training(folder) as training:
        sides, train = training.sides, training.sides.train
        member = Member(
            folder,
            training.ledger,
            trained_releases(folder, sides),
            () if sides.valid is None else releases_of(sides.valid),
            float(train_targets(train).mean(dtype=np.float64)),
        )
        return _Opened(member, training.network, _Form.of(train), frozenset(train.index.subjects().values))


def _choose_releases(store: Store, releases: Sequence[str], members: Sequence[Member]) -> tuple[str, ...]:
    trained = {release: member.folder for member in members for release in member.trained_on}
    if releases:
        for release in releases:
            if release in trained:
                raise InputError(
                    f"{trained[release]} was trained on {release}: a score on it says nothing about people "
                    "who are new. Score another release."
                )
        return tuple(dict.fromkeys(releases))
    there_are = releases_in(store)
    left = tuple(release for release in there_are if release not in trained)
    if not left:
        raise InputError(
            f"Every release of {store.path} was trained on: {', '.join(there_are)}. Give a store with "
            "another one."
        )
    return left


def _check_unseen(members: Sequence[_Opened], windows: Mapping[str, Windows]) -> None:
    """Refuse people who were trained on under another release's name."""
    for release, scored in windows.items():
        people = set(scored.index.subjects().values)
        for each in members:
            if seen := sorted(map(str, people & each.subjects)):
                raise InputError(
                    f"{each.member.folder} was trained on {len(seen):,} of the {len(people):,} subjects of "
                    f"{release}, {seen[0]} among them: a score on it says nothing about people who are new. "
                    "Score another release."
                )


def _check_form(members: Sequence[_Opened], windows: Mapping[str, Windows]) -> None:
    for release, scored in windows.items():
        form = _Form.of(scored)
        if (len(form.ch_names), form.n_times, form.sfreq) != (N_CHANS, N_TIMES, SFREQ):
            raise InputError(
                f"{release} of {scored.store.path} has {form}, and the scorer hands over {N_CHANS} channels "
                f"and {N_TIMES} samples at {SFREQ} Hz. Prepare the challenge's own files."
            )
        for each in members:
            if each.form != form:
                raise InputError(
                    f"{each.member.folder} was trained on {each.form}; {release} of {scored.store.path} has "
                    f"{form}. Prepare both alike."
                )


def _score_members(
    challenge: Challenge,
    opened: Sequence[_Opened],
    windows: Mapping[str, Windows],
    device: torch.device | str,
    progress: Callable[[str, int, int], None] | None,
) -> ChallengeEntry:
    network = MeanOf([each.network for each in opened]).to(device)
    mean = float(np.mean([each.member.train_mean for each in opened]))
    releases = {}
    for release, scored in windows.items():
        told = None if progress is None else partial(progress, f"{challenge.name} {release}")
        score = score_challenge(challenge, network, scored, device=device, progress=told)
        releases[release] = _beside_chance((release,), score, mean, scored.counts())
    refused: Counter[str] = Counter()
    for one in releases.values():
        refused.update(one.refused)
    joined = pool_scores([one.score for one in releases.values()])
    pooled = _beside_chance(tuple(releases), joined, mean, refused)
    return ChallengeEntry(challenge, tuple(each.member for each in opened), releases, pooled)


def _beside_chance(
    releases: tuple[str, ...], score: ChallengeScore, train_mean: float, refused: Mapping[str, int]
) -> ReleaseScore:
    targets = score.targets[:, None].astype(np.float64)
    nrmse = find_metric("nrmse", "regression").score
    chance, beforehand = (
        nrmse(targets, np.full_like(targets, constant)) for constant in (targets.mean(), train_mean)
    )
    bounds = interval(_as_predictions(score), "nrmse")
    return ReleaseScore(releases, score, chance, beforehand, bounds, dict(refused))


def _as_predictions(score: ChallengeScore) -> Predictions:
    subjects, codes = np.unique(score.subjects, return_inverse=True)
    target, prediction = (each[:, None].astype(np.float64) for each in (score.targets, score.predictions))
    numbers = np.arange(len(target))
    return Predictions(
        "test", numbers, codes.astype(np.int64), tuple(subjects.tolist()), target, prediction, 0
    )
