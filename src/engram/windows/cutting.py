"""Where windows lie: a trial and a window's number within it become samples of every signal.

A trial is what windows are cut from: the stretch of a whole recording, or one event's. Its number is
its origin: the recording's, or the event's row. Nothing is kept per window: `Cutting.lay` computes, for
as many windows as are asked about, and it is the one place that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError
from engram.units import times_to_samples
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.tables import SignalTable, Tables

__all__ = ["Cutting", "Located", "Stretches", "Trials"]


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where some windows lie: arrays of one entry per window.

    Samples count from the first one of the signal in its recording.
    """

    recording: NDArray[np.int32]
    """(window,) number of the recording."""
    starts: Mapping[str, NDArray[np.int64]]
    """Signal -> (window,) first sample."""
    lengths: Mapping[str, NDArray[np.int64]]
    """Signal -> (window,) length in samples."""
    anchor_s: NDArray[np.float64]
    """(window,) anchor on the recording's clock, in seconds."""
    i_window_in_trial: NDArray[np.int64]
    """(window,) number of the window within its trial, refused ones counted."""

    def between(self, begin: int, end: int) -> Located:
        """Give windows [begin, end)."""
        some = slice(begin, end)
        return Located(
            self.recording[some],
            {name: start[some] for name, start in self.starts.items()},
            {name: length[some] for name, length in self.lengths.items()},
            self.anchor_s[some],
            self.i_window_in_trial[some],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """Some trials: arrays of one entry per trial, samples of the main signal."""

    recording: NDArray[np.int32]
    """(trial,) number of the recording."""
    anchor_s: NDArray[np.float64]
    """(trial,) anchor of the first window, in seconds on the recording's clock."""
    start: NDArray[np.int64]
    """(trial,) first sample."""
    stop: NDArray[np.int64]
    """(trial,) one past the last sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Windows, as stretches of consecutive ones of one trial each: arrays of one entry per stretch.

    Examples
    --------
    Two trials of three windows; without the second window there are three stretches:

    >>> import numpy as np
    >>> trials = np.array([4, 7], np.int32)
    >>> six = Stretches(trials, np.zeros(2, np.int32), np.array([0, 3, 6]), None)
    >>> five = six.take(np.array([True, False, True, True, True, True]))
    >>> five.origin, five.i_first, five.bounds
    (array([4, 4, 7], dtype=int32), array([0, 2, 0], dtype=int32), array([0, 1, 2, 5]))
    """

    origin: NDArray[np.int32]
    """(stretch,) trial: row of its event, or number of the recording."""
    i_first: NDArray[np.int32]
    """(stretch,) number within the trial of the first window."""
    bounds: NDArray[np.int64]
    """(stretch + 1,) number of the first window; the last is how many there are."""
    targets: NDArray[np.float32] | NDArray[np.int32] | None
    """(stretch,) target of each trial, if trials have targets."""

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays: 16 per stretch, and 4 where there are targets."""
        arrays = (self.origin, self.i_first, self.bounds, self.targets)
        return sum(array.nbytes for array in arrays if array is not None)

    def find(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the stretch of each window, and its number within the trial."""
        stretch = np.searchsorted(self.bounds, numbers, side="right") - 1
        return stretch, self.i_first[stretch] + (numbers - self.bounds[stretch])

    def take(self, keep: NDArray[np.bool_]) -> Stretches:
        """Keep some windows, (window,) bool: as few stretches as there can be."""
        if keep.all():
            return self
        outside = np.zeros(1, np.int8)  # NumPy would make all int64 for the sake of a plain 0
        edges = np.diff(keep.view(np.int8), prepend=outside, append=outside)
        inner = self.bounds[1:-1]
        joints = inner[keep[inner] & keep[inner - 1]]
        firsts = np.sort(np.concatenate([np.flatnonzero(edges == 1), joints]))
        stops = np.sort(np.concatenate([np.flatnonzero(edges == -1), joints]))
        stretch, i_first = self.find(firsts)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - firsts)])
        targets = None if self.targets is None else self.targets[stretch]
        return Stretches(self.origin[stretch], i_first.astype(np.int32), bounds, targets)


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """One signal: what it takes to cut it, per recording."""

    name: str
    rate_hz: NDArray[np.float64]
    start_s: NDArray[np.float64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True, eq=False)
class Cutting:
    """A spec at the rates of the recordings there are.

    Examples
    --------
    >>> import numpy as np, pyarrow as pa
    >>> one, zero = np.ones(1), np.zeros(1)
    >>> eeg = SignalTable(
    ...     present=one > 0,
    ...     n_samples=np.array([1000]),
    ...     rate_hz=one * 100,
    ...     start_s=zero,
    ...     form=np.zeros(1, np.int32),
    ...     forms=("2 channels (C3, C4), float16",),
    ... )
    >>> events = pa.table({name: [] for name in ("recording", "onset_s", "duration_s", "description")})
    >>> tables = Tables(("a",), ("f",), {}, {"eeg": eeg}, events)
    >>> cutting = Cutting.of(tables, FixedWindows(signal="eeg", window_size_s=2.0, window_stride_s=1.0))
    >>> recording = np.zeros(3, np.int32)
    >>> cutting.n_windows(recording[:1])
    array([9])
    >>> cutting.lay(recording, np.array([0, 1, 8])).starts["eeg"]
    array([  0, 100, 800])
    """

    lines: tuple[_Line, ...]
    """The signals, the main one first."""
    stride: NDArray[np.int64] | None
    """(recording,) from one window to the next in samples, or None where a trial is one window."""
    drop_last_window: bool
    """Whether what remains of a trial is left out."""
    start_offset_s: float
    """Whole recordings: where the first window begins, from the main signal's first sample."""
    trial_stop: NDArray[np.int64] | None
    """(recording,) whole recordings: where the stretch that is cut ends; None with events."""
    trial_length: NDArray[np.int64] | None
    """(recording,) events: length of a trial in samples; None where the event says its own."""
    event_recording: NDArray[np.int32] | None
    """(event,) recording of each event; None where whole recordings are cut."""
    event_onset_s: NDArray[np.float64]
    """(event,) onset of each event."""
    event_duration_s: NDArray[np.float64]
    """(event,) duration of each event."""
    crop: NDArray[np.int64] | None
    """(recording,) samples of a window that are read; None: all."""
    shift: NDArray[np.int64] | None
    """(recording,) samples by which a window is moved in training, at most; None: not at all."""

    @classmethod
    def of(cls, tables: Tables, spec: FixedWindows | EventWindows) -> Self:
        """Convert a spec's seconds to samples, at the rate of every recording.

        Raises
        ------
        InputError
            If the window size, its stride or crop is less than a sample, or the crop is longer than
            the window.
        """
        signal = tables.signals[spec.signal]
        rate_hz = _rates(signal)
        size = _in_samples(spec.window_size_s, spec.window_size_samples, rate_hz)
        stride = _in_samples(spec.window_stride_s, spec.window_stride_samples, rate_hz)
        stride = size if stride is None else stride
        crop = _in_samples(spec.crop_s, spec.crop_samples, rate_hz)
        for what, amount in (("window size", size), ("window stride", stride), ("crop", crop)):
            if amount is not None and amount.min() < 1:
                slowest_hz = rate_hz[amount.argmin()]
                raise InputError(
                    f"The {what} is less than a sample of {spec.signal!r} at {slowest_hz:g} Hz. Lengthen it."
                )
        trial_stop = trial_length = recording = None
        offset = _zeros(rate_hz)
        if isinstance(spec, FixedWindows):
            start_offset_s = spec.start_offset_s
            stop = _in_samples(spec.stop_offset_s, None, rate_hz)
            trial_stop = signal.n_samples if stop is None else np.minimum(stop, signal.n_samples)
        else:
            start_offset_s = 0.0
            recording = tables.event_numbers("recording")
            found = _in_samples(spec.trial_start_offset_s, spec.trial_start_offset_samples, rate_hz)
            offset = offset if found is None else found
            trial_length = _in_samples(spec.trial_duration_s, spec.trial_duration_samples, rate_hz)
        whole = trial_length if size is None else size
        if crop is not None and whole is not None and (wrong := np.flatnonzero(crop > whole)).size:
            raise InputError(
                f"A crop of {crop[wrong[0]]} samples is longer than the window, which has {whole[wrong[0]]}. "
                "Give a shorter one."
            )
        main = _Line(spec.signal, rate_hz, signal.start_s, offset, size)
        return cls(
            lines=(main, *(_line(span, tables.signals[span.signal]) for span in spec.beside)),
            stride=stride,
            drop_last_window=spec.drop_last_window,
            start_offset_s=start_offset_s,
            trial_stop=trial_stop,
            trial_length=trial_length,
            event_recording=recording,
            event_onset_s=tables.event_numbers("onset_s"),
            event_duration_s=tables.event_numbers("duration_s"),
            crop=crop,
            shift=_in_samples(spec.shift_s, spec.shift_samples, rate_hz),
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of what was worked out; columns of the tables are only looked at."""
        held = [self.stride, self.trial_stop, self.trial_length, self.crop, self.shift]
        held += [array for line in self.lines for array in (line.offset, line.size)]
        rates = sum(_held_bytes(line.rate_hz) for line in self.lines)
        return rates + sum(_held_bytes(array) for array in held if array is not None)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals, the main one first."""
        return tuple(line.name for line in self.lines)

    def recordings(self, origin: NDArray[np.int32]) -> NDArray[np.int32]:
        """Give the recording of each origin."""
        return origin if self.event_recording is None else self.event_recording[origin]

    def trials(self, origin: NDArray[np.int32]) -> Trials:
        """Place trials.

        Parameters
        ----------
        origin
            (trial,) number of the recording, or row of the event.
        """
        recording = self.recordings(origin)
        main = self.lines[0]
        rate_hz, start_s = main.rate_hz[recording], main.start_s[recording]
        if self.trial_stop is not None:
            # Not by way of the clock: adding its start and taking it away again may cost a sample.
            offset_s = np.full(len(recording), self.start_offset_s)
            start = times_to_samples(offset_s, rate_hz)
            return Trials(recording, start_s + self.start_offset_s, start, self.trial_stop[recording])
        onset_s = self.event_onset_s[origin]
        start = times_to_samples(onset_s - start_s, rate_hz) + main.offset[recording]
        if self.trial_length is None:
            length = times_to_samples(self.event_duration_s[origin], rate_hz)
        else:
            length = self.trial_length[recording]
        return Trials(recording, onset_s, start, start + length)

    def n_windows(self, origin: NDArray[np.int32]) -> NDArray[np.int64]:
        """Count the windows that each trial has room for: (trial,) int64."""
        trials = self.trials(origin)
        size = self.lines[0].size
        length = trials.stop - trials.start
        if size is None or self.stride is None:
            return (length > 0).astype(np.int64)
        spare = length - size[trials.recording]
        stride = self.stride[trials.recording]
        n_windows = spare // stride + 1
        if not self.drop_last_window:
            n_windows += spare % stride != 0
        return np.where(spare < 0, 0, n_windows)

    def lay(self, origin: NDArray[np.int32], i_window: NDArray[np.int64]) -> Located:
        """Place windows.

        Parameters
        ----------
        origin
            (window,) trial that each window is of.
        i_window
            (window,) number within the trial, less than `n_windows`.
        """
        trials = self.trials(origin)
        recording, main = trials.recording, self.lines[0]
        start, lengths = trials.start, self._lengths(trials)
        if self.stride is not None:
            # The last window of a trial ends with it, and only where it is kept does this bind.
            start = np.minimum(start + i_window * self.stride[recording], trials.stop - lengths[main.name])
        anchor_s = trials.anchor_s + (start - trials.start) / main.rate_hz[recording]
        starts = {main.name: start}
        for line in self.lines[1:]:
            since_s = anchor_s - line.start_s[recording]
            starts[line.name] = times_to_samples(since_s, line.rate_hz[recording]) + line.offset[recording]
        return Located(recording, starts, lengths, anchor_s, i_window)

    def lengths(self, origin: NDArray[np.int32]) -> Mapping[str, NDArray[np.int64]]:
        """Give what is read of a window, all of one trial alike: signal -> (trial,) samples."""
        trials = self.trials(origin)
        return self._lengths(trials) if self.crop is None else self._cropped(trials.recording)

    def place(self, whole: Located, offset: NDArray[np.int64] | None = None) -> Located:
        """Give what is read of windows.

        Parameters
        ----------
        whole
            Where they lie.
        offset
            (window,) samples from a window's first one to the first that is read; None: the middle.
        """
        main = self.lines[0]
        lengths = whole.lengths if self.crop is None else self._cropped(whole.recording)
        if offset is None:
            if self.crop is None:
                return whole
            offset = (whole.lengths[main.name] - lengths[main.name]) // 2
        # With an offset there is one signal.
        anchor_s = whole.anchor_s + offset / main.rate_hz[whole.recording]
        start = whole.starts[main.name] + offset
        return Located(whole.recording, {main.name: start}, lengths, anchor_s, whole.i_window_in_trial)

    def _cropped(self, recording: NDArray[np.int32]) -> Mapping[str, NDArray[np.int64]]:
        assert self.crop is not None
        return {self.lines[0].name: self.crop[recording]}

    def _lengths(self, trials: Trials) -> Mapping[str, NDArray[np.int64]]:
        recording, main = trials.recording, self.lines[0]
        length = trials.stop - trials.start if main.size is None else main.size[recording]
        main_s = length / main.rate_hz[recording]
        lengths = {main.name: length}
        for line in self.lines[1:]:
            lengths[line.name] = (
                times_to_samples(main_s, line.rate_hz[recording])
                if line.size is None
                else line.size[recording]
            )
        return lengths


def _line(span: Span, signal: SignalTable) -> _Line:
    rate_hz = _rates(signal)
    offset = _in_samples(span.offset_s, span.offset_samples, rate_hz)
    size = _in_samples(span.window_size_s, span.window_size_samples, rate_hz)
    return _Line(span.signal, rate_hz, signal.start_s, _zeros(rate_hz) if offset is None else offset, size)


def _rates(signal: SignalTable) -> NDArray[np.float64]:
    """Give the rates, and any rate there is where the signal is absent and never cut."""
    found = signal.rate_hz[signal.present]
    return _held_once(np.where(signal.present, signal.rate_hz, found[0]))


def _in_samples(
    seconds: float | None, samples: int | None, rate_hz: NDArray[np.float64]
) -> NDArray[np.int64] | None:
    if samples is not None:
        return np.broadcast_to(np.int64(samples), rate_hz.shape)
    if seconds is None:
        return None
    return _held_once(times_to_samples(np.full(len(rate_hz), seconds), rate_hz))


def _zeros(rate_hz: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.broadcast_to(np.int64(0), rate_hz.shape)


def _held_once(array: NDArray[Any]) -> NDArray[Any]:
    """Hold a number once where it is the same for every recording, as rates nearly always are."""
    return np.broadcast_to(array[0].copy(), array.shape) if bool((array == array[0]).all()) else array


def _held_bytes(array: NDArray[Any]) -> int:
    return array.itemsize if array.strides == (0,) else array.nbytes
