"""Steps that are callables on MNE's ``Raw``: the user's own, and braindecode's Preprocessors.

This module decides what such a step is called in a fingerprint, and whether a recording
fits in memory as a whole, which these steps need. Steps that run block by block are in
``steps.py``; they come after these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from engram.errors import DoesNotFit, InputError, SourceError
from engram.preparation.steps import JSON, Step
from engram.recordings.mne_raw import RawRecording
from engram.recordings.recording import Events, Recording

if TYPE_CHECKING:
    from mne.io import BaseRaw

__all__ = ["RawStep", "apply_raw_steps", "split_steps", "whole_bytes"]

_PEAK_FACTOR = 3.0
"""Peak memory of a step on a whole recording, as a multiple of its float64 samples.

Measured with MNE 1.13, resident memory, 64 channels of 10 min at 500 Hz, loading included:
filter, notch_filter, set_eeg_reference, copy and polyphase resample 2.0, FFT resample to
250 Hz 2.2, apply_function on all channels at once 3.0.
"""


@dataclass(frozen=True, slots=True)
class RawStep:
    """A callable on ``mne.io.Raw`` as a step, with the name and version it is known by.

    Code has no fingerprint that can be relied on: change the version whenever the callable
    changes what it computes, and everything that it was applied to is prepared again.

    Raises
    ------
    InputError
        If it cannot be called, or name or version is missing, or the details are not JSON.

    Examples
    --------
    >>> def halve(raw):
    ...     return raw.apply_function(lambda x: x / 2)
    >>> RawStep(halve, name="halve", version="1").settings()
    {'version': '1'}
    """

    function: Callable[[Any], Any]
    """Takes a loaded ``Raw``; gives a ``Raw``, or None if it changed the one it took.

    It is pickled to the jobs, so it belongs into a module, not into another function."""
    name: str
    """Its name in manifests and fingerprints."""
    version: str
    """Its version; any text that changes when its results do."""
    details: Mapping[str, JSON] = field(default_factory=dict, hash=False)
    """What else decides its results, such as keyword arguments, as JSON."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"RawStep.function is {self.function!r}. Give a callable that takes a Raw.")
        for label in ("name", "version"):
            value = getattr(self, label)
            if not isinstance(value, str) or not value:
                raise InputError(f"RawStep.{label} is {value!r}. Give a text that is not empty.")
        object.__setattr__(self, "details", _canonical(self.details, self.name))

    def settings(self) -> dict[str, JSON]:
        """Give what a fingerprint keeps of it beside its name: version and details."""
        return {"version": self.version, **self.details}


def split_steps(steps: Sequence[object]) -> tuple[tuple[RawStep, ...], tuple[Step, ...]]:
    """Sort steps into those on the whole ``Raw``, which come first, and those on blocks.

    braindecode's Preprocessors become RawSteps. One whose ``fn`` names a method of ``Raw``
    is known by that name, its keyword arguments and MNE's version (major and minor);
    one whose ``fn`` is a function of an installed package by the function's full name and
    the package's version.

    Raises
    ------
    InputError
        If something is no step, has no name and version, or is a step on the ``Raw`` after
        one on blocks.
    """
    raw_steps: list[RawStep] = []
    block_steps: list[Step] = []
    for step in steps:
        if isinstance(step, Step):
            block_steps.append(step)
            continue
        raw_step = _as_raw_step(step)
        if block_steps:
            raise InputError(
                f"{raw_step.name} works on the whole Raw and follows {block_steps[-1].name}, which works on "
                f"blocks. Put {raw_step.name} before it."
            )
        raw_steps.append(raw_step)
    return tuple(raw_steps), tuple(block_steps)


def whole_bytes(recording: Recording) -> int:
    """Predict the peak memory of steps on a recording's whole ``Raw``.

    Raises
    ------
    InputError
        If the recording is not read by MNE.
    """
    raw = _whole(recording)
    return int(len(raw.ch_names) * raw.n_times * 8 * _PEAK_FACTOR)


def apply_raw_steps(recording: Recording, raw_steps: Sequence[RawStep], memory_bytes: int) -> Recording:
    """Load a recording and run steps on it.

    The recording handed in and its ``Raw`` stay as they are. Events that are the ``Raw``'s
    annotations follow the annotations through the steps. Events from elsewhere (events.tsv)
    are kept: they move with the samples where a step crops the beginning, those outside of
    what is left are dropped, and annotations that a step added are added.

    Parameters
    ----------
    recording
        A recording that MNE reads. It may be closed afterwards.
    raw_steps
        What to do, in order.
    memory_bytes
        Most memory that this may take.

    Returns
    -------
    Recording
        The result, in memory.

    Raises
    ------
    InputError
        If the recording is not read by MNE, or a step gives something else than a ``Raw``.
    DoesNotFit
        If loading and the steps are predicted to take more; nothing is loaded then.
    SourceError
        If a step fails on this recording.
    """
    needed_bytes = whole_bytes(recording)
    if needed_bytes > memory_bytes:
        raise DoesNotFit(
            f"{', '.join(step.name for step in raw_steps)} needs the whole recording in memory. "
            "Use steps that work on blocks, such as HighPass.",
            resource="memory",
            needed_bytes=needed_bytes,
            allowed_bytes=memory_bytes,
        )
    before = _whole(recording)
    raw = before.copy().load_data(verbose="ERROR")
    for step in raw_steps:
        raw = _run(step, raw)
    return RawRecording(raw, _events_after(recording.events, before, raw))


def _whole(recording: Recording) -> BaseRaw:
    raw: BaseRaw | None = recording.whole
    if raw is None:
        raise InputError(
            "A step on the whole Raw cannot take a recording that MNE does not read. Use steps that work on "
            "blocks, such as HighPass."
        )
    return raw


def _run(step: RawStep, raw: BaseRaw) -> BaseRaw:
    from mne.io import BaseRaw

    try:
        result = step.function(raw)
    except MemoryError:
        raise
    except Exception as error:
        raise SourceError(
            f"{step.name} failed ({type(error).__name__}: {error}). "
            "Mend the step, or leave the recording out."
        ) from error
    if result is None:
        return raw
    if not isinstance(result, BaseRaw):
        raise InputError(
            f"{step.name} gave a {type(result).__name__}. Return the Raw, or None if it was changed in place."
        )
    return result.load_data(verbose="ERROR")


# -- events ------------------------------------------------------------------------------


def _events_after(events: Events, before: BaseRaw, after: BaseRaw) -> Events | None:
    """Say what the events are after the steps; None leaves them to the annotations."""
    noted = RawRecording(before).events
    if events == noted:
        return None
    shift_s = float(after.first_time - before.first_time)
    known = {
        (round((onset_s - shift_s) * 1e4) + nearby, text)
        for onset_s, text in zip(noted.onset_s, noted.description, strict=True)
        for nearby in (-1, 0, 1)
    }
    rows = zip(*_columns(RawRecording(after).events), strict=True)
    added = [row for row in rows if (round(row[0] * 1e4), row[2]) not in known]
    # Resampling rounds the first sample's number, by half at most, and moves no sample.
    cropped_s = shift_s if abs(shift_s) * after.info["sfreq"] > 0.75 else 0.0
    return _merged(_moved(events, cropped_s, after), added)


def _columns(events: Events) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    return events.onset_s, events.duration_s, events.description


def _moved(events: Events, cropped_s: float, raw: BaseRaw) -> Events:
    """Move events to the clock that starts ``cropped_s`` later; drop those outside of ``raw``."""
    duration_s = raw.n_times / raw.info["sfreq"]
    onsets = np.asarray(events.onset_s) - cropped_s
    kept = np.flatnonzero((onsets >= 0) & (onsets < duration_s)).tolist()
    return Events(
        onset_s=tuple(float(onsets[i]) for i in kept),
        duration_s=tuple(events.duration_s[i] for i in kept),
        description=tuple(events.description[i] for i in kept),
        extras={name: tuple(column[i] for i in kept) for name, column in events.extras.items()},
    )


def _merged(events: Events, added: Sequence[tuple[float, float, str]]) -> Events:
    """Put rows among the events, in order of onset, without a value in the extra columns."""
    rows = [*zip(*_columns(events), strict=True), *added]
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    blank = (None,) * len(added)
    return Events(
        onset_s=tuple(rows[i][0] for i in order),
        duration_s=tuple(rows[i][1] for i in order),
        description=tuple(rows[i][2] for i in order),
        extras={name: tuple((*column, *blank)[i] for i in order) for name, column in events.extras.items()},
    )


# -- what a step is called ---------------------------------------------------------------


def _as_raw_step(step: object) -> RawStep:
    if isinstance(step, RawStep):
        return step
    if hasattr(step, "fn") and hasattr(step, "kwargs") and callable(getattr(step, "apply", None)):
        return _from_preprocessor(step)
    if callable(step):
        name = getattr(step, "__name__", type(step).__name__)
        raise InputError(
            f"{name} is a callable without a version, which a fingerprint needs. Use "
            f'RawStep({name}, name="...", version="1").'
        )
    raise InputError(f"{step!r} is no step. Use a step such as HighPass(0.5), or a RawStep.")


def _from_preprocessor(preprocessor: Any) -> RawStep:
    """Take a braindecode Preprocessor, which need not be of braindecode itself."""
    function, kwargs = preprocessor.fn, dict(preprocessor.kwargs)
    details: dict[str, Any] = {}
    if isinstance(function, str):
        name = f"mne.{function}"
        version = ".".join(metadata.version("mne").split(".")[:2])
    else:
        if isinstance(function, partial):
            details["args"] = list(function.args)
            kwargs = {**function.keywords, **kwargs}
            function = function.func
        name, version = _known_as(function)
        details["apply_on_array"] = bool(preprocessor.apply_on_array)
    return RawStep(preprocessor.apply, name, version, {"kwargs": kwargs, **details})


def _known_as(function: Any) -> tuple[str, str]:
    """Name a function of an installed package, and the package's version."""
    module = getattr(function, "__module__", None) or ""
    label = getattr(function, "__qualname__", None) or getattr(function, "__name__", "")
    # A bound method depends on its object; <lambda> and <locals> on the code around them.
    owner = getattr(function, "__self__", None)
    nameless = not label or "<" in label or not (owner is None or isinstance(owner, ModuleType))
    packages = None if nameless else metadata.packages_distributions().get(module.partition(".")[0])
    if packages is None:
        raise InputError(
            f"The version of {label or function!r}, which a fingerprint needs, is not known. "
            'Use RawStep(preprocessor.apply, name="...", version="1").'
        )
    return f"{module}.{label}", metadata.version(packages[0])


def _canonical(details: Mapping[str, Any], name: str) -> dict[str, JSON]:
    """Bring details into the form that reading their JSON gives."""
    try:
        text = json.dumps(dict(details), default=_scalar, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} has details that JSON cannot hold ({error}). Use RawStep(function, name, version) "
            "without them, and another version for other values."
        ) from None
    canonical: dict[str, JSON] = json.loads(text)
    return canonical


def _scalar(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r}")
