"""Tables and windows of a store."""

from __future__ import annotations

import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.batches.reading import Reader, SignalReads, tables_of
from engram.errors import InputError, StoreDamaged
from engram.store.reader import Store
from engram.testing.kinds import make_arrays, make_bank
from engram.windows.cutting import Located
from engram.windows.tables import Tables

EEG_OF_8 = tuple(f"sentence-{i}" for i in range(7))


def located(tables: Tables, signal: str, rows: list[tuple[str, int, int]]) -> Located:
    """Say where windows (recording, start, length) lie."""
    recordings, starts, lengths = zip(*rows, strict=True)
    return Located(
        recording=np.array([tables.ids.index(name) for name in recordings], np.int32),
        starts={signal: np.array(starts, np.int64)},
        lengths={signal: np.array(lengths, np.int64)},
        anchor_s=np.zeros(len(rows)),
        i_window_in_trial=np.zeros(len(rows), np.int64),
    )


def find(reader: Reader, windows: Located, signal: str) -> SignalReads:
    """Find what has to be read for one batch."""
    return next(reader.find_each(windows, [0, len(windows.recording)], signal))


def stacked(store: Store, signal: str, rows: list[tuple[str, int, int]]) -> NDArray[Any]:
    """Read windows one by one, pad them and turn channels to the front: what a batch must equal."""
    windows = [store.read(name, signal, start, start + length) for name, start, length in rows]
    if signal == "image":
        windows = [make_bank()[numbers] for numbers in windows]
    longest = max(len(window) for window in windows)
    padded = [np.pad(w, [(0, longest - len(w)), *[(0, 0)] * (w.ndim - 1)]) for w in windows]
    batch = np.stack(padded)
    return batch.swapaxes(1, 2) if signal in ("eeg", "robs") or batch.shape[2:] == (1,) else batch


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_batch_is_its_windows_read_one_by_one(kinds: Store, data: st.DataObject) -> None:
    """Over all kinds, precisions, scalings and lengths, bit for bit: the model is ``Store.read``."""
    tables = tables_of(kinds)
    signal = data.draw(st.sampled_from(sorted(tables.signals)))
    table = tables.signals[signal]
    form = data.draw(st.sampled_from(sorted(set(table.form[table.present].tolist()))))
    names = [tables.ids[i] for i in np.flatnonzero(table.present & (table.form == form))]
    rows = []
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=5)):
        n_samples = kinds.extent(name, signal).n_samples
        start = data.draw(st.integers(0, n_samples))
        rows.append((name, start, data.draw(st.integers(0, min(n_samples - start, 64)))))

    reader = Reader(kinds, tables.ids)
    batch = reader.read(find(reader, located(tables, signal, rows), signal))

    expected = stacked(kinds, signal, rows)
    assert batch.dtype == expected.dtype
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, expected, strict=True)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 4), max_size=6).filter(any), seed=st.integers(0, 2**16))
def test_batches_found_together_are_those_found_alone(kinds: Store, sizes: list[int], seed: int) -> None:
    """Over precisions, scalings, lengths and banks, with batches of no windows between them."""
    tables, rng = tables_of(kinds), np.random.default_rng(seed)
    reader = Reader(kinds, tables.ids)
    bounds = np.cumsum([0, *sizes]).tolist()
    for signal, names in (("eeg", EEG_OF_8), ("image", ["volumes"])):
        rows = [
            (str(rng.choice(names)), int(start), int(rng.integers(1, 4 - start)))
            for start in rng.integers(0, 3, bounds[-1])
        ]
        where = located(tables, signal, rows)
        together = list(reader.find_each(where, bounds, signal))
        alone = [
            find(reader, where.between(begin, end), signal) for begin, end in pairwise(bounds) if begin < end
        ]
        assert [reads.shape for reads in together] == [reads.shape for reads in alone]
        for reads, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(reader.read(reads), reader.read(expected), strict=True)


def test_batches_of_several_forms_fail_one_by_one(kinds: Store) -> None:
    """A batch that mixes forms is refused in its turn: those before it were found."""
    tables = tables_of(kinds)
    rows = [("session-0", 0, 4), ("session-1", 0, 4), ("session-1", 0, 4), ("session-0", 0, 4)]
    found = Reader(kinds, tables.ids).find_each(located(tables, "robs", rows), [0, 1, 2, 4], "robs")
    assert [next(found).shape, next(found).shape] == [(1, 20, 4), (1, 21, 4)]
    with pytest.raises(InputError, match="they cannot share a batch"):
        next(found)


def test_one_batch_may_mix_precisions(kinds: Store) -> None:
    """float16, bfloat16, float32 and int16 of two scalings are one form and come decoded, zeros behind."""
    tables = tables_of(kinds)
    rows = [(name, 0, 1 + 40 * (i % 3)) for i, name in enumerate(EEG_OF_8) if name != "sentence-1"]
    assert {kinds.extent(name, "eeg").precision for name, _, _ in rows} == {
        "float16", "bfloat16", "float32", "int16"
    }  # fmt: skip

    reader = Reader(kinds, tables.ids)
    batch = reader.read(find(reader, located(tables, "eeg", rows), "eeg"))

    np.testing.assert_array_equal(batch, stacked(kinds, "eeg", rows), strict=True)
    for row, (_, _, length) in zip(batch, rows, strict=True):
        assert not row[:, length:].any()


def test_signals_of_another_form_share_no_batch(kinds: Store) -> None:
    """Sessions with 20 and 21 units are refused, with what to do."""
    tables = tables_of(kinds)
    rows = [("session-0", 0, 4), ("session-1", 0, 4)]
    with pytest.raises(InputError, match=r"\(20,\).*\(21,\).*Use mode='groups' with by='recording'"):
        find(Reader(kinds, tables.ids), located(tables, "robs", rows), "robs")


def test_a_store_cut_short_under_its_reader_is_an_error(kinds_path: Path, tmp_path: Path) -> None:
    """A part that was shortened after the store was opened raises StoreDamaged, and kills nothing."""
    path = tmp_path / "store"
    shutil.copytree(kinds_path, path)
    with Store(path) as store:
        tables = tables_of(store)
        where = located(tables, "eeg", [("eeg-129", 2900, 100)])
        reader = Reader(store, tables.ids)
        reader.read(find(reader, where, "eeg"))
        extent = store.extent("eeg-129", "eeg")
        file = path / extent.part.file
        with file.open("r+b") as opened:
            opened.truncate((extent.start + 2950) * extent.part.grid.sample_bytes)
        with pytest.raises(StoreDamaged, match="Run engram verify"):
            reader.read(find(reader, where, "eeg"))


@pytest.mark.parametrize("name", ["sentence-0", "sentence-4", "sentence-5", "sentence-6", "session-0"])
def test_reading_takes_no_more_memory_than_it_says(kinds: Store, name: str) -> None:
    """Batch and buffers together stay within what was predicted for their windows, and near it."""
    signal = "eeg" if name.startswith("sentence") else "stim"
    tables = tables_of(kinds)
    reader = Reader(kinds, tables.ids)
    where = located(tables, signal, [(name, 0, 300)] * 32)
    reads = find(reader, where, signal)
    reader.read(reads)
    stored = reader.stored(name, signal)
    predicted = 32 * stored.n_bytes(300) + stored.scratch_bytes(300)

    tracemalloc.start()
    batch = reader.read(reads)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert batch.nbytes <= peak_bytes
    assert 0.7 * predicted <= peak_bytes <= predicted + 64 * 1024


def test_tables_hold_recordings_and_no_bank(kinds: Store) -> None:
    """Ids, fields, clocks and events are the store's; banks are no recordings."""
    tables = tables_of(kinds)
    arrays = make_arrays()

    assert set(tables.ids) == set(arrays) | set(EEG_OF_8)
    assert "images" not in tables.signals
    assert tables.fields["subject"] == tables.ids
    assert tables.fields["age"] == ("9.5",) * len(tables.ids)
    for signal, table in tables.signals.items():
        for number, name in enumerate(tables.ids):
            if name in arrays:
                assert table.present[number] == (signal in arrays[name])
            if table.present[number]:
                extent = kinds.extent(name, signal)
                figures = extent.n_samples, extent.rate_hz, extent.start_s
                assert (table.n_samples[number], table.rate_hz[number], table.start_s[number]) == figures
    assert tables.events["recording"].to_pylist() == [i for i in range(len(tables.ids)) for _ in range(2)]
    assert tables.events["onset_s"].to_pylist() == [0.5, 1.0] * len(tables.ids)


def test_forms_part_what_cannot_share_a_batch(kinds: Store) -> None:
    """Channels, sample shape and dtype make a form; how it is stored does not. A bank's form is its rows'."""
    tables = tables_of(kinds)
    eeg, robs = tables.signals["eeg"], tables.signals["robs"]
    number = {name: tables.ids.index(name) for name in tables.ids}

    assert len({int(eeg.form[number[name]]) for name in EEG_OF_8}) == 1
    assert sorted(eeg.forms) == [
        "129 channels (E1 ... E129), float32 in uV",
        "6 channels (E1 ... E6), float32 in uV",
        "8 channels (E1 ... E8), float32 in uV",
    ]
    assert robs.forms == ("20 channels, int16", "21 channels, int16")
    assert tables.signals["image"].forms == ("32 x 32 x 3, uint8",)
    assert tables.signals["betas"].forms == ("150 x 150 x 100, int16",)
