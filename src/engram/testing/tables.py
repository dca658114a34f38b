"""Tables of recordings that exist nowhere else, for windows to be worked out from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engram.windows.tables import SignalTable, Tables

__all__ = ["ToySignal", "make_tables"]


@dataclass(frozen=True, slots=True)
class ToySignal:
    """One signal of one recording."""

    n_samples: int = 1000
    """Its length."""
    rate_hz: float = 100.0
    """Samples per second."""
    start_s: float = 0.0
    """Time of its first sample."""
    form: str = "2 channels (C3, C4), float16"
    """Its form, in words; the same words are the same form."""
    gaps: tuple[tuple[int, int], ...] = ()
    """Stretches of samples that were not measured."""


def make_tables(
    recordings: Mapping[str, Mapping[str, ToySignal]],
    events: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    fields: Mapping[str, Mapping[str, str | None]] | None = None,
) -> Tables:
    """Write tables down.

    Parameters
    ----------
    recordings
        Recording -> signal -> what it is, in any order.
    events
        Recording -> its events as rows: ``onset_s``, ``description``, perhaps ``duration_s`` and
        columns of text; in any order.
    fields
        Recording -> its descriptive fields.

    Examples
    --------
    >>> rows = [{"onset_s": 2.0, "description": "square", "rt": "0.4"}]
    >>> tables = make_tables({"a": {"eeg": ToySignal()}}, {"a": rows}, {"a": {"age": "9.5"}})
    >>> tables.ids, tables.events["rt"].to_pylist(), tables.fields["age"]
    (('a',), ['0.4'], ('9.5',))
    """
    ids = tuple(sorted(recordings))
    names = sorted({name for signals in recordings.values() for name in signals})
    columns = sorted({name for row in (fields or {}).values() for name in row})
    return Tables(
        ids,
        tuple(f"content of {key}" for key in ids),
        {name: tuple((fields or {}).get(key, {}).get(name) for key in ids) for name in columns},
        {name: _signal_table([recordings[key].get(name) for key in ids]) for name in names},
        _events([(events or {}).get(key, ()) for key in ids]),
    )


def _signal_table(signals: Sequence[ToySignal | None]) -> SignalTable:
    found = [ToySignal() if signal is None else signal for signal in signals]
    forms = sorted({signal.form for signal in found})
    return SignalTable(
        present=np.array([signal is not None for signal in signals]),
        n_samples=np.array([signal.n_samples for signal in found], np.int64),
        rate_hz=np.array([signal.rate_hz for signal in found]),
        start_s=np.array([signal.start_s for signal in found]),
        form=np.array([forms.index(signal.form) for signal in found], np.int32),
        forms=tuple(forms),
        gaps={i: np.array(signal.gaps, np.int64) for i, signal in enumerate(found) if signal.gaps},
    )


def _events(events: Sequence[Sequence[Mapping[str, Any]]]) -> pa.Table:
    rows = [
        {"recording": i, "duration_s": 0.0, **row}
        for i, of_recording in enumerate(events)
        for row in sorted(of_recording, key=lambda row: float(row["onset_s"]))
    ]
    own = ("recording", "onset_s", "duration_s", "description")
    extras = sorted({name for row in rows for name in row} - set(own))
    return pa.table({name: [row.get(name) for row in rows] for name in (*own, *extras)})
