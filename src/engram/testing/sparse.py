"""Stores of any size that take no room: their samples are holes in files, which read as zeros.

Sound by every checksum, and opened like any other: what opening a store costs, and its first
batch, depends on its tables, and those are as long as a real store's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engram.store.backend import Part
from engram.store.crc import crc32c, file_crc32c
from engram.store.format import (
    FORMAT_VERSION,
    MANIFEST,
    ROOT_GROUP,
    Call,
    FileStamp,
    Manifest,
    array_metadata,
    call_folder,
    group_metadata,
    part_path,
)
from engram.store.grid import Grid
from engram.store.precision import Precision
from engram.store.tables import SCHEMAS, write_table

__all__ = ["SparseCorpus", "write_sparse"]

_PART_BYTES = 512 << 20
_SIGNAL = "eeg"


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCorpus:
    """Recordings of one signal, ``eeg``, with events ``square`` and ``circle`` in turn."""

    n_recordings: int = 2000
    """Recordings, one subject each."""
    n_samples: int = 194_000
    """Samples of each: 50 MB of 129 channels, half an hour at 100 Hz."""
    sample_shape: tuple[int, ...] = (129,)
    """Shape of one sample: channels ``E1``, ``E2``, ... if it has one axis."""
    rate_hz: float = 100.0
    """Samples per second."""
    n_events: int = 500
    """Events of each recording, evenly spread, that last from a half to nine tenths of their distance."""
    n_fields: int = 20
    """Descriptive fields, as a table of participants has them."""
    precision: Precision = "float16"
    """How samples are stored, two bytes per value; ``"exact"`` as int16."""

    @property
    def grid(self) -> Grid:
        """One recording on the disk."""
        dtype = {"float16": "float16", "bfloat16": "uint16"}.get(self.precision, "int16")
        return Grid(self.n_samples, self.sample_shape, dtype)

    @property
    def recordings_per_part(self) -> int:
        """Whole recordings that 512 MiB hold."""
        return max(1, _PART_BYTES // (self.n_samples * self.grid.sample_bytes))

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        n_channels = self.sample_shape[0] if len(self.sample_shape) == 1 else 0
        return tuple(f"E{number + 1}" for number in range(n_channels))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, time first."""
        return ("time", "channel") if self.channels else ("time", *"xyz"[: len(self.sample_shape)])


def write_sparse(root: Path, corpus: SparseCorpus) -> None:
    """Write a store whose samples are all zero and take no room on the disk.

    Parameters
    ----------
    root
        The store's folder, which there is not yet.
    corpus
        What is in it.

    Examples
    --------
    >>> import tempfile
    >>> import engram
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_sparse(Path(folder, "store"), SparseCorpus(n_recordings=30, n_events=2))
    ...     with engram.open(f"{folder}/store") as store:
    ...         print(store, store.read("00029", "eeg", 193_998).shape)
    Store('...store': 30 recordings) (2, 129)
    """
    files: dict[str, FileStamp] = {}
    per_part, n = corpus.recordings_per_part, corpus.n_recordings
    parts = [
        _part(root, number, range(first, min(first + per_part, n)), corpus, files)
        for number, first in enumerate(range(0, n, per_part))
    ]
    for name, table in _tables(corpus, parts):
        path = f"{call_folder(0)}/{name}.parquet"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        write_table(root / path, _by_part(table, len(parts)), table.schema)
        files[path] = FileStamp((root / path).stat().st_size, file_crc32c(root / path))
    root_group = group_metadata({"engram": {"format_version": FORMAT_VERSION}})
    _write(root, ROOT_GROUP, root_group, files)
    _write(root, f"parts/{ROOT_GROUP}", group_metadata({}), files)
    (root / MANIFEST).write_bytes(Manifest((Call(0, n, 0),), files).to_bytes())


def _write(root: Path, path: str, data: bytes, files: dict[str, FileStamp]) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(data)
    files[path] = FileStamp(len(data), crc32c(data))


def _part(
    root: Path, group: int, recordings: range, corpus: SparseCorpus, files: dict[str, FileStamp]
) -> Part:
    """Write the files of a part of some recordings."""
    grid = replace(corpus.grid, n_samples=len(recordings) * corpus.n_samples)
    part = Part(part_path(0, group, _SIGNAL, 0), _SIGNAL, grid)
    attributes = {"engram": {"precision": corpus.precision, "rate_hz": corpus.rate_hz}}
    _write(root, f"{part.path}/{ROOT_GROUP}", group_metadata({}), files)
    metadata = array_metadata(grid, corpus.axes, attributes)
    _write(root, f"{part.path}/{_SIGNAL}/{ROOT_GROUP}", metadata, files)
    index = grid.index()
    end = index + crc32c(index).to_bytes(4, "little")
    path = root / part.file
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        os.truncate(file.fileno(), grid.data_bytes)
        file.seek(grid.data_bytes)
        file.write(end)
    files[part.file] = FileStamp(grid.file_bytes, crc32c(end, _crc_of_zeros(grid.data_bytes)))
    return part


def _crc_of_zeros(n_bytes: int, known: dict[int, int] = {}) -> int:  # noqa: B006 - parts are mostly alike
    if n_bytes not in known:
        crc, block = 0, bytes(1 << 20)
        for _ in range(n_bytes >> 20):
            crc = crc32c(block, crc)
        known[n_bytes] = crc32c(bytes(n_bytes % (1 << 20)), crc)
    return known[n_bytes]


def _tables(corpus: SparseCorpus, parts: list[Part]) -> Iterator[tuple[str, pa.Table]]:
    """Give the tables of a store, one after another."""
    n, text = corpus.n_recordings, pa.string()
    ids = [f"{number:05}" for number in range(n)]
    columns: dict[str, Mapping[str, Any]] = {
        "recordings": {
            "recording": ids,
            "is_bank": [False] * n,
            "fingerprint": [f"content of {key}" for key in ids],
            "source_bytes": [corpus.n_samples * corpus.grid.sample_bytes] * n,
            "subject": ids,
            **{
                f"score_{field}": [f"{number * field % 997 / 10:.1f}" for number in range(n)]
                for field in range(corpus.n_fields)
            },
        },
        "signals": _signals(corpus, ids, parts),
        "events": _events(corpus, ids),
        "layouts": _layout(corpus),
        "scales": _scales(corpus, ids),
        "parts": {
            "part": [part.path for part in parts],
            "signal": [_SIGNAL] * len(parts),
            "n_samples": [part.grid.n_samples for part in parts],
            "sample_shape": [list(corpus.sample_shape)] * len(parts),
            "axes": [list(corpus.axes)] * len(parts),
            "dtype": [part.grid.dtype for part in parts],
            "precision": [corpus.precision] * len(parts),
            "rate_hz": [corpus.rate_hz] * len(parts),
        },
        "checksums": _checksums(parts),
        "refusals": {},
    }
    for name, found in columns.items():
        schema = SCHEMAS[name]
        extras = sorted(set(found) - set(schema.names))
        schema = pa.schema([*schema, *((extra, text) for extra in extras)])
        length = len(next(iter(found.values()), ()))
        whole = {key: found.get(key, pa.nulls(length, schema.field(key).type)) for key in schema.names}
        yield name, pa.table(whole, schema=schema)


def _by_part(table: pa.Table, n_parts: int) -> Iterator[pa.Table]:
    """Cut a table into a row group for every part, as a build leaves it."""
    n_rows = max(1, -(-len(table) // n_parts))
    return (table.slice(first, n_rows) for first in range(0, len(table), n_rows))


def _signals(corpus: SparseCorpus, ids: list[str], parts: list[Part]) -> Mapping[str, Any]:
    number = np.arange(len(ids))
    start = number % corpus.recordings_per_part * corpus.n_samples
    return {
        "recording": ids,
        "signal": [_SIGNAL] * len(ids),
        "part": [parts[i].path for i in (number // corpus.recordings_per_part).tolist()],
        "start": start,
        "stop": start + corpus.n_samples,
        "rate_hz": [corpus.rate_hz] * len(ids),
        "start_s": [0.0] * len(ids),
        "layout": ["cap" if corpus.channels else None] * len(ids),
    }


def _events(corpus: SparseCorpus, ids: list[str]) -> Mapping[str, Any]:
    step_s = corpus.n_samples / corpus.rate_hz / max(1, corpus.n_events)
    event = np.tile(np.arange(corpus.n_events), len(ids))
    return {
        "recording": np.repeat(np.array(ids, object), corpus.n_events),
        "onset_s": event * step_s,
        "duration_s": step_s * (0.5 + event % 5 / 10),
        "description": np.array(["square", "circle"], object)[event % 2],
        "feedback": np.array(["smiley_face", "sad_face", "non_target"], object)[event % 3],
    }


def _layout(corpus: SparseCorpus) -> Mapping[str, Any]:
    n = len(corpus.channels)
    return {
        "layout": ["cap"] * n,
        "index": np.arange(n, dtype=np.int32),
        "channel": corpus.channels,
        "type": ["eeg"] * n,
        "unit": ["uV"] * n,
        "bad": [False] * n,
    }


def _scales(corpus: SparseCorpus, ids: list[str]) -> Mapping[str, Any]:
    channels = corpus.channels or ("",)
    n = len(ids) * len(channels)
    zeros = np.zeros(n)
    measured = dict.fromkeys(("mean", "std", "minimum", "maximum", "max_error"), zeros)
    scaled = {"scale": np.full(n, 0.01), "offset": zeros} if corpus.precision == "int16" else {}
    return {
        "recording": np.repeat(np.array(ids, object), len(channels)),
        "signal": [_SIGNAL] * n,
        "index": np.tile(np.arange(len(channels), dtype=np.int32), len(ids)),
        "channel": np.tile(np.array(channels, object), len(ids)),
        "unit": ["uV"] * n,
        **scaled,
        **measured,
        "n_nan": np.zeros(n, np.int64),
    }


def _checksums(parts: list[Part]) -> Mapping[str, Any]:
    n_blocks = [part.grid.n_blocks for part in parts]
    crc = crc32c(bytes(parts[0].grid.block_bytes))
    return {
        "part": np.repeat(np.array([part.path for part in parts], object), n_blocks),
        "block": np.concatenate([np.arange(n) for n in n_blocks]),
        "crc32c": np.full(sum(n_blocks), crc, np.uint32),
    }
