"""Reading: the tables of a store as values for windows, and windows as arrays.

This module decides which samples of which parts make up the rows of one array, and what form
that array has. How they get there is ``engram.store.gather``'s; which windows, and when, is
left to ``engram.windows`` and ``engram.batches.loader``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engram.errors import InputError, StoreDamaged
from engram.store.backend import Part
from engram.store.gather import Ranges, check, gather, scratch_bytes
from engram.store.precision import Precision, Scaling
from engram.store.reader import Extent, Store
from engram.store.tables import codes_of, numbers_of
from engram.windows.cutting import Located
from engram.windows.tables import SignalTable, Tables

__all__ = ["Dtype", "Reader", "Reads", "SignalReads", "Stored", "align", "tables_of"]

Dtype: TypeAlias = Literal["float32", "bfloat16"]
"""What a model may be given instead of what is stored: integers too, then."""


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
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of a bank's rows in one sample; empty without a bank, or where a sample is one row."""
        return () if self.numbers is None else self.numbers.part.grid.sample_shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as it is delivered."""
        return self.rows_shape + self.extent.part.grid.sample_shape

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype that is delivered."""
        return self.extent.part.grid.dtype if self.extent.precision == "exact" else "float32"

    def n_bytes(self, n_samples: int, dtype: Dtype | None = None) -> int:
        """Predict what one window takes in a batch.

        Parameters
        ----------
        n_samples
            Length of the window, zeros included.
        dtype
            What it is delivered as; None: ``self.dtype``.
        """
        return n_samples * math.prod(self.sample_shape) * _item_bytes(dtype or self.dtype)

    def found_bytes(self, n_samples: int) -> int:
        """Predict what is known of one window from when it is found until it is read.

        Parameters
        ----------
        n_samples
            Length of the window.
        """
        of_window, of_row = _FOUND_BYTES
        return of_window + (0 if self.numbers is None else n_samples * math.prod(self.rows_shape) * of_row)

    def scratch_bytes(
        self,
        n_samples: int,
        dtype: Dtype | None = None,
        *,
        has_files: bool = True,
        is_direct: bool = False,
    ) -> int:
        """Predict the buffers that windows pass through while they are read, however many.

        Parameters
        ----------
        n_samples
            Length of the longest window.
        dtype
            What they are delivered as; None: ``self.dtype``.
        has_files
            Whether they lie in files (``Backend.files``).
        is_direct
            Whether they are read past the page cache.
        """
        grid, precision = self.extent.part.grid, self.extent.precision
        n_at_once = n_samples if self.numbers is None else 1
        return scratch_bytes(
            grid,
            precision,
            n_at_once,
            dtype or self.dtype,
            is_turned=self.is_channels,
            has_files=has_files,
            is_direct=is_direct,
        )


_FOUND_BYTES = 256, 64
"""What is known of a window, and of each row of a bank that it has: four times five numbers, and more,
and five numbers while they are joined with those of other windows."""

_CHUNK_BYTES = 8 * 10**6
"""What is read at once: in a batch of 9 MB samples, the next one is asked for while one is read."""


def align(n_bytes: int) -> int:
    """Round bytes up, so that the next signal in the same buffer begins with a cache line."""
    return -(-n_bytes // 64) * 64


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True, slots=True, eq=False)
class SignalReads:
    """What has to be read of one signal for some windows, and the form of the array it goes to."""

    ranges: tuple[Ranges, ...]
    """The samples, by how they are stored."""
    lengths: NDArray[np.int64]
    """(window,) samples of each window."""
    longest: int
    """Samples of the longest window."""
    sample_shape: tuple[int, ...]
    """Shape of one sample as it is delivered."""
    rows_shape: tuple[int, ...]
    """Shape of a bank's rows in one sample."""
    dtype: str
    """NumPy's name of the dtype that is delivered, or ``"bfloat16"``."""
    is_channels: bool
    """Whether channels are delivered before time."""
    is_even: bool = False
    """Whether it is known that all windows are of the same length."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(window, channel, time) if ``is_channels``, else (window, time, \\*sample shape)."""
        if self.is_channels:
            return (len(self.lengths), *self.sample_shape, self.longest)
        return (len(self.lengths), self.longest, *self.sample_shape)

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The same with a bank's rows one after another, also those of one sample."""
        n_windows, longest = self.shape[:2]
        of_row = self.sample_shape[len(self.rows_shape) :]
        return (n_windows, longest * math.prod(self.rows_shape), *of_row)

    def over(self, buffer: NDArray[np.uint8]) -> NDArray[Any]:
        """Give the array over the first bytes of a buffer."""
        return np.ndarray(self.shape, "uint16" if self.dtype == "bfloat16" else self.dtype, buffer)


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """What has to be read for one batch."""

    numbers: NDArray[np.int64]
    """(window,) numbers of the windows in their index."""
    signals: Mapping[str, SignalReads]
    """By signal, the target's too; empty where there is no window."""
    n_global: int
    """Windows of the whole batch over all ranks."""
    dtype: Dtype | None = None
    """What a model is given, if not what is stored."""
    targets: NDArray[np.float32] | NDArray[np.int64] | None = None
    """As a batch has them: (window, 1) float32 or (window,) int64; None if there are none, or a signal is."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def ranges(self) -> Iterator[Ranges]:
        """All that is read, in the order in which it is."""
        return (ranges for reads in self.signals.values() for ranges in reads.ranges)


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
        self._places: dict[str, _Places] = {}

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

    def find_each(
        self, located: Located, bounds: Sequence[int], signal: str, dtype: Dtype | None = None
    ) -> Iterator[SignalReads]:
        """Find what has to be read of one signal for each of some batches: hardly more work than for one.

        Parameters
        ----------
        located
            Where the windows of all batches lie.
        bounds
            (batch + 1,) number in ``located`` of each batch's first window; the last is how many there
            are. Of a batch without windows nothing is given.
        signal
            Name of the signal.
        dtype
            What to deliver; None: float32, or the stored integers.

        Raises
        ------
        InputError
            At a batch whose recordings' samples differ in form.
        StoreDamaged
            At a batch whose numbers of a bank's rows cannot be read.
        """
        places, lengths = self._placed(signal), located.lengths[signal]
        table = places.table[:, located.recording]
        # Once for all batches: NumPy's calls are slow where a batch has just been through the caches.
        are_alike = bool((table[_FORM] == table[_FORM, :1]).all())
        is_even = bool((lengths == lengths[:1]).all())
        columns = np.zeros((5, len(lengths)), np.int64)
        columns[0], columns[2] = table[_PART], lengths
        columns[1] = table[_START] + located.starts[signal]
        columns[3] = np.arange(len(lengths)) - np.repeat(bounds[:-1], np.diff(bounds))
        for begin, end in pairwise(bounds):
            if begin == end:
                continue
            recordings = located.recording[begin:end]
            if not are_alike:
                places.check_form(recordings, self._recordings)
            first, of_batch = places.stored[int(recordings[0])], columns[:, begin:end]
            # A copy: a batch may keep them, and numbers of one length are held once for all.
            of_windows = np.array(lengths[begin:end])
            longest = int(of_windows[0] if is_even else of_windows.max())
            even = longest if is_even else None
            if first.numbers is not None:
                of_batch, even = self._in_bank(located.between(begin, end), signal, places, of_batch), 1
            yield SignalReads(
                tuple(self._ranges(places, recordings, of_batch, even)),
                of_windows,
                longest,
                first.sample_shape,
                first.rows_shape,
                dtype or first.dtype,
                first.is_channels,
                is_even,
            )

    def _ranges(
        self, places: _Places, recordings: NDArray[np.int32], columns: NDArray[np.int64], even: int | None
    ) -> Iterator[Ranges]:
        """Part ranges of samples by how they are stored, in pieces that are read at once."""
        for number in places.precisions:
            some = columns
            if len(places.precisions) > 1:
                some = columns[:, places.table[_PRECISION, recordings[columns[3]]] == number]
            if some.size:
                precision = _PRECISIONS[number]
                scalings = self._scalings(places, recordings[some[3]]) if precision == "int16" else None
                yield from Ranges(places.parts, precision, some, scalings, even).chunks(_CHUNK_BYTES)

    def forms(self, signal: str, recordings: NDArray[np.int64]) -> list[Stored]:
        """Give how a signal is stored, once for each part and form that some recordings are in.

        Parameters
        ----------
        signal
            Name of the signal.
        recordings
            Numbers of recordings that have it.
        """
        places = self._placed(signal)
        alike = places.table[_PART, recordings] * len(places.stored) + places.table[_FORM, recordings]
        first = recordings[np.unique(alike, return_index=True)[1]]
        return [places.stored[number] for number in first.tolist()]

    def _scalings(self, places: _Places, recordings: NDArray[np.int32]) -> list[Scaling]:
        extents = (places.stored[number].extent for number in recordings.tolist())
        return [self._store.scaling(extent.recording, extent.part.signal) for extent in extents]

    def read(
        self,
        reads: SignalReads,
        out: NDArray[Any] | None = None,
        *,
        is_checked: bool = False,
        is_direct: bool = False,
        progress: Callable[[Ranges], None] | None = None,
    ) -> NDArray[Any]:
        """Read one signal of some windows.

        Parameters
        ----------
        reads
            Of one batch, as ``find_each`` gives it.
        out
            C-contiguous array of ``reads.shape`` to fill, uint16 for bfloat16; None for a new one.
        is_checked
            Compare every block that is touched with its checksum first.
        is_direct
            Read past the page cache; see ``gather``.
        progress
            Called after each of ``reads.ranges``.

        Returns
        -------
        ndarray
            (window, channel, time) where the stored axes are (time, channel), else
            (window, time, \\*sample shape): float32 in the signal's unit, the stored integers, or
            the bits of bfloat16 as uint16. Time is that of the longest window; shorter ones are
            followed by zeros.

        Raises
        ------
        StoreDamaged
            If a file is missing or cut short, or a block is not what was written.
        """
        is_bfloat16 = reads.dtype == "bfloat16"
        if out is None:
            out = np.empty(reads.shape, "uint16" if is_bfloat16 else reads.dtype)
        shorter = [] if reads.is_even else np.flatnonzero(reads.lengths < reads.longest).tolist()
        for row in shorter:
            in_time = out[row].T if reads.is_channels else out[row]
            in_time[int(reads.lengths[row]) :] = 0
        # A sample of several rows of a bank is gathered row by row.
        flat = out if reads.is_channels else out.reshape(reads.flat_shape)
        for ranges in reads.ranges:
            if is_checked:
                check(self._store.backend, ranges, self._store.checksums)
            gather(
                self._store.backend,
                ranges,
                flat,
                is_turned=reads.is_channels,
                is_bfloat16=is_bfloat16,
                is_direct=is_direct,
            )
            if progress is not None:
                progress(ranges)
        return out

    def _placed(self, signal: str) -> _Places:
        """Line up where every recording has a signal, once."""
        if signal not in self._places:
            every = {
                number: self.stored(recording, signal)
                for number, recording in enumerate(self._recordings)
                if self._store.has(recording, signal)
            }
            self._places[signal] = _Places.of(every, len(self._recordings))
        return self._places[signal]

    def _in_bank(
        self, located: Located, signal: str, places: _Places, columns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Look the rows of a bank up: a range of one sample for each of them."""
        each = []
        for window, (recording, start, length) in enumerate(
            zip(located.recording.tolist(), located.starts[signal].tolist(), columns[2].tolist(), strict=True)
        ):
            stored = places.stored[recording]
            assert stored.numbers is not None, "all of one form are of a bank, or none is"
            numbers = self._store.read_stored(stored.numbers, start, start + length).ravel().astype(np.int64)
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < stored.extent.n_samples:
                raise StoreDamaged(
                    f"{self._recordings[recording]!r} has rows {numbers.min()} to {numbers.max()} of "
                    f"{stored.extent.recording!r}, which has {stored.extent.n_samples}. Run engram verify."
                )
            of_window = np.empty((5, len(numbers)), np.int64)
            of_window.T[:] = columns[0, window], stored.extent.start, 1, window, 0
            of_window[1] += numbers
            of_window[4] = np.arange(len(numbers))
            each.append(of_window)
        return np.concatenate(each, axis=1)


_PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where all recordings have a signal: arrays of one entry per recording."""

    stored: Mapping[int, Stored]
    """Number of the recording -> where its samples are."""
    parts: Sequence[Part]
    """The parts that they are in."""
    precisions: Sequence[int]
    """The precisions that there are, as numbers in ``_PRECISIONS``."""
    table: NDArray[np.int64]
    """(4, recording): number in ``parts``, first sample within the part, number in ``_PRECISIONS``, and
    a number that is equal where samples may share a batch."""

    def check_form(self, recordings: NDArray[np.int32], names: Sequence[str]) -> None:
        """Refuse samples of several forms in one batch."""
        forms = self.table[_FORM, recordings]
        if (forms == forms[0]).all():
            return
        one, other = (int(recordings[i]) for i in (0, int(np.flatnonzero(forms != forms[0])[0])))
        first, second = self.stored[one], self.stored[other]
        raise InputError(
            f"{(first.numbers or first.extent).part.signal!r} is {first.dtype} {first.sample_shape} in "
            f"{names[one]!r} and {second.dtype} {second.sample_shape} in "
            f"{names[other]!r}: they cannot share a batch. Use mode='groups' with by='recording'."
        )

    @classmethod
    def of(cls, every: Mapping[int, Stored], n_recordings: int) -> _Places:
        parts: dict[Part, int] = {}
        forms: dict[tuple[Any, ...], int] = {}
        table = np.zeros((4, n_recordings), np.int64)
        # What recordings of the same parts have in common: there are hundreds of parts, and tens of
        # thousands of recordings.
        known: dict[tuple[str, str], tuple[int, int, int]] = {}
        for number, stored in every.items():
            alike = stored.extent.part.path, (stored.numbers or stored.extent).part.path
            if alike not in known:
                form = (
                    stored.sample_shape,
                    stored.rows_shape,
                    stored.dtype,
                    stored.is_channels,
                    stored.numbers is None,
                )
                known[alike] = (
                    parts.setdefault(stored.extent.part, len(parts)),
                    _PRECISIONS.index(stored.extent.precision),
                    forms.setdefault(form, len(forms)),
                )
            part, precision, of_form = known[alike]
            table[:, number] = part, stored.extent.start, precision, of_form
        precisions = np.unique(table[_PRECISION, list(every)]).tolist()
        return cls(every, tuple(parts), precisions, table)


_PART, _START, _PRECISION, _FORM = range(4)
"""Rows of ``_Places.table``."""


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
    tables = Tables(
        ids=ids,
        fingerprints=tuple(recordings["fingerprint"].to_pylist()),
        fields={name: _texts(recordings[name]) for name in recordings.column_names if name not in own},
        signals=_signal_tables(store, ids),
        events=_events(store, recordings["recording"].combine_chunks()),
    )
    # Arrow keeps what it has read with and no longer needs: 130 MB after a million events.
    pa.default_memory_pool().release_unused()
    return tables


def _texts(column: pa.ChunkedArray) -> tuple[str | None, ...]:
    """Give a column of text, each distinct value held once."""
    codes, values = codes_of(column.dictionary_encode(null_encoding="encode"))
    return tuple(np.array(values, object)[codes].tolist())


def _events(store: Store, ids: pa.Array) -> pa.Table:
    """Write recordings as their numbers, and sort by recording and onset."""
    events = store.table("events", is_encoded=True).unify_dictionaries()
    named = events["recording"].combine_chunks()
    numbers = pc.index_in(named.dictionary, ids).take(named.indices)
    events = events.set_column(events.column_names.index("recording"), "recording", numbers)
    if numbers.null_count:  # of banks
        events = events.filter(pc.is_valid(events["recording"]))
    return events if _are_sorted(events) else events.sort_by([(name, "ascending") for name in _EVENT_ORDER])


_EVENT_ORDER = ("recording", "onset_s")


def _are_sorted(events: pa.Table) -> bool:
    """Look whether events are in order, as one call leaves them: sorting a million takes far longer."""
    if events["onset_s"].null_count:  # for Tables to refuse
        return True
    recording, onset_s = (numbers_of(events[name]) for name in _EVENT_ORDER)
    step = np.diff(recording)
    return bool(((step > 0) | ((step == 0) & (np.diff(onset_s) >= 0))).all())


def _signal_tables(store: Store, ids: Sequence[str]) -> dict[str, SignalTable]:
    reader = Reader(store, ids)
    number_of = {recording: number for number, recording in enumerate(ids)}
    gaps_of: dict[str, dict[int, Sequence[int] | None]] = {}
    columns = (store.signals[name].to_pylist() for name in ("recording", "signal", "gaps"))
    for recording, signal, gaps in zip(*columns, strict=True):
        if recording in number_of:
            gaps_of.setdefault(signal, {})[number_of[recording]] = gaps
    return {signal: _signal_table(store, reader, ids, signal, of) for signal, of in sorted(gaps_of.items())}


def _signal_table(
    store: Store,
    reader: Reader,
    ids: Sequence[str],
    signal: str,
    gaps_of: Mapping[int, Sequence[int] | None],
) -> SignalTable:
    """Line up one signal of the recordings that have it: those with an entry in ``gaps_of``."""
    n_recordings = len(ids)
    present, form = np.zeros(n_recordings, np.bool_), np.zeros(n_recordings, np.int32)
    n_samples = np.zeros(n_recordings, np.int64)
    rate_hz, start_s = np.zeros(n_recordings), np.zeros(n_recordings)
    forms: dict[_Form, int] = {}
    # Recordings share parts and layouts: a form is made of hundreds of names only once for those.
    known: dict[tuple[str, str, str | None], int] = {}
    gaps = {}
    for number, of_recording in gaps_of.items():
        stored = reader.stored(ids[number], signal)
        extent = stored.numbers or stored.extent
        present[number] = True
        n_samples[number], rate_hz[number], start_s[number] = extent.n_samples, extent.rate_hz, extent.start_s
        alike = (stored.extent.part.path, extent.part.path, stored.extent.layout)
        if alike not in known:
            known[alike] = forms.setdefault(_form(store, stored), len(forms))
        form[number] = known[alike]
        if of_recording:
            gaps[number] = np.array(of_recording, np.int64).reshape(-1, 2)
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
