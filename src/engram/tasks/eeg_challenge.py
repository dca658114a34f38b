"""The EEG Foundation Challenge 2025: both challenges as values, and their score as the organisers compute it.

This module decides which windows and targets each challenge means, in which order they are scored and
from what, and which releases may train. Reading, training and networks are the rooms' below.

References
----------
Rules: https://eeg2025.github.io. Trials and windows: ``eegdash.hbn.windows`` and the challenge's start
kit; procedure and figures: the organisers' ``local_scoring.py``. Where pages and code differ, the code
counts: a trial lasts from one ``contrastTrial_start`` to the next, so that the last one is none, and
challenge 2 is pooled over windows, not over subjects. In one thing the start kit counts: it leaves out nine
subjects and recordings of other than 129 channels, for which the scorer's own code has no rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram.batches.windows import SplitWindows, Windows
from engram.errors import InputError
from engram.store.reader import Store
from engram.training.learner import evaluating
from engram.training.metrics import find_metric
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.targets import RecordingColumn, Target, TimeTo

__all__ = [
    "CHALLENGES",
    "CHALLENGE_1",
    "CHALLENGE_2",
    "KNOWN_BAD",
    "PUBLISHED",
    "PUBLISHED_ON",
    "TRAIN_RELEASES",
    "VALID_RELEASE",
    "Challenge",
    "ChallengeScore",
    "Published",
    "SubjectScore",
    "challenge_of",
    "check_cutting",
    "overall",
    "pool_scores",
    "releases_in",
    "releases_of",
    "score_challenge",
    "scored_offsets",
    "trained_releases",
]

KNOWN_BAD = (
    "NDARWV769JM7",
    "NDARME789TD2",
    "NDARUA442ZVF",
    "NDARJP304NK1",
    "NDARTY128YLU",
    "NDARDW550GU6",
    "NDARLD243KRE",
    "NDARUJ292JXV",
    "NDARBA381JGH",
)
"""Subjects that the organisers leave out: recordings too short, or channels missing (start kit, issue 10)."""

TRAIN_RELEASES = ("R1", "R2", "R3", "R4", "R6", "R7", "R8", "R9", "R10", "R11")
"""Releases that may be trained on, and no others: R12 is the test."""
VALID_RELEASE = "R5"
"""The release of the warm-up leaderboard, which is never trained on."""

_TASK = "contrastChangeDetection"
_CROP_SEED = 42
SFREQ, N_CHANS, N_TIMES = 100, 129, 200
"""The form of what the scorer hands over, in braindecode's words."""
_AT_ONCE = 64
"""Windows that are read together; each goes through the network alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """One of the two challenges.

    Examples
    --------
    >>> CHALLENGE_2.windows.signals, CHALLENGE_2.weight
    (('eeg',), 0.7)
    """

    name: str
    """``"challenge1"`` or ``"challenge2"``, as in the organisers' scores."""
    windows: EventWindows | FixedWindows
    """Which windows are scored."""
    target: TimeTo | RecordingColumn
    """What is predicted."""
    weight: float
    """Its share of the overall score."""

    def of(self, store: Store, releases: Sequence[str] = ()) -> Windows:
        """Give its windows.

        Parameters
        ----------
        store
            Of HBN-EEG recordings at 100 Hz.
        releases
            Names of releases, such as ``("R5",)``; all that the store has if empty.

        Raises
        ------
        InputError
            If the store has no such release, or no window is left.
        """
        where = dict(self.windows.where) | ({"release": tuple(releases)} if releases else {})
        return store.windows(replace(self.windows, where=where), self.target)


CHALLENGE_1 = Challenge(
    name="challenge1",
    windows=EventWindows(
        signal="eeg",
        anchor=("left_target", "right_target"),
        first_between=("contrastTrial_start",),
        trial_start_offset_s=0.5,
        trial_duration_s=2.0,
        where={"task": (_TASK,)},
        excluding={"subject": KNOWN_BAD},
    ),
    target=TimeTo(("left_buttonPress", "right_buttonPress")),
    weight=0.3,
)
"""Response time, in seconds after the stimulus, from 2 s of EEG that begin 0.5 s after it."""

CHALLENGE_2 = Challenge(
    name="challenge2",
    windows=FixedWindows(
        signal="eeg",
        window_size_s=4.0,
        window_stride_s=2.0,
        crop_s=2.0,
        where={"task": (_TASK,)},
        excluding={"subject": KNOWN_BAD},
    ),
    target=RecordingColumn("externalizing"),
    weight=0.7,
)
"""The externalizing factor, from a 2 s crop of each window of 4 s, every 2 s."""

CHALLENGES: Mapping[str, Challenge] = {each.name: each for each in (CHALLENGE_1, CHALLENGE_2)}


@dataclass(frozen=True, slots=True)
class Published:
    """What other entries scored."""

    best: float
    """The best of the final phase, on the withheld release R12."""
    median: float
    """Half of the final phase's 184 entries are better."""
    warm_up: float | None
    """The best of the warm-up, on R5; None where it is not known."""


PUBLISHED_ON = "2025-11-14"
"""Day of the leaderboard of https://eeg2025.github.io that ``PUBLISHED`` was read from."""

PUBLISHED: Mapping[str, Published] = {
    "overall": Published(0.96381, 1.0038, None),
    "challenge1": Published(0.88668, 1.0001, 0.873),
    "challenge2": Published(0.97843, 1.0079, 0.932),
}
"""The leaderboard; its best figures are of three different entries."""


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """How one subject was predicted."""

    n_windows: int
    """Windows."""
    target: float
    """Mean target."""
    prediction: float
    """Mean prediction."""
    rmse: float
    """Root mean squared error over the subject's windows."""


@dataclass(frozen=True, slots=True, eq=False)
class ChallengeScore:
    """What the organisers' scorer says of a network in one challenge."""

    name: str
    """Which challenge."""
    nrmse: float
    """Root mean squared error over the targets' population deviation, over all windows; 1.0 is what the
    constant that is the mean of the scored targets gets."""
    targets: NDArray[np.float32]
    """(window,) in the order in which they were scored."""
    predictions: NDArray[np.float32]
    """(window,) likewise."""
    subjects: NDArray[np.str_]
    """(window,) whose each window is."""
    by_subject: Mapping[str, SubjectScore]
    """Each subject by itself."""


def scored_offsets(windows: Windows) -> NDArray[np.int64]:
    """Give the crops that the organisers score, for windows in their order.

    Every recording has a generator of its own, ``random.Random(42)``, which is asked once per window, for
    a whole number from 0 to what the crop leaves; for a window that is refused here, too.

    Parameters
    ----------
    windows
        Whose spec asks for a crop.

    Returns
    -------
    ndarray
        (window,) int64 samples from a window's first one.
    """
    index, numbers = windows.index, np.arange(len(windows))
    main = index.spec.signal
    whole = index.locate(numbers)
    spare = whole.lengths[main] - index.place(numbers).lengths[main]
    if len(np.unique(spare)) > 1:
        raise InputError("The windows differ in length, and the scorer's do not. Ask for one rate.")
    generator = random.Random(_CROP_SEED)  # noqa: S311 - theirs
    # The sequence is every recording's: the place in it is the window's among those there were.
    place = whole.i_window_in_trial
    sequence = [generator.randint(0, int(spare[0])) for _ in range(int(place.max()) + 1)]
    return np.array(sequence, np.int64)[place]


def score_challenge(
    challenge: Challenge,
    network: nn.Module,
    windows: Windows,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ChallengeScore:
    """Score a network as the organisers do: in order, one window at a time, pooled over all windows.

    Parameters
    ----------
    challenge
        Which one.
    network
        From (1, channel, time) float32 in the store's unit to (1, 1).
    windows
        As ``challenge.of`` gives them.
    device
        Where the network is.
    progress
        Called now and then with windows that are scored, and windows in all.

    Raises
    ------
    InputError
        If an output is not (1, 1), or not finite.
    StoreDamaged
        If a file of the store is missing or cut short.
    """
    offset = scored_offsets(windows) if windows.index.is_drawn else None
    numbers = np.arange(len(windows))
    predictions = np.empty(len(windows), np.float32)
    with evaluating(network), torch.inference_mode():
        for begin in range(0, len(windows), _AT_ONCE):
            some = numbers[begin : begin + _AT_ONCE]
            batch = windows.read(some, offset=None if offset is None else offset[some])
            for number, X in zip(some.tolist(), batch.X, strict=True):  # noqa: N806 - braindecode's word
                out = network(X[None].to(device))
                if tuple(out.shape) != (1, 1) or not bool(torch.isfinite(out)):
                    raise InputError(
                        f"For window {number} the network gives {_shown(out)}, where one finite number of "
                        "shape (1, 1) is needed. Change its last layer."
                    )
                predictions[number] = float(out)
            if progress is not None:
                progress(begin + len(some), len(windows))
    subjects = windows.index.subjects()
    names = np.array(subjects.values, np.str_)[subjects.codes]
    return _scored(challenge.name, np.asarray(windows.index.targets(numbers), np.float32), predictions, names)


def pool_scores(scores: Sequence[ChallengeScore]) -> ChallengeScore:
    """Pool what was scored in several turns, as if it had been scored in one.

    Parameters
    ----------
    scores
        Of one challenge, at least one.
    """
    arrays = ("targets", "predictions", "subjects")
    joined = (np.concatenate([getattr(score, name) for score in scores]) for name in arrays)
    return _scored(scores[0].name, *joined)


def _scored(
    name: str, targets: NDArray[np.float32], predictions: NDArray[np.float32], subjects: NDArray[np.str_]
) -> ChallengeScore:
    nrmse = find_metric("nrmse", "regression").score
    value = nrmse(targets[:, None].astype(np.float64), predictions[:, None].astype(np.float64))
    by_subject = _by_subject(subjects, targets, predictions)
    return ChallengeScore(name, value, targets, predictions, subjects, by_subject)


def _shown(out: Tensor) -> str:
    return f"shape {tuple(out.shape)}" if out.numel() > 1 else str(out.tolist())


def _by_subject(
    subjects: NDArray[np.str_], targets: NDArray[np.float32], predictions: NDArray[np.float32]
) -> dict[str, SubjectScore]:
    names, codes, n_windows = np.unique(subjects, return_inverse=True, return_counts=True)
    y, predicted = targets.astype(np.float64), predictions.astype(np.float64)
    target, prediction, error2 = (
        np.bincount(codes, values) / n_windows for values in (y, predicted, (y - predicted) ** 2)
    )
    columns = zip(
        n_windows.tolist(), target.tolist(), prediction.tolist(), np.sqrt(error2).tolist(), strict=True
    )
    return {str(name): SubjectScore(*row) for name, row in zip(names, columns, strict=True)}


def overall(scores: Sequence[ChallengeScore]) -> float:
    """Weigh both challenges into the figure of the leaderboard, rounded to five decimals.

    Raises
    ------
    InputError
        If one of them is missing.
    """
    by_name = {score.name: score for score in scores}
    if set(by_name) != set(CHALLENGES):
        raise InputError(
            f"The overall score is of {' and '.join(CHALLENGES)}, and there are "
            f"{', '.join(by_name) or 'none'}. Score both."
        )
    return round(sum(challenge.weight * by_name[name].nrmse for name, challenge in CHALLENGES.items()), 5)


def challenge_of(target: Target | None) -> Challenge | None:
    """Find the challenge whose target a training predicts; None if it is another's.

    Parameters
    ----------
    target
        What is predicted. The bounds of a time may differ from the challenge's.
    """
    found = (each for each in CHALLENGES.values() if _aim(each.target) == _aim(target))
    return next(found, None)


def check_cutting(challenge: Challenge, spec: EventWindows | FixedWindows) -> None:
    """Refuse windows in which a time is counted from another event, or that begin elsewhere after it.

    What else may differ: which trials there are, and how a training moves its windows.

    Parameters
    ----------
    challenge
        Whose target is predicted.
    spec
        Of the training's windows.

    Raises
    ------
    InputError
        If the scorer's windows are cut otherwise. Windows of a target that is no time are cut anyhow.
    """
    if not (isinstance(challenge.windows, EventWindows) and isinstance(spec, EventWindows)):
        return
    wanted_s, found_s = _offset_s(challenge.windows), _offset_s(spec)
    if not {*spec.anchor} <= {*challenge.windows.anchor} or found_s != wanted_s:
        raise InputError(
            f"The times of {challenge.name} count from {' or '.join(challenge.windows.anchor)}, in windows "
            f"that begin {wanted_s:g} s after it, and these from {' or '.join(spec.anchor)}, in windows that "
            f"begin at {found_s:g} s. Train what engram recipe {challenge.name} says."
        )


def _offset_s(spec: EventWindows) -> float:
    return spec.trial_start_offset_s or (spec.trial_start_offset_samples or 0) / SFREQ


def _aim(target: Target | None) -> Any:
    return target.events if isinstance(target, TimeTo) else target


def releases_in(store: Store) -> tuple[str, ...]:
    """Name the releases of which a store has recordings of the challenges' task, R2 before R10.

    Raises
    ------
    InputError
        If recordings have no field ``task`` or ``release``, or one of the task has no release.
    """
    table = store.recordings
    if "task" not in table.column_names:
        raise InputError(f"{store.path} does not say which task its recordings are of. Prepare BIDS folders.")
    is_asked = pc.equal(table["task"], _TASK)
    has_release = "release" in table.column_names
    return _sorted_releases(
        set(table.filter(is_asked)["release"].to_pylist() if has_release else [None]), store
    )


def releases_of(windows: Windows) -> tuple[str, ...]:
    """Name the releases that windows come from, R2 before R10.

    Raises
    ------
    InputError
        If recordings have no field ``release``, or one of them has none.
    """
    has_release = "release" in windows.index.tables.fields
    return _sorted_releases(windows.index.column("release").values if has_release else [None], windows.store)


def _sorted_releases(names: Collection[str | None], store: Store) -> tuple[str, ...]:
    found = [name for name in names if name is not None]
    if len(found) < len(names):
        raise InputError(
            f"{store.path} has recordings without a release, so that nothing proves which releases were "
            f"trained on. Prepare folders that are named by release, as {VALID_RELEASE}_L100_bdf is, or give "
            "release_number in participants.tsv."
        )
    return tuple(sorted(found, key=lambda name: (len(name), name)))


def steps_of(store: Store) -> tuple[str, ...]:
    """Name the steps that a store's EEG was prepared with; the scorer's recordings have had none.

    Parameters
    ----------
    store
        An open store.
    """
    calls = [call.steps.get(CHALLENGE_1.windows.signal, ()) for call in store.manifest.calls]
    return tuple(dict.fromkeys(str(step["step"]) for steps in calls for step in steps))


def trained_releases(folder: Path | str, sides: SplitWindows) -> tuple[str, ...]:
    """Name the releases that a training has trained on; prove that all of them may be.

    Windows of R5 may choose the epoch and be scored, as the rules have it.

    Parameters
    ----------
    folder
        Of the training, for the message.
    sides
        Its windows.

    Raises
    ------
    InputError
        If it was trained on windows of R5, of anything that is not called as one of ``TRAIN_RELEASES``, or
        of recordings without a release.
    """
    releases = releases_of(sides.train)
    for release in releases:
        if release in TRAIN_RELEASES:
            continue
        column = sides.train.index.column("release")
        n_windows = int(np.count_nonzero(column.codes == column.values.index(release)))
        if release == VALID_RELEASE:
            raise InputError(
                f"{folder} was trained on {n_windows:,} windows of {VALID_RELEASE}, which the rules keep for "
                f'validation. Train again with valid = {{ by = "release", values = ["{VALID_RELEASE}"] }} in '
                "its [split]."
            )
        raise InputError(
            f"{folder} was trained on {n_windows:,} windows of release {release!r}, and the rules allow "
            f"{', '.join(TRAIN_RELEASES)}. Train on those, under these names."
        )
    return releases
