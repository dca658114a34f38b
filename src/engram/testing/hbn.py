"""A synthetic corpus in the shape of HBN-EEG, with effects and faults of known size.

This module decides who is recorded, what they do, and which files tell of it: one BIDS root per
release as in the EEG Foundation Challenge 2025, ``contrastChangeDetection`` (runs 1-3) and
``RestingState``. What the samples look like is ``engram.testing.eeg_signal``'s. Every value is a
function of (seed, release, subject, task, run); files hold no clock and no host.

Two effects are planted, both of correlation 0.8 at ``effect_size`` 1, so that a perfect reader of
the cause predicts the target with nRMSE 0.6 (RMSE over population deviation):

- response time moves the latency of a posterior component in the same trial (a corpus of twenty
  subjects keeps 0.6 within 0.02, one of four within 0.08: few subjects, few response times);
- externalizing moves the exponent of the subject's 1/f background.

The truth is never written into the corpus; ``true_trials`` and ``true_subjects`` tell it.

References
----------
Layout, columns, event names and codes: HBN-EEG release 1, OpenNeuro ds005505, and the challenge
data https://eeg2025.github.io/data/. Trial timing (targets 2.8, 4.4 or 6.0 s into a trial, the next
trial 2.4 s after the target) and rest timing (20 s open, 40 s closed) as in those recordings. The
challenge reads ``end_experiment``; its code 9999 is the last one in those files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from engram.errors import InputError, MissingExtra
from engram.testing.eeg_signal import CHANNELS, Pulse, Script, Voice, digital_blocks, generator, write_bdf

__all__ = [
    "KNOWN_BAD",
    "QUIRKS",
    "HbnCorpus",
    "HbnSummary",
    "PlantedQuirk",
    "TrueSubject",
    "TrueTrial",
    "true_subjects",
    "true_trials",
    "write_hbn",
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
"""Subjects that the challenge's organisers leave out: too short, or channels missing."""

QUIRKS = frozenset(
    {"six_channels", "truncated", "known_bad", "nan_targets", "missing_responses", "trial_at_end"}
)
"""Every fault that a corpus can hold.

``six_channels``: one run with 6 channels instead of 129. ``truncated``: one BDF cut in the middle
of its data, its header promising the rest. ``known_bad``: one subject of ``KNOWN_BAD``, recorded for
three seconds. ``nan_targets``: subjects without scores. ``missing_responses``: trials without a
button press, at least one in every run. ``trial_at_end``: runs that end less than 2.5 s after their
last target.
"""

# The n-th subject of the corpus that carries a quirk, where not everyone does.
_CARRIER = {"six_channels": 0, "truncated": 1, "known_bad": 2, "nan_targets": 3, "trial_at_end": 3}
_TRIAL_AT_END_EVERY = 4  # and every fourth subject after it

_RATE_HZ = 100
_GRID_S = 0.002  # events were timed at 500 Hz
_CCD = "contrastChangeDetection"
_REST = "RestingState"
_TASK_KEYS = {_REST: 0, _CCD: 1}
_SIX_CHANNELS = CHANNELS[:6]
_BAD_RUN_S = 3

_CORRELATION = 0.8  # nRMSE 0.6 of the best linear reader: sqrt(1 - 0.8**2)
_MAX_EFFECT = 1.25  # correlation one
# Response time is 0.6 + 1.8 * sigmoid(z) s, z normal: bounded, skewed to the right, means differ by
# subject. Mean and deviation of that population (checked by a test).
_RT_Z_MEAN, _RT_Z_BETWEEN, _RT_Z_WITHIN = -0.6, 0.45, 0.75
_RT_MEAN_S, _RT_STD_S = 1.273, 0.322
_LATENCY_MEAN_S, _LATENCY_STD_S = 1.4, 0.26
_LATENCY_RANGE_S = (0.5, 2.5)  # the challenge's window after the target
_EXPONENT_MEAN, _EXPONENT_STD = 1.2, 0.25

_FACTORS = ("p_factor", "attention", "internalizing", "externalizing")
_AVAILABILITY = (
    "RestingState",
    "DespicableMe",
    "FunwithFractals",
    "ThePresent",
    "DiaryOfAWimpyKid",
    "contrastChangeDetection_1",
    "contrastChangeDetection_2",
    "contrastChangeDetection_3",
    "surroundSupp_1",
    "surroundSupp_2",
    "seqLearning6target",
    "seqLearning8target",
    "symbolSearch",
)
_PARTICIPANT_COLUMNS = (
    "participant_id",
    "release_number",
    "sex",
    "age",
    "ehq_total",
    "commercial_use",
    "full_pheno",
    *_FACTORS,
    *_AVAILABILITY,
)
_EVENT_CODES = {
    "break cnt": "break cnt",
    "contrastChangeB1_start": "94",
    "contrastChangeB2_start": "95",
    "contrastChangeB3_start": "96",
    "contrastTrial_start": "5",
    "left_target": "8",
    "right_target": "9",
    "left_buttonPress": "12",
    "right_buttonPress": "13",
    "end_experiment": "9999",
    "resting_start": "90",
    "instructed_toOpenEyes": "20",
    "instructed_toCloseEyes": "30",
}


@dataclass(frozen=True, slots=True)
class HbnCorpus:
    """What corpus to write.

    Raises
    ------
    InputError
        If a setting is out of its range.

    Examples
    --------
    >>> corpus = HbnCorpus(n_subjects=2, quirks=frozenset())
    >>> corpus.n_recordings, corpus.folder("R1")
    (16, 'R1_L100_bdf')
    """

    n_subjects: int = 20
    """Subjects per release, 1 to 999."""
    releases: tuple[str, ...] = ("R1", "R2")
    """Releases, each a BIDS root of its own: ``"R1"``, ``"R2"``, ... No subject is in two."""
    seed: int = 0
    """Root of every random choice, at least 0."""
    n_trials: int = 24
    """Trials per run, at least 2; 24 as in HBN, a run of about 170 s."""
    n_runs: int = 3
    """Runs of contrastChangeDetection, 1 to 3."""
    rest_s: int = 120
    """Length of RestingState in whole seconds, at least 10; HBN's last about 350 s."""
    effect_size: float = 1.0
    """Factor on both planted correlations of 0.8; 0 plants none, 1.25 is the largest."""
    component_uv: float = 12.0
    """Height of the posterior component at its best electrode, upon 15-20 microvolt RMS of background."""
    quirks: frozenset[str] = QUIRKS
    """Which faults to plant; all of them need at least four subjects in the corpus."""
    mini: bool = False
    """Name the folders as the challenge's small variants, ``R1_mini_L100_bdf``."""
    long_recording: tuple[int, int] | None = None
    """Length in seconds and rate in hertz of the first subject's RestingState, where it shall differ."""

    def __post_init__(self) -> None:
        lengths = [self.rest_s, *(self.long_recording or ())[:1]]
        rules = (
            (1 <= self.n_subjects <= 999, f"n_subjects={self.n_subjects}", "1 to 999 subjects per release"),
            (
                bool(self.releases) and all(_is_release(name) for name in self.releases),
                f"releases={self.releases}",
                "releases named 'R1', 'R2', ..., 'R99'",
            ),
            (len(set(self.releases)) == len(self.releases), f"releases={self.releases}", "each release once"),
            (self.seed >= 0, f"seed={self.seed}", "a seed of at least 0"),
            (2 <= self.n_trials <= 500, f"n_trials={self.n_trials}", "2 to 500 trials per run"),
            (1 <= self.n_runs <= 3, f"n_runs={self.n_runs}", "1 to 3 runs"),
            (min(lengths) >= 10, f"a RestingState of {min(lengths)} s", "at least 10 s"),
            (0 <= self.effect_size <= _MAX_EFFECT, f"effect_size={self.effect_size}", f"0 to {_MAX_EFFECT}"),
            (0 <= self.component_uv <= 1000, f"component_uv={self.component_uv}", "0 to 1000 microvolt"),
            (self.quirks <= QUIRKS, f"quirks={sorted(self.quirks)}", f"some of {sorted(QUIRKS)}"),
            (
                self.long_recording is None or self.long_recording[1] >= 100,
                f"long_recording={self.long_recording}",
                "a rate of at least 100 Hz",
            ),
        )
        for holds, seen, remedy in rules:
            if not holds:
                raise InputError(f"A corpus cannot have {seen}. Use {remedy}.")
        needed = max((_CARRIER[name] + 1 for name in self.quirks & set(_CARRIER)), default=0)
        n_all = self.n_subjects * len(self.releases)
        if n_all < needed:
            raise InputError(
                f"{n_all} subjects are too few for quirks {sorted(self.quirks)}, which need {needed}. "
                f"Use n_subjects={math.ceil(needed / len(self.releases))} or quirks=frozenset()."
            )

    @property
    def n_recordings(self) -> int:
        """Recordings in the whole corpus."""
        return self.n_subjects * len(self.releases) * (self.n_runs + 1)

    def folder(self, release: str) -> str:
        """Name of a release's BIDS root."""
        return f"{release}_mini_L100_bdf" if self.mini else f"{release}_L100_bdf"


@dataclass(frozen=True, slots=True)
class TrueSubject:
    """What is true of one subject, beside what participants.tsv says."""

    subject: str
    """Id without ``sub-``."""
    release: str
    """Release it belongs to."""
    externalizing: float
    """The score that moved the exponent; drawn even where participants.tsv says ``n/a``."""
    exponent: float
    """Exponent of the background's power spectrum."""


@dataclass(frozen=True, slots=True)
class TrueTrial:
    """What is true of one trial, beside what events.tsv says."""

    subject: str
    """Id without ``sub-``."""
    release: str
    """Release of the subject."""
    run: int
    """Run of contrastChangeDetection, from 1."""
    stimulus_s: float
    """Onset of the target."""
    response_time_s: float
    """Response time that moved the latency; drawn even where no button is pressed."""
    latency_s: float
    """Peak of the posterior component after the target's onset."""
    responded: bool
    """Whether events.tsv has the button press."""


@dataclass(frozen=True, slots=True)
class PlantedQuirk:
    """One fault, and where it is."""

    name: str
    """Which of ``QUIRKS``."""
    path: str
    """File or folder below the corpus, with forward slashes."""
    detail: str
    """What is wrong there."""


@dataclass(frozen=True, slots=True)
class HbnSummary:
    """What was written."""

    roots: tuple[Path, ...]
    """The BIDS roots, one per release."""
    n_subjects: int
    """Subjects in all releases."""
    n_recordings: int
    """BDF files."""
    n_trials: int
    """Trials with a target, with or without a response."""
    n_bytes: int
    """Bytes of all BDF files."""
    duration_s: int
    """Length of all recordings as their headers say."""
    quirks: tuple[PlantedQuirk, ...]
    """Every fault, one line per place."""
    best_nrmse: float
    """nRMSE of a perfect linear reader of either cause: 0.6 at effect size 1, 1.0 at 0."""
    component_uv: float
    """Height of the posterior component."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """One subject with everything drawn for it."""

    id: str
    release: str
    position: int
    row: dict[str, str]
    voice: Voice
    externalizing: float
    rt_z: float
    scored: bool


@dataclass(frozen=True, slots=True)
class _Event:
    onset_s: float
    value: str
    feedback: str = "n/a"


@dataclass(frozen=True, slots=True)
class _Run:
    """One recording before it is written."""

    subject: _Subject
    task: str
    run: int
    script: Script
    events: tuple[_Event, ...]
    trials: tuple[TrueTrial, ...]
    rate_hz: int = _RATE_HZ
    channels: tuple[str, ...] = CHANNELS
    quirks: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        run = f"_run-{self.run}" if self.run else ""
        return f"sub-{self.subject.id}_task-{self.task}{run}"


def write_hbn(root: Path | str, corpus: HbnCorpus, *, n_jobs: int = 1) -> HbnSummary:
    """Write a corpus.

    Parameters
    ----------
    root
        Folder that holds the releases' folders; made where it is missing.
    corpus
        What to write.
    n_jobs
        Processes that write recordings; the bytes do not depend on it.

    Returns
    -------
    HbnSummary
        Counts, sizes, faults and the planted effects.

    Raises
    ------
    InputError
        If a release's folder exists already, or a file stands where a folder has to be.
    MissingExtra
        If mne or edfio, or joblib for several jobs, is not installed.

    Examples
    --------
    >>> import tempfile
    >>> corpus = HbnCorpus(1, ("R1",), n_trials=2, n_runs=1, rest_s=10, quirks=frozenset())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = write_hbn(folder, corpus)
    >>> summary.n_recordings, summary.n_trials, summary.best_nrmse
    (2, 2, 0.6)
    """
    root = Path(root)
    if file := next((place for place in (root, *root.parents) if place.is_file()), None):
        raise InputError(f"{file} is a file, not a folder. Choose another folder.")
    subjects = _subjects(corpus)
    roots = tuple(root / corpus.folder(release) for release in corpus.releases)
    for release, folder in zip(corpus.releases, roots, strict=True):
        if folder.exists():
            raise InputError(f"{folder} exists already. Choose another folder or remove it.")
        _write_root(folder, corpus, release, [s for s in subjects if s.release == release])
    runs = [run for subject in subjects for run in _runs(corpus, subject)]
    folders = [root / corpus.folder(run.subject.release) for run in runs]
    if n_jobs == 1:
        sizes = [_write_run(*job, corpus.seed) for job in zip(folders, runs, strict=True)]
    else:
        try:
            from joblib import Parallel, delayed
        except ImportError as error:
            raise MissingExtra("joblib", "eeg") from error
        write = delayed(_write_run)
        sizes = Parallel(n_jobs)(write(*job, corpus.seed) for job in zip(folders, runs, strict=True))
    return HbnSummary(
        roots=roots,
        n_subjects=len(subjects),
        n_recordings=len(runs),
        n_trials=sum(len(run.trials) for run in runs),
        n_bytes=sum(sizes),
        duration_s=sum(run.script.duration_s for run in runs),
        quirks=_planted(corpus, subjects, runs),
        best_nrmse=round(math.sqrt(1 - (_CORRELATION * corpus.effect_size) ** 2), 6),
        component_uv=corpus.component_uv,
    )


def true_subjects(corpus: HbnCorpus) -> tuple[TrueSubject, ...]:
    """Tell the cause and the target of every subject, without writing anything.

    Examples
    --------
    >>> len(true_subjects(HbnCorpus(n_subjects=3, releases=("R1", "R5"))))
    6
    """
    return tuple(
        TrueSubject(subject.id, subject.release, subject.externalizing, subject.voice.exponent)
        for subject in _subjects(corpus)
    )


def true_trials(corpus: HbnCorpus) -> tuple[TrueTrial, ...]:
    """Tell the cause and the target of every trial, without writing anything.

    Examples
    --------
    >>> len(true_trials(HbnCorpus(n_subjects=2, n_trials=4, quirks=frozenset())))
    48
    """
    return tuple(
        trial for subject in _subjects(corpus) for run in _runs(corpus, subject) for trial in run.trials
    )


# ---------------------------------------------------------------- subjects


def _is_release(name: str) -> bool:
    return name[:1] == "R" and name[1:].isascii() and name[1:].isdigit() and 1 <= int(name[1:]) <= 99


def _subjects(corpus: HbnCorpus) -> list[_Subject]:
    """Draw every subject, sorted by release and id."""
    subjects = [
        _subject(corpus, release, index, index * len(corpus.releases) + place)
        for place, release in enumerate(corpus.releases)
        for index in range(corpus.n_subjects)
    ]
    return sorted(subjects, key=lambda s: (corpus.releases.index(s.release), s.id))


def _subject(corpus: HbnCorpus, release: str, index: int, position: int) -> _Subject:
    key = (int(release[1:]), index)
    draw = generator(corpus.seed, key)
    subject_id = _subject_id(draw, *key)
    if "known_bad" in corpus.quirks and position == _CARRIER["known_bad"]:
        subject_id = KNOWN_BAD[corpus.seed % len(KNOWN_BAD)]
    scores = dict(zip(_FACTORS, draw.standard_normal(4).round(3).tolist(), strict=True))
    exponent = _EXPONENT_MEAN + _EXPONENT_STD * _caused(
        scores["externalizing"], draw.standard_normal(), corpus.effect_size
    )
    scored = bool(draw.random() >= 0.05) or "nan_targets" not in corpus.quirks
    if "nan_targets" in corpus.quirks and position == _CARRIER["nan_targets"]:
        scored = False
    voice = Voice(
        key=key,
        exponent=exponent,
        alpha_hz=float(np.clip(draw.normal(9.5, 0.7), 8.0, 11.5)),
        gain=float(np.exp(draw.normal(0.0, 0.15))),
    )
    row = {
        "participant_id": f"sub-{subject_id}",
        "release_number": release,
        "sex": "F" if draw.random() < 0.36 else "M",
        "age": f"{draw.gamma(4.0, 1.4) % 16.5 + 5.0:.4f}",
        "ehq_total": "n/a" if draw.random() < 0.02 else f"{draw.triangular(-100, 80, 100.05):.2f}",
        "commercial_use": "Yes" if draw.random() < 0.4 else "No",
        "full_pheno": "Yes",
        **{name: f"{score:.3f}" if scored else "n/a" for name, score in scores.items()},
        **dict.fromkeys(_AVAILABILITY, "unavailable"),
        **{f"{_CCD}_{run}": "available" for run in range(1, corpus.n_runs + 1)},
        _REST: "available",
    }
    return _Subject(
        id=subject_id,
        release=release,
        position=position,
        row=row,
        voice=voice,
        externalizing=scores["externalizing"],
        rt_z=_RT_Z_MEAN + _RT_Z_BETWEEN * _even_normal(corpus.seed, *key),
        scored=scored,
    )


def _subject_id(draw: np.random.Generator, release: int, index: int) -> str:
    """Make an id such as NDARAB012CD3; release and number keep ids of a corpus apart."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    first, second = letters[release % 26], letters[(release // 26 + 4 * int(draw.integers(6))) % 26]
    tail = "".join(np.array(list(letters + "0123456789"))[draw.integers(36, size=3)])
    return f"NDAR{first}{second}{index:03d}{tail}"


def _even_normal(seed: int, release: int, index: int) -> float:
    """Draw from a normal distribution, evenly over the subjects of a release.

    Steps of the golden ratio from a random start give ten subjects the spread of a thousand;
    drawn independently, few subjects would move the best nRMSE out of 0.6 +- 0.05.
    """
    start = generator(seed, (release,)).random()
    return NormalDist().inv_cdf(min(max((start + index * 0.6180339887498949) % 1, 1e-9), 1 - 1e-9))


def _caused(cause: float, noise: float, effect_size: float) -> float:
    """Mix a standardised cause with noise so that the mixture has deviation one."""
    correlation = _CORRELATION * effect_size
    return float(correlation * cause + math.sqrt(max(1 - correlation**2, 0.0)) * noise)


# ---------------------------------------------------------------- what happens in a recording


def _runs(corpus: HbnCorpus, subject: _Subject) -> Iterator[_Run]:
    if "known_bad" in corpus.quirks and subject.position == _CARRIER["known_bad"]:
        yield from _bad_runs(corpus, subject)
        return
    yield _rest(corpus, subject)
    for run in range(1, corpus.n_runs + 1):
        yield _contrast_change(corpus, subject, run)


def _run_key(subject: _Subject, task: str, run: int) -> tuple[int, ...]:
    return (*subject.voice.key, _TASK_KEYS[task] + 1, run)


def _bad_runs(corpus: HbnCorpus, subject: _Subject) -> Iterator[_Run]:
    """Stop every run before anything happens."""
    starts = [(_REST, 0, "resting_start")]
    starts += [(_CCD, run, f"contrastChangeB{run}_start") for run in range(1, corpus.n_runs + 1)]
    for task, run, start in starts:
        script = Script(_run_key(subject, task, run), _BAD_RUN_S)
        events = (_Event(0.0, "break cnt"), _Event(0.51, start))
        yield _Run(subject, task, run, script, events, ())


def _rest(corpus: HbnCorpus, subject: _Subject) -> _Run:
    duration_s, rate_hz = corpus.rest_s, _RATE_HZ
    if corpus.long_recording is not None and subject.position == 0:
        duration_s, rate_hz = corpus.long_recording
    key = _run_key(subject, _REST, 0)
    draw = generator(corpus.seed, key)
    events = [_Event(0.0, "break cnt"), _Event(_on_grid(draw.uniform(0.5, 1.5)), "resting_start")]
    closed: list[tuple[float, float]] = []
    time_s = _on_grid(draw.uniform(5.0, 6.0))
    while time_s < duration_s:
        events.append(_Event(time_s, "instructed_toOpenEyes"))
        close_s, time_s = _on_grid(time_s + 20), _on_grid(time_s + 60)
        if close_s < duration_s:
            events.append(_Event(close_s, "instructed_toCloseEyes"))
            closed.append((close_s + 0.6, time_s + 0.6))  # people obey after a moment
    blinks, saccades = _eye_pulses(draw, duration_s, closed)
    script = Script(key, duration_s, tuple(closed), blinks, saccades)
    return _Run(subject, _REST, 0, script, tuple(events), (), rate_hz)


def _contrast_change(corpus: HbnCorpus, subject: _Subject, run: int) -> _Run:
    key = _run_key(subject, _CCD, run)
    draw = generator(corpus.seed, key)
    waits_s = draw.choice([2.8, 4.4, 6.0], corpus.n_trials)
    held = _held(corpus, subject, run)
    # The last trial ends 2.4 s after its target. Recordings are whole seconds long, so the
    # time before the first trial is what gives the end its place.
    length_s = 6.0 + float(waits_s.sum()) + 2.4 * corpus.n_trials + (0.04 if "trial_at_end" in held else 1.0)
    duration_s = math.ceil(length_s)
    starts_s = 6.0 + (duration_s - length_s) + np.concatenate([[0.0], np.cumsum(waits_s + 2.4)])
    stimuli_s = [_on_grid(time_s) for time_s in starts_s[:-1] + waits_s]
    trials = _trials(corpus, subject, run, stimuli_s, draw)
    events = [
        _Event(0.0, "break cnt"),
        _Event(_on_grid(draw.uniform(0.1, 0.5)), f"contrastChangeB{run}_start"),
    ]
    for start_s, trial in zip(starts_s, trials, strict=False):
        events += _trial_events(_on_grid(start_s), trial, draw)
    events.append(_Event(_on_grid(starts_s[-1]), "end_experiment"))
    blinks, saccades = _eye_pulses(draw, duration_s, ())
    heights_uv = corpus.component_uv * np.exp(draw.normal(0.0, 0.15, corpus.n_trials))
    components = tuple(
        Pulse(trial.stimulus_s + trial.latency_s, float(height))
        for trial, height in zip(trials, heights_uv, strict=True)
    )
    script = Script(key, duration_s, (), blinks, saccades, components)
    details = {
        "missing_responses": f"{sum(not trial.responded for trial in trials)} of {len(trials)} trials",
        "trial_at_end": f"ends {duration_s - stimuli_s[-1]:.2f} s after its last target",
        "six_channels": f"channels {', '.join(_SIX_CHANNELS)} only",
        "truncated": "cut in the middle of its data",
    }
    return _Run(
        subject,
        _CCD,
        run,
        script,
        tuple(events),
        trials,
        channels=_SIX_CHANNELS if "six_channels" in held else CHANNELS,
        quirks={name: details[name] for name in sorted(held)},
    )


def _held(corpus: HbnCorpus, subject: _Subject, run: int) -> frozenset[str]:
    """Choose the faults of one run of contrastChangeDetection."""
    position = subject.position
    here = {
        "missing_responses": True,
        "trial_at_end": position % _TRIAL_AT_END_EVERY == _CARRIER["trial_at_end"] and run == corpus.n_runs,
        "six_channels": position == _CARRIER["six_channels"] and run == min(2, corpus.n_runs),
        "truncated": position == _CARRIER["truncated"] and run == 1,
    }
    return corpus.quirks & {name for name, is_here in here.items() if is_here}


def _trials(
    corpus: HbnCorpus, subject: _Subject, run: int, stimuli_s: Sequence[float], draw: np.random.Generator
) -> tuple[TrueTrial, ...]:
    n_trials = len(stimuli_s)
    z = subject.rt_z + _RT_Z_WITHIN * draw.standard_normal(n_trials)
    response_s = [_on_grid(0.6 + 1.8 / (1 + math.exp(-value))) for value in z]
    noise = draw.standard_normal(n_trials)
    missed = draw.random(n_trials) < 0.04
    missed[draw.integers(n_trials)] = True
    missed &= "missing_responses" in corpus.quirks
    latency_s = [
        _LATENCY_MEAN_S
        + _LATENCY_STD_S * _caused((rt_s - _RT_MEAN_S) / _RT_STD_S, float(extra), corpus.effect_size)
        for rt_s, extra in zip(response_s, noise, strict=True)
    ]
    return tuple(
        TrueTrial(
            subject.id,
            subject.release,
            run,
            stimulus_s,
            rt_s,
            float(np.clip(peak_s, *_LATENCY_RANGE_S)),
            not bool(miss),
        )
        for stimulus_s, rt_s, peak_s, miss in zip(stimuli_s, response_s, latency_s, missed, strict=True)
    )


def _trial_events(start_s: float, trial: TrueTrial, draw: np.random.Generator) -> Iterator[_Event]:
    side, other = ("left", "right") if draw.random() < 0.5 else ("right", "left")
    early, early_s, correct = draw.random() < 0.03, draw.uniform(0.5, 2.5), draw.random() < 0.9
    yield _Event(start_s, "contrastTrial_start")
    if early:  # a press before the target, which is no response to it
        yield _Event(_on_grid(start_s + early_s), f"{side}_buttonPress", "non_target")
    yield _Event(trial.stimulus_s, f"{side}_target")
    if trial.responded:
        feedback = "smiley_face" if correct else "sad_face"
        pressed_s = _on_grid(trial.stimulus_s + trial.response_time_s)
        yield _Event(pressed_s, f"{side if correct else other}_buttonPress", feedback)


def _eye_pulses(
    draw: np.random.Generator, duration_s: int, closed: Sequence[tuple[float, float]]
) -> tuple[tuple[Pulse, ...], tuple[Pulse, ...]]:
    """Draw blinks (about 13 a minute, none with the eyes closed) and saccades (about 30 a minute)."""
    blink_s = np.cumsum(1.0 + draw.exponential(3.5, duration_s // 2 + 10))
    saccade_s = np.cumsum(0.3 + draw.exponential(1.7, duration_s + 10))
    height = draw.uniform(70.0, 130.0)
    blinks = [(t, height * draw.uniform(0.7, 1.3)) for t in blink_s[blink_s < duration_s].tolist()]
    saccades = [(t, draw.normal(0.0, 15.0)) for t in saccade_s[saccade_s < duration_s].tolist()]
    starts = np.array([start for start, _ in closed] or [math.inf])
    stops = np.array([stop for _, stop in closed] or [math.inf])

    def is_open(time_s: float) -> bool:
        return not bool(np.any((starts <= time_s) & (time_s < stops)))

    return (
        tuple(Pulse(t, uv) for t, uv in blinks if is_open(t)),
        tuple(Pulse(t, uv) for t, uv in saccades if is_open(t)),
    )


def _on_grid(time_s: float) -> float:
    return round(round(float(time_s) / _GRID_S) * _GRID_S, 3)


# ---------------------------------------------------------------- files


def _write_root(folder: Path, corpus: HbnCorpus, release: str, subjects: Sequence[_Subject]) -> None:
    folder.mkdir(parents=True)
    rows = [[subject.row[name] for name in _PARTICIPANT_COLUMNS] for subject in subjects]
    _write_tsv(folder / "participants.tsv", _PARTICIPANT_COLUMNS, rows)
    _write_json(
        folder / "dataset_description.json",
        {
            "Name": f"Synthetic recordings in the shape of HBN-EEG - Release {release[1:]}",
            "BIDSVersion": "1.9.0",
            "DatasetType": "raw",
            "License": "CC0",
            "GeneratedBy": [{"Name": "engram.testing.hbn", "Description": _described(corpus)}],
        },
    )
    for task in (_CCD, _REST):
        _write_json(folder / f"task-{task}_eeg.json", {"TaskName": task, **_EEG_FACTS})
        _write_json(folder / f"task-{task}_events.json", _event_facts(task))


_EEG_FACTS: dict[str, Any] = {
    "EEGReference": "Cz",
    "PowerLineFrequency": 60,
    "RecordingType": "continuous",
    "SoftwareFilters": {"band-pass": {"low cutoff (Hz)": 0.5, "high cutoff (Hz)": 50}},
    "CapManufacturer": "EGI",
    "CapManufacturersModelName": "GSN-HydroCel-128",
}


def _described(corpus: HbnCorpus) -> str:
    """Every setting, so that a corpus can be written again."""
    settings = {item.name: getattr(corpus, item.name) for item in fields(corpus)}
    settings["quirks"] = tuple(sorted(corpus.quirks))
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _event_facts(task: str) -> dict[str, Any]:
    names = [name for name in _EVENT_CODES if (name[:4] in {"rest", "inst"}) == (task == _REST)]
    facts: dict[str, Any] = {
        "onset": {"Description": "Onset from the recording's start.", "Units": "s"},
        "duration": {"Description": "Not measured.", "Units": "s"},
        "value": {"Description": "What happened.", "Levels": {name: name for name in names}},
        "event_code": {"Description": "Trigger code of the stimulus computer."},
    }
    if task == _CCD:
        shown = {"smiley_face": "correct", "sad_face": "wrong", "non_target": "pressed before the target"}
        facts["feedback"] = {"Description": "What was shown after a press.", "Levels": shown}
    return facts


def _write_run(folder: Path, run: _Run, seed: int) -> int:
    """Write one recording with its sidecars and return the BDF's size."""
    eeg = folder / f"sub-{run.subject.id}" / "eeg"
    eeg.mkdir(parents=True, exist_ok=True)
    columns: tuple[str, ...] = ("onset", "duration", "value", "event_code")
    rows = [[f"{e.onset_s:.10g}", "n/a", e.value, _EVENT_CODES[e.value], e.feedback] for e in run.events]
    columns += ("feedback",) if run.task == _CCD else ()
    _write_tsv(eeg / f"{run.stem}_events.tsv", columns, [row[: len(columns)] for row in rows])
    channels = [[name, "EEG", "uV"] for name in run.channels]
    _write_tsv(eeg / f"{run.stem}_channels.tsv", ("name", "type", "units"), channels)
    _write_json(
        eeg / f"{run.stem}_eeg.json",
        {
            "TaskName": run.task,
            **_EEG_FACTS,
            "SamplingFrequency": run.rate_hz,
            "EEGChannelCount": len(run.channels),
            "RecordingDuration": run.script.duration_s,
        },
    )
    path = eeg / f"{run.stem}_eeg.bdf"
    blocks = digital_blocks(seed, run.subject.voice, run.script, run.rate_hz)
    rows_kept = slice(0, len(run.channels))
    n_bytes = write_bdf(
        path, run.channels, run.rate_hz, run.script.duration_s, (block[rows_kept] for block in blocks)
    )
    if "truncated" in run.quirks:
        n_bytes = n_bytes * 3 // 5  # inside a data record, inside a sample
        with path.open("r+b") as file:
            file.truncate(n_bytes)
    return n_bytes


def _planted(
    corpus: HbnCorpus, subjects: Sequence[_Subject], runs: Sequence[_Run]
) -> tuple[PlantedQuirk, ...]:
    found = []
    for subject in subjects:
        folder = f"{corpus.folder(subject.release)}/sub-{subject.id}"
        if not subject.scored:
            found.append(PlantedQuirk("nan_targets", folder, "scores are n/a in participants.tsv"))
        if subject.id in KNOWN_BAD:
            found.append(PlantedQuirk("known_bad", folder, f"recordings of {_BAD_RUN_S} s"))
    for run in runs:
        stem = f"{corpus.folder(run.subject.release)}/sub-{run.subject.id}/eeg/{run.stem}_eeg.bdf"
        found += [PlantedQuirk(name, stem, detail) for name, detail in run.quirks.items()]
    return tuple(sorted(found, key=lambda quirk: (quirk.name, quirk.path)))


def _write_tsv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = ["\t".join(line) for line in (columns, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
