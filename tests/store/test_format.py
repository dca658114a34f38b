"""The manifest as bytes."""

from __future__ import annotations

import json

import pytest

from engram.errors import StoreDamaged, StoreFormatError
from engram.store.format import Call, FileStamp, Manifest

MANIFEST = Manifest(
    (
        Call(
            0, 2, 1, {"eeg": [{"step": "high_pass", "l_freq": 0.5}]}, {"*": "default"}, {}, {"mne": "1.13.2"}
        ),
    ),
    {"zarr.json": FileStamp(42, 7), "tables/0000/events.parquet": FileStamp(5, 0xFFFFFFFF)},
)


def test_a_manifest_is_read_as_it_was_written() -> None:
    """to_bytes and from_bytes are inverse."""
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


def test_a_manifest_is_json_for_everybody() -> None:
    """Other programs read it with any JSON parser."""
    body = json.loads(MANIFEST.to_bytes())

    assert body["files"]["zarr.json"] == [42, "00000007"]


def test_every_flipped_bit_of_a_manifest_is_seen() -> None:
    """White space and the checksum itself included."""
    data = MANIFEST.to_bytes()
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(StoreDamaged, match="own checksum"):
            Manifest.from_bytes(bytes(damaged))


def test_a_cut_manifest_is_seen() -> None:
    """No prefix of a manifest is a manifest."""
    data = MANIFEST.to_bytes()
    for length in range(len(data)):
        with pytest.raises(StoreDamaged):
            Manifest.from_bytes(data[:length])


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "parts/../../x", "parts//x", "a\\b", "."])
def test_a_manifest_that_points_outside_is_refused(path: str) -> None:
    """A store from a stranger is data: nothing outside of it is read, and nothing is deleted."""
    with pytest.raises(StoreFormatError, match="outside the store"):
        Manifest.from_bytes(Manifest(files={path: FileStamp(1, 1)}).to_bytes())


def test_another_format_version_is_refused_by_name() -> None:
    """The message names both versions."""
    with pytest.raises(StoreFormatError, match="format version 2, this Engram reads 1"):
        Manifest.from_bytes(Manifest(format_version=2).to_bytes())
