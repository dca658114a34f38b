"""A store is an ordinary Zarr v3 group to everybody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import xarray
import zarr

from engram.preparation.ingest import prepare
from engram.store.reader import Extent, Store
from engram.testing.kinds import Arrays, make_source


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    """The store, closed again after the test."""
    with Store(store_path) as opened:
        yield opened


def all_extents(store: Store) -> list[Extent]:
    """List every signal of every recording."""
    names = sorted(set(store.signals["signal"].to_pylist()))
    return [extent for name in names for extent in store.extents(name)]


def test_zarr_python_reads_every_part(store: Store, store_path: Path) -> None:
    """The values and shapes that we read, from the root group down."""
    root = zarr.open_group(store_path, mode="r")
    for extent in all_extents(store):
        array = root[f"{extent.part.path}/{extent.part.signal}"]
        assert isinstance(array, zarr.Array)
        assert array.shape == (extent.part.grid.n_samples, *extent.part.grid.sample_shape)
        assert np.array_equal(
            array[extent.start : extent.stop], store.read_stored(extent, 0, extent.n_samples)
        )


def test_tensorstore_reads_every_part(store: Store, store_path: Path) -> None:
    """A second implementation of the sharding codec agrees, the padded last block included."""
    for extent in all_extents(store):
        kvstore = {"driver": "file", "path": str(store_path / extent.part.path / extent.part.signal)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert np.array_equal(
            array[extent.start : extent.stop].read().result(), store.read_stored(extent, 0, extent.n_samples)
        )


def test_xarray_opens_a_part_with_its_axis_names(store: Store, store_path: Path) -> None:
    """A part is a group with one array, which has dimension names."""
    extent = store.extent("eeg-129", "eeg")
    with xarray.open_zarr(store_path / extent.part.path, consolidated=False) as data:
        assert data["eeg"].dims == ("time", "channel")
        assert np.array_equal(
            data["eeg"][extent.start : extent.stop].to_numpy(), store.read_stored(extent, 0, extent.n_samples)
        )


def test_uncompressed_a_part_is_one_flat_array_from_byte_0(store: Store, store_path: Path) -> None:
    """np.memmap needs no library at all."""
    for extent in all_extents(store):
        grid = extent.part.grid
        flat = np.memmap(
            store_path / extent.part.file, grid.dtype, "r", shape=(grid.n_samples, *grid.sample_shape)
        )
        assert np.array_equal(
            flat[extent.start : extent.stop], store.read_stored(extent, 0, extent.n_samples)
        )
        del flat


def test_tables_are_parquet_with_page_checksums(store_path: Path) -> None:
    """Any Parquet reader opens them; ours verifies them."""
    table = pq.read_table(store_path / "tables/0000/signals.parquet")

    assert table.column_names[:5] == ["recording", "signal", "part", "start", "stop"]


@pytest.mark.parametrize("name", ["bfloat16", "int16"])
def test_narrow_precisions_are_plain_integers_to_others(name: str, arrays: Arrays, tmp_path: Path) -> None:
    """bfloat16 is uint16 with an attribute, since zarr-python cannot open bfloat16."""
    source = make_source({"eeg-6": {"eeg": arrays["eeg-6"]["eeg"]}})
    store = prepare(source, tmp_path / "store", precision={"eeg": name}).store
    extent = store.extent("eeg-6", "eeg")
    array = zarr.open_group(tmp_path / "store", mode="r")[f"{extent.part.path}/eeg"]

    assert isinstance(array, zarr.Array)
    assert str(array.dtype) == {"bfloat16": "uint16", "int16": "int16"}[name]
    assert array.attrs["engram"] == {"precision": name, "rate_hz": 250.0}
    np.testing.assert_allclose(
        store.read("eeg-6", "eeg"),
        arrays["eeg-6"]["eeg"],
        rtol=2**-8 if name == "bfloat16" else 0,
        atol=2e-3,
    )
    store.close()
