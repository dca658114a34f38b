"""A small corpus of trials from arrays, for tests of training that generate nothing on disk.

Every recording is one subject's: events ``square``, each answered by ``rt`` where the subject
answered, and EEG whose mean after a square tells how long the answer takes. A network that
reads the mean scores well; one that reads anything else is at chance.
"""

from __future__ import annotations

import numpy as np

from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel, Events, Field

__all__ = ["make_trials"]

_RATE_HZ = 100.0
_TRIAL_S = 2.0


def make_trials(
    n_subjects: int = 8, n_trials: int = 20, *, n_channels: int = 4, first: int = 0, seed: int = 0
) -> ArraySource:
    """Describe one recording per subject.

    Parameters
    ----------
    n_subjects, n_trials
        Subjects, and squares each has seen; every seventh of them is not answered.
    n_channels
        Channels ``E1``, ``E2``, ... of float32 microvolts.
    first
        Number of the first subject, so that two corpora share none.
    seed
        Root of every random choice, together with the subject's number.

    Returns
    -------
    ArraySource
        Recordings ``sub-00``, ``sub-01``, ... with fields ``subject``, ``age`` and ``group``
        (``"odd"`` or ``"even"``) and the events' column ``side`` (``"left"`` or ``"right"``).
    """
    numbers = range(first, first + n_subjects)
    recordings = {f"sub-{n:02}": _recording(n, n_trials, n_channels, seed) for n in numbers}
    return ArraySource(recordings)


def _recording(number: int, n_trials: int, n_channels: int, seed: int) -> ArrayRecording:
    rng = np.random.default_rng((seed, number))
    response_s = rng.uniform(0.4, 1.2, n_trials)
    onset_s = 0.5 + _TRIAL_S * np.arange(n_trials)
    eeg = rng.normal(0, 10, (round((n_trials + 1) * _TRIAL_S * _RATE_HZ), n_channels))
    for onset, response in zip(onset_s, response_s, strict=True):
        start = round(onset * _RATE_HZ)
        eeg[start : start + 50] += 40 * (response - 0.8)
    answered = [n for n in range(n_trials) if n % 7 != 6]
    onsets = [*onset_s, *(onset_s + response_s)[answered]]
    words = ["square"] * n_trials + ["rt"] * len(answered)
    sides: list[str | None] = [str(rng.choice(["left", "right"])) for _ in range(n_trials)]
    sides += [None] * len(answered)
    order = np.argsort(onsets)
    events = Events(
        tuple(float(onsets[n]) for n in order),
        (0.0,) * len(onsets),
        tuple(words[n] for n in order),
        {"side": tuple(sides[n] for n in order)},
    )
    channels = tuple(Channel(f"E{n + 1}") for n in range(n_channels))
    fields: dict[str, Field] = {
        "subject": f"{number:02}",
        "age": 8.0 + number,
        "group": "odd" if number % 2 else "even",
    }
    return ArrayRecording(
        {"eeg": ArraySignal(eeg.astype(np.float32), _RATE_HZ, channels=channels)}, events, fields
    )
