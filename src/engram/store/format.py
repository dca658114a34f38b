"""The manifest and the Zarr metadata of a store, as frozen values <-> bytes; no I/O.

This module decides what the text files of a store say. Where they lie is in ``Layout``
below; when they are written is left to ``engram.store.writer``. The specification for
people is ``docs/reference/store-format.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engram.errors import StoreDamaged, StoreFormatError
from engram.store.crc import crc32c
from engram.store.grid import Grid

__all__ = [
    "BUILDING",
    "FORMAT_VERSION",
    "LOCK",
    "MANIFEST",
    "ROOT_GROUP",
    "Call",
    "FileStamp",
    "Manifest",
    "array_metadata",
    "call_folder",
    "call_of",
    "group_metadata",
    "part_path",
]

FORMAT_VERSION = 1
"""Version of the bytes on disk; it changes apart from the library's version."""

MANIFEST = "manifest.json"
"""Name of the manifest: a folder without it is no store."""
BUILDING = "building"
"""Folder of an unfinished ``prepare``; gone when it is finished."""
LOCK = ".lock"
"""Empty file that a builder locks; no part of the store."""
ROOT_GROUP = "zarr.json"
"""Zarr's metadata file name."""

_HEAD = re.compile(rb'\{"crc32c": "([0-9a-f]{8})", ')
_BLANK = b'{"crc32c": "00000000", '


def call_folder(call: int) -> str:
    """Give the folder of a call's tables, relative to the store."""
    return f"tables/{call:04d}"


def part_path(call: int, group: int, signal: str, number: int) -> str:
    """Give the folder of a part (a Zarr group), relative to the store.

    Examples
    --------
    >>> part_path(0, 12, "eeg", 1)
    'parts/0000-00012-eeg-1'
    """
    return f"parts/{call:04d}-{group:05d}-{signal}-{number}"


def call_of(path: str) -> int | None:
    """Tell which call wrote a file of the store; None for what all calls share.

    Examples
    --------
    >>> call_of("tables/0003/events.parquet"), call_of("zarr.json")
    (3, None)
    """
    match = re.match(r"(?:tables|parts)/([0-9]{4,})[-/]", path)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Size and checksum of one file."""

    size_bytes: int
    """Size in bytes."""
    crc32c: int
    """CRC32C of the whole file."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one ``prepare`` call did."""

    number: int
    """Number of the call; numbers of calls that were replaced whole are not used again."""
    n_recordings: int
    """Recordings that it stored."""
    n_refused: int
    """Recordings that it refused; its table ``refusals`` names them."""
    steps: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Per signal, the steps and their settings."""
    precision: Mapping[str, str] = field(default_factory=dict)
    """Per signal, the precision that was asked for."""
    errors: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Per signal, the channel that keeps the lowest signal-to-noise ratio, measured while writing."""
    software: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that decide samples."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The list of everything that belongs to a store.

    Examples
    --------
    >>> manifest = Manifest(files={"zarr.json": FileStamp(42, 7)})
    >>> Manifest.from_bytes(manifest.to_bytes()) == manifest
    True
    """

    calls: tuple[Call, ...] = ()
    """The calls, oldest first; a recording of a later call replaces one of an earlier."""
    files: Mapping[str, FileStamp] = field(default_factory=dict)
    """Every other file of the store by its relative path."""
    format_version: int = FORMAT_VERSION
    """Version of the format."""

    def to_bytes(self) -> bytes:
        """Write the manifest as JSON that carries its own CRC32C.

        The checksum is that of the very bytes with the eight digits set to ``0``, so a
        flipped bit anywhere in the file is seen, in white space too.
        """
        body: dict[str, Any] = {
            "format_version": self.format_version,
            "calls": [_call_to_json(call) for call in self.calls],
            "files": {
                path: [stamp.size_bytes, f"{stamp.crc32c:08x}"] for path, stamp in sorted(self.files.items())
            },
        }
        text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
        blank = _BLANK + text[1:].lstrip().encode() + b"\n"
        return blank.replace(b"00000000", f"{crc32c(blank):08x}".encode(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises
        ------
        StoreDamaged
            If its checksum does not match its bytes.
        StoreFormatError
            If it is of another format version, or lists a path outside the store.
        """
        head = _HEAD.match(data)
        blank = _BLANK + data[len(_BLANK) :]
        if head is None or int(head[1], 16) != crc32c(blank):
            raise StoreDamaged(
                f"{MANIFEST} does not match its own checksum. Restore it from a copy, or prepare into "
                "a new folder."
            )
        body = json.loads(data)
        try:
            return cls._from_body(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreFormatError):
                raise
            raise StoreFormatError(f"{MANIFEST} is not one of Engram's: {error!r}. Do not use it.") from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Manifest:
        if body["format_version"] != FORMAT_VERSION:
            raise StoreFormatError(
                f"The store has format version {body['format_version']}, this Engram reads "
                f"{FORMAT_VERSION}. Use the Engram that wrote it, or prepare it again."
            )
        files = {_inside(path): FileStamp(size, int(crc, 16)) for path, (size, crc) in body["files"].items()}
        return cls(tuple(Call(**call) for call in body["calls"]), files)


def _inside(path: str) -> str:
    """Check that a path of a stranger's manifest stays in the store."""
    if path.startswith("/") or "\\" in path or any(step in ("", ".", "..") for step in path.split("/")):
        raise StoreFormatError(
            f"{MANIFEST} lists {path!r}, which is outside the store. Do not use this store."
        )
    return path


def _call_to_json(call: Call) -> dict[str, Any]:
    return {
        "number": call.number,
        "n_recordings": call.n_recordings,
        "n_refused": call.n_refused,
        "steps": dict(sorted(call.steps.items())),
        "precision": dict(sorted(call.precision.items())),
        "errors": dict(sorted(call.errors.items())),
        "software": dict(sorted(call.software.items())),
    }


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """Write the ``zarr.json`` of a Zarr v3 group."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def array_metadata(grid: Grid, axes: tuple[str, ...], attributes: Mapping[str, Any]) -> bytes:
    """Write the ``zarr.json`` of a part's array: one shard, blocks as inner chunks.

    References
    ----------
    Zarr v3 specification, core protocol and "sharding-indexed" codec.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = {"name": "bytes"} if grid.dtype in ("uint8", "int8", "bool") else little
    inner = [grid.block_samples, *grid.sample_shape]
    shard = [grid.n_blocks * grid.block_samples, *grid.sample_shape]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": inner,
            "codecs": [plain],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [grid.n_samples, *grid.sample_shape],
            "data_type": grid.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if grid.dtype == "bool" else 0 if "int" in grid.dtype else 0.0,
            "codecs": [sharding],
            "dimension_names": list(axes),
            "attributes": dict(attributes),
            "storage_transformers": [],
        }
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
