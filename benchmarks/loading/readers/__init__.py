"""All readers, one file per library; importing them loads none of the libraries."""

from __future__ import annotations

from benchmarks.loading.readers import (
    read_braindecode,
    read_datasets,
    read_engram,
    read_grain,
    read_h5py,
    read_litdata,
    read_lmdb,
    read_memmap,
    read_scdataset,
    read_tensordict,
    read_tensorstore,
    read_webdataset,
    read_zarr,
)

READERS = {
    reader.name: reader
    for module in (
        read_engram,
        read_memmap,
        read_h5py,
        read_lmdb,
        read_zarr,
        read_tensorstore,
        read_litdata,
        read_grain,
        read_datasets,
        read_webdataset,
        read_tensordict,
        read_scdataset,
        read_braindecode,
    )
    for reader in module.READERS
}
"""Readers by their names."""
