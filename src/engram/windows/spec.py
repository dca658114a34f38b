"""What windows are asked for: FixedWindows, EventWindows, and Spans of further signals.

The words and the half-open intervals are braindecode's (``create_fixed_length_windows``,
``create_windows_from_events``). Values only: which windows a table of recordings then has is
``engram.windows.index``'s to work out. Sizes and offsets may be told in seconds or in samples of the
signal they are of; seconds become samples at each recording's own rate by the one rounding rule,
``engram.units.seconds_to_samples``. (MNE rounds half to even and braindecode cuts an event's
duration off; both differ from the rule only where a time falls between two samples.)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engram.errors import InputError

__all__ = ["EventWindows", "FixedWindows", "Span", "check_names"]


def check_names(what: str, names: object, *, at_least: int = 0) -> None:
    """Refuse anything but a tuple of texts; one text alone would be taken for its letters.

    Raises
    ------
    InputError
        If ``names`` is no tuple of texts, or shorter than ``at_least``.
    """
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        remedy = f"({names!r},)" if isinstance(names, str) else "('square', 'rt')"
        raise InputError(f"{what}={names!r} is not a tuple of names. Write for example {what}={remedy}.")
    if len(names) < at_least:
        raise InputError(f"{what} names nothing. Give at least {at_least} name.")


def _is_finite(value: object) -> bool:
    """Tell whether a value is a finite number; text is none, whatever it says."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_amount(what: str, seconds: float | None, samples: float | None, *, above_zero: bool) -> None:
    """Check one amount that is told in seconds or in samples."""
    if seconds is not None and samples is not None:
        raise InputError(f"{what}_s={seconds} and {what}_samples={samples} say the same twice. Give one.")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool)):
        raise InputError(f"{what}_samples={samples!r} is not a whole number. Use {what}_s for seconds.")
    if seconds is not None and not _is_finite(seconds):
        raise InputError(f"{what}_s={seconds!r} is not a finite number of seconds. Give one.")
    amount = seconds if samples is None else samples
    if above_zero and amount is not None and amount <= 0:
        raise InputError(f"{what} is {amount}, and must be above zero. Give a positive length.")


def _check_stride(spec: FixedWindows | EventWindows) -> None:
    has_size = spec.window_size_s is not None or spec.window_size_samples is not None
    has_stride = spec.window_stride_s is not None or spec.window_stride_samples is not None
    if has_stride and not has_size:
        raise InputError(
            "A window stride is given without a window size, and one window has nothing to stride over. "
            "Give window_size_s or window_size_samples."
        )


def _check_places(spec: FixedWindows | EventWindows) -> None:
    """Check what says which part of a window is read, and from where."""
    _check_amount("crop", spec.crop_s, spec.crop_samples, above_zero=True)
    _check_amount("shift", spec.shift_s, spec.shift_samples, above_zero=True)
    has_crop = spec.crop_s is not None or spec.crop_samples is not None
    has_shift = spec.shift_s is not None or spec.shift_samples is not None
    if (has_crop or has_shift) and spec.beside:
        raise InputError(
            "Windows of several signals cannot be cropped or shifted: their samples would part. Leave "
            "crop and shift out, or the signals beside."
        )
    has_size = spec.window_size_s is not None or spec.window_size_samples is not None
    if has_crop and not (has_size or (isinstance(spec, EventWindows) and spec.has_duration)):
        raise InputError("A crop is given without a length to take it from. Give a window size.")


def _check_signals(spec: FixedWindows | EventWindows) -> None:
    names = spec.signals
    if len(set(names)) < len(names):
        raise InputError(f"Signals {names} name one twice. Name each signal of a window once.")


def _tidy(spec: FixedWindows | EventWindows) -> None:
    """Copy the choices of recordings, sorted, so that two that mean the same are written the same."""
    for name in ("where", "excluding"):
        choice: object = getattr(spec, name)
        if not isinstance(choice, Mapping):
            raise InputError(
                f"{name}={choice!r} is no mapping. Write for example {{'task': ('RestingState',)}}."
            )
        for column, values in choice.items():
            check_names(f"{name}[{column!r}]", values, at_least=1)
        object.__setattr__(spec, name, {column: choice[column] for column in sorted(choice)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A further signal beside the main one, cut about the same anchor on its own clock.

    Raises
    ------
    InputError
        If an amount is told twice or is out of its range.

    Examples
    --------
    Frames at 240 Hz with lags 0 to 32 before each bin of spike counts:

    >>> FixedWindows(
    ...     signal="robs",
    ...     window_size_samples=1,
    ...     beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
    ... ).signals
    ('robs', 'stim')
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    signal: str
    """Name of the signal."""
    offset_s: float | None = None
    """Start relative to the anchor in seconds; 0 where neither offset is given."""
    offset_samples: int | None = None
    """The same in samples of this signal."""
    window_size_s: float | None = None
    """Length in seconds; as long as the main signal's window lasts where neither size is given."""
    window_size_samples: int | None = None
    """The same in samples of this signal."""

    def __post_init__(self) -> None:
        _check_amount("offset", self.offset_s, self.offset_samples, above_zero=False)
        _check_amount("window_size", self.window_size_s, self.window_size_samples, above_zero=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedWindows:
    """Windows cut one after another from whole recordings.

    The first begins ``start_offset_s`` after the main signal's first sample. The stretch that is cut
    ends at ``stop_offset_s`` or the recording's end, whichever is earlier.

    Raises
    ------
    InputError
        If an amount is told twice, is out of its range, or a signal is named twice.

    Examples
    --------
    >>> FixedWindows(signal="eeg", window_size_s=4.0, window_stride_s=2.0).signals
    ('eeg',)
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    signal: str
    """The main signal: its samples are counted by size and stride."""
    window_size_s: float | None = None
    """Length in seconds; the whole stretch is one window where neither size is given."""
    window_size_samples: int | None = None
    """The same in samples."""
    window_stride_s: float | None = None
    """From one window's start to the next; the window size where neither stride is given."""
    window_stride_samples: int | None = None
    """The same in samples."""
    start_offset_s: float = 0.0
    """Where the first window begins, from the main signal's first sample."""
    stop_offset_s: float | None = None
    """Where the stretch that is cut ends, from the main signal's first sample; None: at its end."""
    drop_last_window: bool = True
    """False: where samples remain, one more window that ends exactly at the stretch's end."""
    beside: tuple[Span, ...] = ()
    """Further signals of each window."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Recordings asked for, by descriptive field: ``{"task": ("RestingState",)}``; all if empty."""
    excluding: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Recordings that are refused, by descriptive field: ``{"subject": ("NDARBA381JGH",)}``."""
    crop_s: float | None = None
    """Read only so much of each window, in seconds: the middle, or in training a stretch that is drawn
    anew in every pass. None: all of it."""
    crop_samples: int | None = None
    """The same in samples."""
    shift_s: float | None = None
    """In training, read each window earlier or later by a time that is drawn anew in every pass, at most
    so many seconds; one that would no longer be admissible stays. None: not at all."""
    shift_samples: int | None = None
    """The same in samples."""

    def __post_init__(self) -> None:
        _check_amount("window_size", self.window_size_s, self.window_size_samples, above_zero=True)
        _check_amount("window_stride", self.window_stride_s, self.window_stride_samples, above_zero=True)
        _check_amount("start_offset", self.start_offset_s, None, above_zero=False)
        _check_amount("stop_offset", self.stop_offset_s, None, above_zero=True)
        if self.start_offset_s < 0:
            raise InputError(f"start_offset_s={self.start_offset_s} is before the recording. Use 0 or more.")
        _check_stride(self)
        _check_signals(self)
        _check_places(self)
        _tidy(self)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of all signals of a window, the main one first."""
        return (self.signal, *(span.signal for span in self.beside))


@dataclass(frozen=True, slots=True, kw_only=True)
class EventWindows:
    """Windows about events.

    Every event that the anchor names is a trial, [onset + start offset, + duration) of the main signal.
    A trial is one window, or is cut into several of a window size.

    Raises
    ------
    InputError
        If no anchor is named, an amount is told twice or is out of its range, or a signal is named
        twice.

    Examples
    --------
    Two seconds from half a second after each target:

    >>> EventWindows(
    ...     signal="eeg",
    ...     anchor=("left_target", "right_target"),
    ...     trial_start_offset_s=0.5,
    ...     trial_duration_s=2.0,
    ... ).signals
    ('eeg',)
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    signal: str
    """The main signal: its samples are counted by durations, size and stride."""
    anchor: tuple[str, ...]
    """Descriptions of the events."""
    trial_start_offset_s: float | None = None
    """Start of a trial from its event's onset in seconds; 0 where neither offset is given."""
    trial_start_offset_samples: int | None = None
    """The same in samples."""
    trial_duration_s: float | None = None
    """Length of a trial in seconds; the event's own duration where neither duration is given."""
    trial_duration_samples: int | None = None
    """The same in samples."""
    window_size_s: float | None = None
    """Length of a window in seconds; the trial is one window where neither size is given."""
    window_size_samples: int | None = None
    """The same in samples."""
    window_stride_s: float | None = None
    """From one window's start to the next; the window size where neither stride is given."""
    window_stride_samples: int | None = None
    """The same in samples."""
    drop_last_window: bool = True
    """False: where samples of a trial remain, one more window that ends exactly at the trial's end."""
    beside: tuple[Span, ...] = ()
    """Further signals of each window."""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Recordings asked for, by descriptive field: ``{"task": ("contrastChangeDetection",)}``."""
    excluding: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Recordings that are refused, by descriptive field: ``{"subject": ("NDARBA381JGH",)}``."""
    crop_s: float | None = None
    """Read only so much of each window, in seconds: the middle, or in training a stretch that is drawn
    anew in every pass. None: all of it."""
    crop_samples: int | None = None
    """The same in samples."""
    shift_s: float | None = None
    """In training, read each window earlier or later by a time that is drawn anew in every pass, at most
    so many seconds; one that would no longer be admissible stays. None: not at all."""
    shift_samples: int | None = None
    """The same in samples."""
    first_between: tuple[str, ...] = ()
    """Descriptions of events that divide a recording: of the anchor's events between one of them and the
    next only the first is a trial, and those before the first and after the last of them are none.
    Empty: all are."""

    def __post_init__(self) -> None:
        check_names("anchor", self.anchor, at_least=1)
        check_names("first_between", self.first_between)
        _check_amount(
            "trial_start_offset", self.trial_start_offset_s, self.trial_start_offset_samples, above_zero=False
        )
        _check_amount("trial_duration", self.trial_duration_s, self.trial_duration_samples, above_zero=True)
        _check_amount("window_size", self.window_size_s, self.window_size_samples, above_zero=True)
        _check_amount("window_stride", self.window_stride_s, self.window_stride_samples, above_zero=True)
        _check_stride(self)
        _check_signals(self)
        _check_places(self)
        _tidy(self)

    @property
    def has_duration(self) -> bool:
        """Whether trials last as long as is said here, not as long as their events."""
        return self.trial_duration_s is not None or self.trial_duration_samples is not None

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of all signals of a window, the main one first."""
        return (self.signal, *(span.signal for span in self.beside))
