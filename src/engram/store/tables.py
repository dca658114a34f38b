"""The tables of a store: their columns, and Parquet with page checksums.

Every ``prepare`` call writes one file per table. While it is unfinished, each group of
recordings has its own small files of the same columns, which are joined in order at the
end, in row groups of some ten thousand rows: memory stays that of one of those, and the
bytes do not depend on who built what when.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engram.errors import StoreDamaged

__all__ = [
    "SCHEMAS",
    "TABLES",
    "codes_of",
    "join_tables",
    "numbers_of",
    "read_table",
    "rows_table",
    "write_table",
]

_text, _whole, _real = pa.string(), pa.int64(), pa.float64()

SCHEMAS: Mapping[str, pa.Schema] = {
    "recordings": pa.schema(
        [
            ("recording", _text),
            ("is_bank", pa.bool_()),
            ("fingerprint", _text),
            ("source_bytes", _whole),
        ]
    ),
    "signals": pa.schema(
        [
            ("recording", _text),
            ("signal", _text),
            ("part", _text),
            ("start", _whole),
            ("stop", _whole),
            ("rate_hz", _real),
            ("start_s", _real),
            ("layout", _text),
            ("gaps", pa.list_(_whole)),
            ("bank", _text),
        ]
    ),
    "events": pa.schema(
        [
            ("recording", _text),
            ("onset_s", _real),
            ("duration_s", _real),
            ("description", _text),
        ]
    ),
    "layouts": pa.schema(
        [
            ("layout", _text),
            ("index", pa.int32()),
            ("channel", _text),
            ("type", _text),
            ("unit", _text),
            ("bad", pa.bool_()),
            ("x_m", _real),
            ("y_m", _real),
            ("z_m", _real),
        ]
    ),
    "scales": pa.schema(
        [
            ("recording", _text),
            ("signal", _text),
            ("index", pa.int32()),
            ("channel", _text),
            ("unit", _text),
            ("scale", _real),
            ("offset", _real),
            ("mean", _real),
            ("std", _real),
            ("minimum", _real),
            ("maximum", _real),
            ("max_error", _real),
            ("snr_db", _real),
            ("n_nan", _whole),
        ]
    ),
    "parts": pa.schema(
        [
            ("part", _text),
            ("signal", _text),
            ("n_samples", _whole),
            ("sample_shape", pa.list_(_whole)),
            ("axes", pa.list_(_text)),
            ("dtype", _text),
            ("precision", _text),
            ("rate_hz", _real),
        ]
    ),
    "checksums": pa.schema([("part", _text), ("block", _whole), ("crc32c", pa.uint32())]),
    "refusals": pa.schema(
        [("recording", _text), ("fingerprint", _text), ("reason", _text), ("detail", _text)]
    ),
}
"""Columns that every table has. ``recordings`` and ``events`` have more, all of text: the
descriptive fields and the further columns of events.tsv, as they stand in the source."""

TABLES = tuple(SCHEMAS)
"""Names of the tables."""


def rows_table(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make a table of rows; columns beyond the schema become text columns, sorted by name."""
    schema = SCHEMAS[name]
    extras = sorted({column for row in rows for column in row} - set(schema.names))
    schema = pa.schema([*schema, *((column, _text) for column in extras)])
    columns = {c: [row.get(c) for row in rows] for c in schema.names}
    return pa.table(columns, schema=schema)


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables of one schema as one Parquet file, in row groups of some ten thousand rows.

    Page checksums are on: without them most flipped bits of a Parquet file are read as
    wrong values and not as an error.
    """
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for some in _gathered(tables):
            writer.write_table(some, row_group_size=some.num_rows)


_GROUP_ROWS = 16_384
"""Every column of every row group costs what a thousand rows cost to read: two hundred of a hundred rows
each take a fifth of a second of opening a store, in one it is a hundredth."""


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join tables that follow one another, until there are rows enough."""
    some: list[pa.Table] = []
    n_rows = 0
    for table in tables:
        some.append(table)
        n_rows += table.num_rows
        if n_rows >= _GROUP_ROWS:
            yield pa.concat_tables(some)
            some, n_rows = [], 0
    if n_rows:
        yield pa.concat_tables(some)


def read_table(path: Path, columns: Sequence[str] | None = None, *, is_encoded: bool = False) -> pa.Table:
    """Read a Parquet file, or some columns of it, checking its page checksums.

    Parameters
    ----------
    path
        The file.
    columns
        Names of the columns wanted, or None for all.
    is_encoded
        Give text as numbers of its distinct values: Arrow's dictionaries.

    Raises
    ------
    StoreDamaged
        If it is missing, cut short or its bytes have changed.
    """
    try:
        # Read through one open file: pyarrow's dataset reader ignores the page checksums.
        texts = [field.name for field in pq.read_schema(path) if field.type == _text] if is_encoded else None
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
            # In this thread alone: Arrow's own each keep memory that they have read with, and gain little.
            return file.read(columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        message = f"Table {path.parent.name}/{path.name} cannot be read: {error}. Run engram verify."
        raise StoreDamaged(message) from error


def numbers_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """Look at a column of numbers without nulls.

    Not by ``to_numpy``: that imports pandas where it is installed, 29 MB.

    Examples
    --------
    >>> numbers_of(pa.chunked_array([[1, 2], [3]]))
    array([1, 2, 3])
    """
    # In one piece, as one call leaves it, it is looked at: combining copies one piece too.
    piece = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return np.asarray(np.from_dlpack(piece))


def codes_of(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], list[str]]:
    """Look at an encoded column of text without nulls: the number of every row's value, and the values.

    Examples
    --------
    >>> codes_of(pa.chunked_array([pa.array(["a", "b"]).dictionary_encode()]))
    (array([0, 1], dtype=int32), ['a', 'b'])
    """
    encoded = column.unify_dictionaries().combine_chunks()
    return np.asarray(np.from_dlpack(encoded.indices), np.int32), encoded.dictionary.to_pylist()


def join_tables(name: str, paths: Sequence[Path], target: Path) -> int:
    """Join the tables of all groups into the one of the call, and count its rows.

    Columns that only some groups have are null in the others. ``layouts`` of the same
    content have the same id, so each is written once.
    """
    schema = SCHEMAS[name]
    extras: set[str] = set()
    for path in paths:
        extras |= set(pq.read_schema(path).names) - set(schema.names)
    schema = pa.schema([*schema, *((column, _text) for column in sorted(extras))])
    n_rows = 0
    seen: set[str] = set()

    def aligned() -> Iterable[pa.Table]:
        nonlocal n_rows
        for path in paths:
            table = read_table(path)
            if name == "layouts":
                table = table.filter(
                    pa.array([i not in seen for i in table["layout"].to_pylist()], pa.bool_())
                )
                seen.update(table["layout"].to_pylist())
            missing = [c for c in schema.names if c not in table.column_names]
            for column in missing:
                table = table.append_column(column, pa.nulls(len(table), _text))
            n_rows += len(table)
            yield table.select(schema.names)

    write_table(target, aligned(), schema)
    return n_rows
