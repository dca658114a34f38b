"""Tables as values: what is known of every recording, without its samples.

Windows are worked out from these numbers alone. Who has a store makes them from its tables; who has
none can write them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engram.errors import InputError

__all__ = ["SignalTable", "Tables", "Texts"]

_EVENT_COLUMNS = {"recording": pa.int32(), "onset_s": pa.float64(), "duration_s": pa.float64()}


@dataclass(frozen=True, slots=True, eq=False)
class SignalTable:
    """One signal over all recordings: arrays of one entry per recording.

    Raises
    ------
    InputError
        If the arrays differ in length, or a present signal has no rate.

    Examples
    --------
    >>> import numpy as np
    >>> SignalTable(
    ...     present=np.array([True]),
    ...     n_samples=np.array([1000]),
    ...     rate_hz=np.array([100.0]),
    ...     start_s=np.array([0.0]),
    ...     form=np.array([0], np.int32),
    ...     forms=("2 channels (C3, C4), float16",),
    ... ).forms[0]
    '2 channels (C3, C4), float16'
    """

    present: NDArray[np.bool_]
    """(recording,) whether the recording has this signal; where not, the other entries say nothing."""
    n_samples: NDArray[np.int64]
    """(recording,) length in samples."""
    rate_hz: NDArray[np.float64]
    """(recording,) samples per second."""
    start_s: NDArray[np.float64]
    """(recording,) time of the first sample on the recording's clock, in seconds."""
    form: NDArray[np.int32]
    """(recording,) number of the form: equal where windows batch together, which takes the same sample
    shape, dtype and channel names."""
    forms: tuple[str, ...]
    """What each number of ``form`` means, in words."""
    gaps: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    """Number of the recording -> (gap, 2) half-open stretches of samples that were not measured. One of
    length zero is a joint: the samples on both sides are not neighbours."""

    def __post_init__(self) -> None:
        columns = (self.present, self.n_samples, self.rate_hz, self.start_s, self.form)
        if len({column.shape for column in columns}) > 1:
            raise InputError(f"Arrays of one signal have shapes {[column.shape for column in columns]}.")
        rates = self.rate_hz[self.present]
        if not bool(np.all(np.isfinite(rates) & (rates > 0))):
            raise InputError("A signal has a rate that is not above zero. Give its samples per second.")


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A column of text, each distinct value once."""

    codes: NDArray[np.int32]
    """(row,) number of each row's value, or -1 where it has none."""
    values: tuple[str, ...]
    """The distinct values."""


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """All recordings, their signals and events, as arrays and columns.

    Raises
    ------
    InputError
        If ids are not sorted and distinct, columns differ in length, or events are not sorted by
        recording and onset, or lack a column or value.

    Examples
    --------
    >>> import numpy as np, pyarrow as pa
    >>> eeg = SignalTable(
    ...     present=np.array([True, True]),
    ...     n_samples=np.array([1000, 800]),
    ...     rate_hz=np.array([100.0, 100.0]),
    ...     start_s=np.zeros(2),
    ...     form=np.zeros(2, np.int32),
    ...     forms=("2 channels (C3, C4), float16",),
    ... )
    >>> events = pa.table(
    ...     {"recording": [0], "onset_s": [1.5], "duration_s": [0.0], "description": ["square"]}
    ... )
    >>> tables = Tables(("a", "b"), ("f0", "f1"), {"subject": ("A", None)}, {"eeg": eeg}, events)
    >>> len(tables), tables.events.num_rows
    (2, 1)
    """

    ids: tuple[str, ...]
    """Ids of the recordings, sorted; a recording's number is its place here."""
    fingerprints: tuple[str, ...]
    """Fingerprints of the recordings' content."""
    fields: Mapping[str, tuple[str | None, ...]]
    """Descriptive field -> its value per recording, as text; None where there is none."""
    signals: Mapping[str, SignalTable]
    """Signal -> what is known of it."""
    events: pa.Table
    """recording (its number, int32), onset_s and duration_s (float64), description, and further columns
    of text; sorted by recording, then onset. Text is kept dictionary-encoded."""

    def __post_init__(self) -> None:
        if any(a >= b for a, b in zip(self.ids, self.ids[1:], strict=False)):
            raise InputError("Ids of recordings are not sorted and distinct. Sort them.")
        lengths = {"fingerprints": len(self.fingerprints)}
        lengths |= {f"field {name!r}": len(values) for name, values in self.fields.items()}
        lengths |= {f"signal {name!r}": len(signal.present) for name, signal in self.signals.items()}
        for name, length in lengths.items():
            if length != len(self.ids):
                raise InputError(
                    f"{name} has {length} entries for {len(self.ids)} recordings. Give one each."
                )
        object.__setattr__(self, "events", _tidied(self.events, len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def event_numbers(self, name: str) -> NDArray[Any]:
        """Look at a column of numbers of the events, (event,), without copying it."""
        column = self.events[name]
        if not column.num_chunks:
            return np.empty(0, column.type.to_pandas_dtype())
        return _numbers(column)

    def event_texts(self, name: str) -> Texts:
        """Give a column of text of the events, as numbers of its distinct values."""
        column = self.events[name]
        if not column.num_chunks:
            return Texts(np.empty(0, np.int32), ())
        encoded = column.chunk(0)
        # Filling imports pandas, 29 MB: only where it is needed.
        codes = encoded.indices.fill_null(-1) if encoded.null_count else encoded.indices
        return Texts(np.asarray(np.from_dlpack(codes), np.int32), tuple(encoded.dictionary.to_pylist()))

    def field_texts(self, name: str) -> Texts:
        """Give a descriptive field, as numbers of its distinct values."""
        values = self.fields[name]
        distinct = tuple(sorted({value for value in values if value is not None}))
        number = {value: i for i, value in enumerate(distinct)}
        codes = (-1 if value is None else number[value] for value in values)
        return Texts(np.fromiter(codes, np.int32, len(values)), distinct)

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays and columns, by their buffers; about what the texts of fields hold."""
        arrays = [
            array
            for signal in self.signals.values()
            for array in (
                signal.present,
                signal.n_samples,
                signal.rate_hz,
                signal.start_s,
                signal.form,
                *signal.gaps.values(),
            )
        ]
        texts = 8 * len(self.ids) * (2 + len(self.fields))  # a reference each; values are mostly shared
        names = sum(len(text) for column in (self.ids, self.fingerprints) for text in column)
        return sum(array.nbytes for array in arrays) + int(self.events.nbytes) + texts + names


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Look at numbers that are in one piece: not by ``numpy.asarray`` alone, which imports pandas, 29 MB."""
    return np.asarray(np.from_dlpack(column.chunk(0)))


def _tidied(events: pa.Table, n_recordings: int) -> pa.Table:
    """Bring the events to their types, in one piece, and check them."""
    missing = [name for name in (*_EVENT_COLUMNS, "description") if name not in events.column_names]
    if missing:
        raise InputError(f"The events have no column {', '.join(missing)}, only {events.column_names}.")
    columns = {}
    for name in events.column_names:
        kind = _EVENT_COLUMNS.get(name)
        columns[name] = events[name].cast(kind).combine_chunks() if kind else _encoded(events[name])
    tidied = pa.table(columns)
    if tidied.num_rows:
        _check_events(tidied, n_recordings)
    return tidied


def _encoded(column: pa.ChunkedArray) -> pa.Array:
    """Give text as numbers of the distinct values that it has: a slice keeps the dictionary of the whole."""
    if pa.types.is_dictionary(column.type):
        encoded = column.unify_dictionaries().combine_chunks()
        if len(encoded.indices.unique().drop_null()) == len(encoded.dictionary):
            return encoded
    return column.cast(pa.string()).dictionary_encode().unify_dictionaries().combine_chunks()


def _check_events(events: pa.Table, n_recordings: int) -> None:
    for name in (*_EVENT_COLUMNS, "description"):
        if events[name].null_count:
            raise InputError(f"{events[name].null_count} events have no {name}. Leave such events out.")
    recording, onset_s, duration_s = (_numbers(events[name]) for name in _EVENT_COLUMNS)
    if not (np.isfinite(onset_s).all() and np.isfinite(duration_s).all()) or (duration_s < 0).any():
        raise InputError("An event has an onset or duration that is no time. Leave such events out.")
    later = (np.diff(recording) > 0) | ((np.diff(recording) == 0) & (np.diff(onset_s) >= 0))
    if not later.all():
        raise InputError("Events are not sorted by recording, then onset. Sort them.")
    if not 0 <= int(pc.min(events["recording"]).as_py()) <= int(recording[-1]) < n_recordings:
        raise InputError(f"Events name a recording beyond the {n_recordings} there are. Number from 0.")
