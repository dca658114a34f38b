"""Reading: the tables of a store as values for windows, and windows as arrays.

This module decides how the samples of many windows get into one array: every window by one
read into its row, decoded together, once per precision. Which windows, and when, is left to
``engram.windows`` and ``engram.batches.loader``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engram.errors import InputError
from engram.store.precision import Precision, Scaling, decode
from engram.store.reader import Extent, Store
from engram.windows.cutting import Located
from engram.windows.tables import SignalTable, Tables

__all__ = ["Reader", "Stored", "tables_of"]

_DECODING: Mapping[Precision, int] = {
    "exact": 0,
    "float32": 0,
    "float16": 4,
    "bfloat16": 4 + 4,  # widened to 32 bits, then shifted
    "int16": 8 + 8,  # times scale, plus offset; both are gone when the last result is narrowed
}
"""Bytes per value that ``engram.store.precision.decode`` holds at most, beside its argument."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the samples of one signal of one recording are, and what becomes of them.

    Usually in the recording's own extent. The signal may also number the rows of a bank:
    then the samples are those rows.
    """

    extent: Extent
    """Of the samples: the recording's own, or the whole bank."""
    numbers: Extent | None
    """Of the numbers of the bank's rows, or None without a bank."""
    is_channels: bool
    """True if one sample is one value of each channel: axes (time, channel)."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as it is delivered."""
        of_bank = () if self.numbers is None else self.numbers.part.grid.sample_shape
        return of_bank + self.extent.part.grid.sample_shape

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype that is delivered."""
        return self.extent.part.grid.dtype if self.extent.precision == "exact" else "float32"

    def n_bytes(self, n_samples: int) -> tuple[int, int]:
        """Predict what one window takes in a batch, and beside it while it is read.

        Parameters
        ----------
        n_samples
            Length of the window, zeros included.

        Returns
        -------
        tuple of int and int
            Bytes of the window in the batch, and of the buffers it passes through. A batch of
            several precisions is put together in one buffer more, of its own size.
        """
        n_values = n_samples * math.prod(self.sample_shape)
        stored_bytes = np.dtype(self.extent.part.grid.dtype).itemsize
        value_bytes = np.dtype(self.dtype).itemsize
        decoding_bytes = _DECODING[self.extent.precision]
        # Stored and decoded values are there before the batch, and the decoded ones while they are turned.
        turning_bytes = (value_bytes if decoding_bytes else stored_bytes) if self.is_channels else 0
        scratch_bytes = n_values * max(stored_bytes + decoding_bytes - value_bytes, turning_bytes)
        if self.extent.precision == "int16":
            scratch_bytes += 2 * 8 * (self.sample_shape or (1,))[-1]  # the window's own scale and offset
        return n_values * value_bytes, scratch_bytes


class Reader:
    """Reads windows of a store.

    Parameters
    ----------
    store
        The store, which stays the caller's to close.
    recordings
        Ids of the recordings, in the order in which windows number them.

    Notes
    -----
    Like the store, may be used by several threads, after ``fork``, and after pickling.
    """

    def __init__(self, store: Store, recordings: Sequence[str]) -> None:
        self._store = store
        self._recordings = recordings
        signals = store.signals.filter(pc.is_valid(store.signals["bank"]))
        self._banks = {
            (row["recording"], row["signal"]): row["bank"]
            for row in signals.select(["recording", "signal", "bank"]).to_pylist()
        }
        self._axes = {
            row["part"]: tuple(row["axes"]) for row in store.table("parts", ["part", "axes"]).to_pylist()
        }

    def stored(self, recording: str, signal: str) -> Stored:
        """Find where the samples of a signal are.

        Raises
        ------
        StoreMissing
            If the store has no such recording, signal or bank.
        """
        extent, numbers = self._store.extent(recording, signal), None
        if bank := self._banks.get((recording, signal)):
            extent, numbers = self._store.extent(bank, bank), extent
        is_single = numbers is None or not numbers.part.grid.sample_shape
        return Stored(extent, numbers, is_single and self._axes[extent.part.path] == ("time", "channel"))

    def read(self, located: Located, signal: str) -> NDArray[Any]:
        """Read one signal of some windows.

        Parameters
        ----------
        located
            Where the windows lie; at least one.
        signal
            Name of the signal.

        Returns
        -------
        ndarray
            C-contiguous (window, channel, time) where the stored axes are (time, channel), else
            (window, time, \\*sample shape): float32 in the signal's unit, or the stored
            integers. Time is that of the longest window; shorter ones are followed by zeros.

        Raises
        ------
        InputError
            If the recordings' samples differ in form.
        StoreDamaged
            If a file is missing or cut short.
        """
        places = [self.stored(self._recordings[r], signal) for r in located.recording.tolist()]
        _check_same_form(places)
        starts, lengths = located.starts[signal], located.lengths[signal]
        whole: NDArray[Any] | None = None
        for rows in _by_precision(places):
            alike = [places[row] for row in rows]
            values = self._read_alike(alike, starts[rows], lengths[rows], int(lengths.max()))
            if places[0].is_channels:
                values = np.ascontiguousarray(values.swapaxes(1, 2))
            if len(rows) == len(places):
                return values
            whole = np.empty((len(places), *values.shape[1:]), values.dtype) if whole is None else whole
            whole[rows] = values
        assert whole is not None, "there is at least one window"
        return whole

    def _read_alike(
        self, places: Sequence[Stored], starts: NDArray[np.int64], lengths: NDArray[np.int64], longest: int
    ) -> NDArray[Any]:
        """Read windows of one precision: (window, time, \\*sample shape), decoded."""
        first = places[0]
        dtype, precision = first.extent.part.grid.dtype, first.extent.precision
        stored = np.empty((len(places), longest, *first.sample_shape), dtype)
        for out, place, start, length in zip(stored, places, starts.tolist(), lengths.tolist(), strict=True):
            self._fill(out[:length], place, start)
            out[length:] = 0
        if precision in ("exact", "float32"):
            return stored
        if precision != "int16":
            return decode(stored, precision)
        values = decode(stored, precision, self._scaling(places, stored.ndim))
        for out, length in zip(values, lengths.tolist(), strict=True):
            out[length:] = 0  # a stored zero is the middle of the channel's range
        return values

    def _fill(self, out: NDArray[Any], place: Stored, start: int) -> None:
        if place.numbers is None:
            self._store.read_stored(place.extent, start, start + len(out), out)
            return
        numbers = self._store.read_stored(place.numbers, start, start + len(out))
        rows = out.reshape(-1, 1, *place.extent.part.grid.sample_shape)
        for row, number in zip(rows, numbers.ravel().tolist(), strict=True):
            self._store.read_stored(place.extent, number, number + 1, row)

    def _scaling(self, places: Sequence[Stored], n_axes: int) -> Scaling:
        """Line up every window's own scaling: (window, 1, ..., channel)."""
        each = [self._store.scaling(place.extent.recording, place.extent.part.signal) for place in places]
        shape = (len(places), *(1 for _ in range(n_axes - 2)), -1)
        scale, offset = np.stack([one.scale for one in each]), np.stack([one.offset for one in each])
        return Scaling(scale.reshape(shape), offset.reshape(shape))


def _by_precision(places: Sequence[Stored]) -> Iterator[list[int]]:
    rows: dict[Precision, list[int]] = {}
    for row, place in enumerate(places):
        rows.setdefault(place.extent.precision, []).append(row)
    yield from rows.values()


def _check_same_form(places: Iterable[Stored]) -> None:
    first, *others = places
    form = first.sample_shape, first.dtype, first.is_channels
    for other in others:
        if (other.sample_shape, other.dtype, other.is_channels) != form:
            one, two = first.numbers or first.extent, other.numbers or other.extent
            raise InputError(
                f"{one.part.signal!r} is {first.dtype} {first.sample_shape} in {one.recording!r} and "
                f"{other.dtype} {other.sample_shape} in {two.recording!r}: they cannot share a batch. "
                "Use mode='groups' with by='recording'."
            )


def tables_of(store: Store) -> Tables:
    """Give the tables of a store as windows want them: values, without banks.

    Parameters
    ----------
    store
        An open store.

    Returns
    -------
    Tables
        Recordings sorted by id, their fields, signals and events.

    Raises
    ------
    StoreDamaged
        If a table cannot be read.
    """
    recordings = store.recordings.filter(pc.invert(store.recordings["is_bank"]))
    ids = tuple(recordings["recording"].to_pylist())
    own = {"recording", "is_bank", "fingerprint", "source_bytes"}
    return Tables(
        ids=ids,
        fingerprints=tuple(recordings["fingerprint"].to_pylist()),
        fields={
            name: tuple(recordings[name].to_pylist()) for name in recordings.column_names if name not in own
        },
        signals=_signal_tables(store, ids),
        events=_events(store, ids),
    )


def _events(store: Store, ids: Sequence[str]) -> pa.Table:
    """Write recordings as their numbers, and sort by recording and onset."""
    events = store.events
    numbers = pc.index_in(events["recording"], pa.array(ids, pa.string()))
    events = events.set_column(events.column_names.index("recording"), "recording", numbers)
    return events.filter(pc.is_valid(events["recording"])).sort_by(
        [("recording", "ascending"), ("onset_s", "ascending")]
    )


def _signal_tables(store: Store, ids: Sequence[str]) -> dict[str, SignalTable]:
    reader = Reader(store, ids)
    number_of = {recording: number for number, recording in enumerate(ids)}
    rows: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for row in store.signals.select(["recording", "signal", "gaps"]).to_pylist():
        if row["recording"] in number_of:
            rows.setdefault(row["signal"], []).append((number_of[row["recording"]], row))
    return {signal: _signal_table(store, reader, len(ids), of) for signal, of in sorted(rows.items())}


def _signal_table(
    store: Store, reader: Reader, n_recordings: int, rows: Iterable[tuple[int, Mapping[str, Any]]]
) -> SignalTable:
    present, form = np.zeros(n_recordings, np.bool_), np.zeros(n_recordings, np.int32)
    n_samples = np.zeros(n_recordings, np.int64)
    rate_hz, start_s = np.zeros(n_recordings), np.zeros(n_recordings)
    forms: dict[_Form, int] = {}
    gaps = {}
    for number, row in rows:
        stored = reader.stored(row["recording"], row["signal"])
        extent = stored.numbers or stored.extent
        present[number] = True
        n_samples[number], rate_hz[number], start_s[number] = extent.n_samples, extent.rate_hz, extent.start_s
        form[number] = forms.setdefault(_form(store, stored), len(forms))
        if row["gaps"]:
            gaps[number] = np.array(row["gaps"], np.int64).reshape(-1, 2)
    return SignalTable(present, n_samples, rate_hz, start_s, form, _in_words(forms), gaps)


_Form: TypeAlias = tuple[tuple[int, ...], str, bool, tuple[tuple[str, str], ...]]
"""Sample shape, dtype, whether samples are channels, and names and units of the channels."""


def _form(store: Store, stored: Stored) -> _Form:
    """Give what must be equal for windows to share a batch."""
    channels = store.channels(stored.extent.recording, stored.extent.part.signal)
    named = tuple((channel["channel"], channel["unit"]) for channel in channels)
    return stored.sample_shape, stored.dtype, stored.is_channels, named


def _in_words(forms: Iterable[_Form]) -> tuple[str, ...]:
    """Describe forms, so that no two read the same."""
    words = {form: _one_in_words(form) for form in forms}
    count = Counter(words.values())
    names = {form: blake2b(repr(form).encode(), digest_size=3).hexdigest() for form in words}
    return tuple(text if count[text] == 1 else f"{text}, names {names[form]}" for form, text in words.items())


def _one_in_words(form: _Form) -> str:
    shape, dtype, is_channels, channels = form
    if channels:
        names = [name for name, _ in channels]
        shown = ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]}"
        units = " or ".join(sorted({unit for _, unit in channels if unit}))
        return f"{len(names)} channels ({shown}), {dtype}{f' in {units}' if units else ''}"
    if is_channels:
        return f"{shape[0]} channels, {dtype}"
    return f"{' x '.join(map(str, shape)) or 'single numbers'}, {dtype}"
