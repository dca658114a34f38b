from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engram.errors import InputError
from engram.testing.tables import ToySignal, make_tables
from engram.windows.tables import Tables

TABLES = make_tables(
    {"a": {"eeg": ToySignal()}, "b": {"eeg": ToySignal(), "stim": ToySignal(rate_hz=240.0)}},
    {
        "a": [
            {"onset_s": 1.0, "description": "square", "rt": "0.4"},
            {"onset_s": 2.0, "description": "rt", "rt": None},
        ],
        "b": [{"onset_s": 0.5, "description": "square", "rt": "0.4"}],
    },
    {"a": {"subject": "A"}, "b": {"subject": None}},
)


def test_events_are_kept_small() -> None:
    """Events are in one piece, each distinct text once, and their numbers are looked at in place."""
    parts = [TABLES.events.slice(0, 1), TABLES.events.slice(1)]
    tables = replace(TABLES, events=pa.concat_tables(parts))
    assert tables.events["description"].num_chunks == 1
    assert tables.event_texts("description").values == ("square", "rt")
    assert tables.event_texts("rt").codes.tolist() == [0, -1, 0]
    onset_s = tables.event_numbers("onset_s")
    assert onset_s.tolist() == [1.0, 2.0, 0.5]
    assert not onset_s.flags.owndata


def test_text_that_is_encoded_is_not_encoded_again() -> None:
    """Unless its dictionary has values that no event has, as that of a slice; no value is no text."""
    rows = {"recording": [0, 0, 0], "onset_s": [1.0, 2.0, 3.0], "duration_s": [0.0] * 3}
    for words in (["a", "b", "a"], ["b", None, "b"]):
        plain = pa.table({**rows, "description": ["x"] * 3, "word": pa.array(words, pa.string())})
        encoded = pa.table({**rows, "description": ["x"] * 3, "word": pa.array(words).dictionary_encode()})
        texts = [
            replace(make_tables({"a": {}}), events=each).event_texts("word") for each in (plain, encoded)
        ]
        assert texts[0].values == texts[1].values
        assert texts[0].codes.tolist() == texts[1].codes.tolist()
    whole = pa.chunked_array([pa.array(["a", "b", "b", "c"]).dictionary_encode()])
    sliced = pa.table({**rows, "description": whole.slice(1)})
    assert set(replace(make_tables({"a": {}}), events=sliced).event_texts("description").values) == {"b", "c"}


def test_there_may_be_no_events() -> None:
    """Recordings without any event have empty columns of the right types."""
    tables = replace(TABLES, events=TABLES.events.slice(0, 0))
    assert tables.event_numbers("recording").dtype == np.int32
    assert tables.event_numbers("onset_s").dtype == np.float64
    assert tables.event_texts("description").values == ()


def test_fields_are_numbered_by_distinct_values() -> None:
    """A field that a recording lacks has no number."""
    texts = TABLES.field_texts("subject")
    assert (texts.codes.tolist(), texts.values) == ([0, -1], ("A",))


def _with_event(**changes: Any) -> pa.Table:
    row = {"recording": 1, "onset_s": 0.7, "duration_s": 0.0, "description": "square", "rt": None, **changes}
    return pa.Table.from_pylist([*TABLES.events.to_pylist(), row])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": ("b", "a")}, "not sorted"),
        ({"ids": ("a", "a")}, "distinct"),
        ({"fingerprints": ("f",)}, "fingerprints has 1 entries for 2"),
        ({"fields": {"age": ("9",)}}, "'age' has 1 entries for 2"),
        ({"events": TABLES.events.drop_columns(["onset_s"])}, "no column onset_s"),
        ({"events": _with_event(recording=2)}, "beyond the 2"),
        ({"events": _with_event(recording=0)}, "not sorted"),
        ({"events": _with_event(onset_s=0.4)}, "not sorted"),
        ({"events": _with_event(onset_s=None)}, "have no onset_s"),
        ({"events": _with_event(onset_s=np.nan)}, "no time"),
        ({"events": _with_event(duration_s=-1.0)}, "no time"),
        ({"events": _with_event(description=None)}, "have no description"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(changes: dict[str, Any], said: str) -> None:
    """Every column has one entry per recording, and events are whole and sorted."""
    values = {name: getattr(TABLES, name) for name in ("ids", "fingerprints", "fields", "signals", "events")}
    with pytest.raises(InputError, match=said):
        Tables(**{**values, **changes})


def test_a_signal_has_a_rate_where_it_is_present() -> None:
    """Where a signal is absent its entries say nothing; where it is present its rate is above zero."""
    stim = TABLES.signals["stim"]
    replace(stim, rate_hz=np.array([np.nan, 240.0]))
    with pytest.raises(InputError, match="rate"):
        replace(stim, rate_hz=np.array([240.0, 0.0]))
    with pytest.raises(InputError, match="shapes"):
        replace(stim, n_samples=np.array([1]))


def test_bytes_are_counted() -> None:
    """The bytes grow by what a further event column takes, and hold at least the arrays'."""
    more = TABLES.events.append_column("extra", pa.array(["x" * 1000, "y", "z"]))
    grown = replace(TABLES, events=more).n_bytes - TABLES.n_bytes
    assert 1000 <= grown <= 1200
