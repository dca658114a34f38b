"""Opening and reading a store."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.errors import InputError, StoreDamaged, StoreFormatError, StoreMissing
from engram.preparation.ingest import prepare
from engram.store.crc import file_crc32c
from engram.store.format import FileStamp, Manifest
from engram.store.reader import Store
from engram.store.tables import TABLES, read_table, write_table
from engram.store.verify import verify
from engram.testing.kinds import Arrays, make_bank, make_source
from engram.windows.spec import FixedWindows


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    """The store, closed again after the test."""
    with Store(store_path) as opened:
        yield opened


@pytest.mark.parametrize("backend", ["zarr", "ram"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_window_is_the_slice_of_the_array(
    store_path: Path, arrays: Arrays, backend: str, data: st.DataObject
) -> None:
    """Over all signals, rates, sample shapes and lengths: the model is NumPy's slicing."""
    store = Store(store_path, backend)
    recording = data.draw(st.sampled_from(sorted(arrays)))
    signal = data.draw(st.sampled_from(sorted(arrays[recording])))
    x = arrays[recording][signal]
    start = data.draw(st.integers(0, len(x)))
    stop = data.draw(st.integers(start, min(len(x), start + 64)))
    expected = (
        x[start:stop].astype(np.float32).astype(np.float16).astype(np.float32)
        if x.dtype.kind == "f"
        else x[start:stop]
    )

    read = store.read(recording, signal, start, stop)

    assert read.dtype == expected.dtype
    assert np.array_equal(read, expected)
    store.close()


def test_a_bank_is_stored_once_and_numbered_by_its_signal(store: Store, arrays: Arrays) -> None:
    """The rows of the bank that a signal numbers are the images shown."""
    assert np.array_equal(store.read("images", "images"), make_bank())
    row = next(r for r in store.signals.to_pylist() if r["signal"] == "image")
    assert row["bank"] == "images"
    assert [r["recording"] for r in store.recordings.to_pylist() if r["is_bank"]] == ["images"]


def test_recordings_of_another_form_lie_in_another_part(store: Store) -> None:
    """A part has one signal, one dtype, one sample shape and one rate."""
    forms: dict[str, set[Any]] = {}
    for name in ("eeg", "stim", "robs", "betas", "image", "images"):
        for extent in store.extents(name):
            grid = extent.part.grid
            forms.setdefault(extent.part.path, set()).add(
                (name, grid.dtype, grid.sample_shape, extent.rate_hz)
            )

    assert all(len(form) == 1 for form in forms.values())
    assert len({extent.part.path for extent in store.extents("eeg")}) >= 3


def test_the_tables_keep_fields_events_and_channels(store: Store) -> None:
    """Fields and further event columns are text as in the source."""
    row = next(r for r in store.recordings.to_pylist() if r["recording"] == "eeg-6")
    events = [r for r in store.events.to_pylist() if r["recording"] == "eeg-6"]

    assert (row["subject"], row["age"]) == ("eeg-6", "9.5")
    assert [e["description"] for e in events] == ["left_target", "rest"]
    assert [e["feedback"] for e in events] == ["smiley_face", None]
    assert [c["channel"] for c in store.channels("eeg-6", "eeg")] == ["E1", "E2", "E3", "E4", "E5", "E6"]
    assert store.channels("session-0", "stim") == []


@pytest.mark.parametrize("name", TABLES)
def test_text_may_come_encoded(store: Store, name: str) -> None:
    """Each distinct value once, and the same rows: text is encoded, numbers and lists are as ever."""
    plain, encoded = store.table(name), store.table(name, is_encoded=True)

    assert encoded.to_pylist() == plain.to_pylist()
    for field in plain.schema:
        is_text = field.type == pa.string()
        assert pa.types.is_dictionary(encoded.schema.field(field.name).type) == is_text


def _read_some(store: Store) -> bytes:
    return store.read("eeg-129", "eeg", 100, 300).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # fork is the point
def test_a_store_that_was_read_before_is_read_in_a_child(store: Store, method: str) -> None:
    """After fork the descriptors are shared without an offset; after spawn they open anew."""
    expected = _read_some(store)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_some, [store] * 4) == [expected] * 4


def test_a_pickled_store_reads_the_same(store: Store) -> None:
    """Only the path and the manifest travel, no descriptor."""
    expected = _read_some(store)
    other = pickle.loads(pickle.dumps(store))

    assert _read_some(other) == expected
    other.close()


def test_threads_may_share_a_store(store: Store) -> None:
    """Each gets its own bytes."""
    whole = store.read("eeg-129", "eeg")
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda i: store.read("eeg-129", "eeg", i, i + 50), range(0, 2900, 7)))

    assert all(
        np.array_equal(read, whole[i : i + 50]) for i, read in zip(range(0, 2900, 7), reads, strict=True)
    )


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 3001)])
def test_a_range_outside_the_recording_is_refused(store: Store, start: int, stop: int) -> None:
    """Never a neighbour's samples."""
    with pytest.raises(InputError, match="not all within eeg-129, which has 3000"):
        store.read("eeg-129", "eeg", start, stop)


def test_what_the_store_does_not_hold_is_named(store: Store) -> None:
    """The message lists what there is."""
    with pytest.raises(StoreMissing, match="'eeg' of recording 'session-0': it has robs, stim"):
        store.read("session-0", "eeg")
    with pytest.raises(StoreMissing, match="there is no such recording"):
        store.read("nobody", "eeg")
    with pytest.raises(InputError, match="no table 'nothing'"):
        store.table("nothing")


def test_a_folder_without_manifest_is_no_store(tmp_path: Path) -> None:
    """An unfinished one is told from an empty one."""
    with pytest.raises(StoreMissing, match="holds no store"):
        Store(tmp_path)
    (tmp_path / "building").mkdir()
    with pytest.raises(StoreMissing, match=r"unfinished store.*Run the same prepare again"):
        Store(tmp_path)


def test_a_part_cut_short_is_an_error_and_not_a_crash(store_path: Path, tmp_path: Path) -> None:
    """A short read says which file ends where."""
    shutil.copytree(store_path, tmp_path / "store")
    store = Store(tmp_path / "store")
    extent = store.extent("eeg-129", "eeg")
    _read_some(store)
    with (tmp_path / "store" / extent.part.file).open("r+b") as file:
        for n_samples in (200, 0):  # the part is read from its middle, or beyond its end
            size_bytes = extent.part.grid.byte_range(extent.start + n_samples, 0)[0]
            file.truncate(size_bytes)
            with pytest.raises(StoreDamaged, match=f"ends at byte {size_bytes}, it should have"):
                _read_some(store)
    store.close()


def test_a_reader_of_a_replaced_store_is_told_to_open_it_anew(arrays: Arrays, tmp_path: Path) -> None:
    """Its tables are gone because the store was prepared again, and not because it is damaged."""
    source = make_source({"eeg-6": arrays["eeg-6"]})
    prepare(source, tmp_path / "store")
    old = Store(tmp_path / "store")
    prepare(source, tmp_path / "store", precision="float32")

    with pytest.raises(StoreDamaged, match="prepared again since it was opened"):
        old.read("eeg-6", "eeg")


def test_the_scalings_of_int16_are_those_of_their_recording(arrays: Arrays, tmp_path: Path) -> None:
    """Each decodes to its own range, over recordings of differing channel counts."""
    chosen = {key: arrays[key] for key in ("eeg-129", "eeg-6", "sentence-0", "sentence-2")}
    with prepare(make_source(chosen), tmp_path / "store", precision={"eeg": "int16"}).store as store:
        for key, signals in chosen.items():
            span = np.ptp(signals["eeg"], axis=0)
            assert (np.abs(store.read(key, "eeg") - signals["eeg"]) <= span / 65534 * 0.51 + 1e-5).all()
        with pytest.raises(StoreMissing, match="has no scaling"):
            store.scaling("eeg-6", "stim")


def rewrite(store: Path, table: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a table as a stranger might, with every checksum right."""
    name = f"tables/0000/{table}.parquet"
    rows = read_table(store / name)
    columns = rows.to_pydict()
    change(columns)
    write_table(store / name, [pa.table(columns, schema=rows.schema)], rows.schema)
    manifest = Manifest.from_bytes((store / "manifest.json").read_bytes())
    stamp = FileStamp((store / name).stat().st_size, file_crc32c(store / name))
    changed = Manifest(manifest.calls, {**manifest.files, name: stamp})
    (store / "manifest.json").write_bytes(changed.to_bytes())


def test_rows_may_stand_in_any_order(arrays: Arrays, tmp_path: Path) -> None:
    """Scales are their channels', checksums their blocks', and events their recordings'."""
    chosen = {key: arrays[key] for key in ("eeg-129", "eeg-6", "sentence-0")}
    prepare(make_source(chosen), tmp_path / "store", precision={"eeg": "int16"}).store.close()

    def read() -> list[Any]:
        with Store(tmp_path / "store") as store:
            scalings = [store.scaling(key, "eeg") for key in chosen]
            tables = store.windows(FixedWindows(signal="eeg"), same_form=False).index.tables
            return [
                *(array.tolist() for each in scalings for array in (each.scale, each.offset)),
                {part: crcs.tolist() for part, crcs in store.checksums.items()},
                tables.events.to_pydict(),
            ]

    def shuffle(columns: dict[str, Any]) -> None:
        n_rows = len(next(iter(columns.values())))
        order = np.random.default_rng(0).permutation(n_rows)
        columns.update({name: [values[i] for i in order] for name, values in columns.items()})

    expected = read()
    for table in ("scales", "checksums", "events"):
        rewrite(tmp_path / "store", table, shuffle)
    assert read() == expected


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("signals", "part", "../../etc"),
        ("signals", "stop", 2**60),
        ("signals", "start", -1),
        ("parts", "dtype", "object"),
        ("parts", "n_samples", 2**60),
        ("parts", "sample_shape", [0]),
        ("parts", "sample_shape", [-1]),
    ],
)
def test_a_strangers_store_is_data(
    arrays: Arrays, tmp_path: Path, table: str, column: str, value: Any
) -> None:
    """Tables that contradict each other or point elsewhere are errors of ours."""
    prepare(make_source({"eeg-6": arrays["eeg-6"]}), tmp_path / "store").store.close()

    def change(columns: dict[str, Any]) -> None:
        columns[column] = [value] * len(columns[column])

    rewrite(tmp_path / "store", table, change)
    with Store(tmp_path / "store") as store, pytest.raises((StoreDamaged, StoreFormatError, InputError)):
        store.read("eeg-6", "eeg", 0, 10)
    verify(tmp_path / "store")
