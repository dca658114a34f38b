"""Damage is found, wherever it is, and located."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.store.reader import Store
from engram.store.verify import Verification, verify


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(store_path, tmp_path / "store")
    return tmp_path / "store"


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def only(found: Verification) -> tuple[str, str, str]:
    """Give the one damage found: path, kind, where."""
    assert len(found.damages) == 1
    return found.damages[0].path, found.damages[0].kind, found.damages[0].where


def test_a_sound_store_is_sound(store_path: Path) -> None:
    """Every file is counted, and every byte of it is read."""
    found = verify(store_path)

    assert found.is_sound
    assert found.unlisted == ()
    files = [p for p in store_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert found.n_files == len(files)
    assert found.n_bytes == sum(p.stat().st_size for p in files if p.name != "manifest.json")


def test_a_flipped_bit_in_a_part_is_located_to_recording_and_seconds(copy: Path) -> None:
    """Sample 1234 of a 100 Hz recording is at 12.34 s; a block of 508 samples holds it."""
    extent = Store(copy).extent("eeg-129", "eeg")
    first = extent.part.grid.byte_range(extent.start + 1234, 0)[0]
    flip(copy / extent.part.file, 8 * first + 3)
    path, kind, where = only(found := verify(copy))
    block = (extent.start + 1234) // extent.part.grid.block_samples
    start, stop = extent.part.grid.samples_of(block)

    assert (path, kind) == (extent.part.file, "content")
    assert (
        f"block {block}: eeg-129 eeg {(start - extent.start) / 100:.2f}-{(stop - extent.start) / 100:.2f} s"
        in where
    )
    assert found.damages[0].recordings == ("eeg-129",)


def test_a_flipped_bit_in_a_shards_index_is_located_to_the_index(copy: Path) -> None:
    """Our reader needs no index, others do."""
    extent = Store(copy).extent("eeg-129", "eeg")
    flip(copy / extent.part.file, 8 * (extent.part.grid.data_bytes + 5))

    path, kind, where = only(verify(copy))

    assert (path, kind) == (extent.part.file, "content")
    assert where == f"the shard's index, from byte {extent.part.grid.data_bytes}"


def test_a_flipped_bit_in_zarrs_metadata_is_found(copy: Path) -> None:
    """Of the root, of a part's group and of its array."""
    part = Store(copy).extent("eeg-129", "eeg").part.path
    for name in ("zarr.json", "parts/zarr.json", f"{part}/zarr.json", f"{part}/eeg/zarr.json"):
        flip(copy / name, 8 * 10)
        assert only(verify(copy))[0] == name
        flip(copy / name, 8 * 10)


@pytest.mark.parametrize(
    "table", ["recordings", "signals", "events", "layouts", "scales", "parts", "checksums"]
)
def test_every_flipped_bit_of_a_table_is_found(copy: Path, table: str) -> None:
    """Over positions spread through the file; most are located to row group and column."""
    name = f"tables/0000/{table}.parquet"
    n_bits = 8 * (copy / name).stat().st_size
    wheres = []
    for bit in np.linspace(0, n_bits - 1, 25).astype(int).tolist():
        flip(copy / name, bit)
        path, kind, where = only(verify(copy))
        flip(copy / name, bit)
        assert (path, kind) == (name, "content")
        wheres.append(where)

    assert any(where.startswith("row group") for where in wheres)


def test_a_flipped_bit_in_the_manifest_is_found(copy: Path) -> None:
    """It carries its own checksum."""
    flip(copy / "manifest.json", 8 * 200)

    assert only(verify(copy))[0] == "manifest.json"


def cut(path: Path) -> None:
    """Cut a file to half its length."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize(("harm", "kind"), [(cut, "size"), (Path.unlink, "missing")])
def test_a_truncated_and_a_missing_file_are_found(
    copy: Path, harm: Callable[[Path], None], kind: str
) -> None:
    """Every file that the manifest lists, one at a time."""
    for name in Store(copy).manifest.files:
        kept = (copy / name).read_bytes()
        harm(copy / name)
        path, found, _ = only(verify(copy))
        (copy / name).write_bytes(kept)
        assert (path, found) == (name, kind)


def test_a_missing_part_names_the_recordings_lost(copy: Path) -> None:
    """So that one knows what to prepare again."""
    extent = Store(copy).extent("eeg-129", "eeg")
    (copy / extent.part.file).unlink()

    assert "eeg-129" in verify(copy).damages[0].recordings


def test_a_stranger_in_the_folder_is_named_and_harmless(copy: Path) -> None:
    """It is no part of the store."""
    (copy / "notes.txt").write_text("mine")
    found = verify(copy)

    assert found.is_sound
    assert found.unlisted == ("notes.txt",)


def test_damage_on_damage_is_still_all_found(copy: Path) -> None:
    """A part whose checksums are damaged too is reported, if not located."""
    extent = Store(copy).extent("eeg-129", "eeg")
    flip(copy / extent.part.file, 8 * 1000)
    flip(copy / "tables/0000/checksums.parquet", 8 * 40)
    flip(copy / "tables/0000/signals.parquet", 8 * 40)

    assert {d.path for d in verify(copy).damages} == {
        extent.part.file, "tables/0000/checksums.parquet", "tables/0000/signals.parquet"
    }  # fmt: skip


def test_the_files_of_some_calls_can_be_verified_alone(tmp_path: Path) -> None:
    """Damage in another call's files is not looked for; what all calls share is."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        x = rng.normal(0, 20, (1000, 4))
        prepare(ArraySource({name: ArrayRecording({"eeg": ArraySignal(x, 100.0)})}), tmp_path / "store")
    flip(tmp_path / "store" / "parts" / "0000-00000-eeg-0" / "eeg" / "c" / "0" / "0", 5)

    assert verify(tmp_path / "store", calls={1}).is_sound
    assert only(verify(tmp_path / "store", calls={0}))[0].startswith("parts/0000-")
    counts = [verify(tmp_path / "store", calls=calls).n_files for calls in ({0}, {1}, ())]
    assert counts[0] + counts[1] - counts[2] == verify(tmp_path / "store").n_files
    (tmp_path / "store" / "zarr.json").write_text("{")
    assert "zarr.json" in {damage.path for damage in verify(tmp_path / "store", calls={1}).damages}
