"""The backends that there are, held to what every backend promises."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from engram.errors import InputError, StoreDamaged
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.store import zarr_backend
from engram.store.backend import BACKENDS, Backend, open_backend
from engram.store.reader import Extent, Store
from engram.testing.backends import BackendConformance


class TestZarrBackend(BackendConformance):
    """Files where they lie."""

    name = "zarr"


class TestZarrBackendWithoutPreadv(BackendConformance):
    """Files where the system reads at the one position that a descriptor has, as Windows does."""

    name = "zarr"

    @pytest.fixture(autouse=True)
    def _no_preadv(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "preadv")


class TestRamBackend(BackendConformance):
    """Parts in memory."""

    name = "ram"


def test_every_known_backend_is_tested_here() -> None:
    """A backend that is added is added to these tests."""
    assert set(BACKENDS) == {TestZarrBackend.name, TestRamBackend.name}


def test_an_unknown_backend_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """By name."""
    with pytest.raises(InputError, match=r"Unknown backend 'tape'. Use one of: ram, zarr"):
        open_backend("tape", tmp_path, {})


# Stores that change under their reader.


def build(path: Path, names: str, *, n_samples: int = 50, other: str = "") -> Store:
    """Prepare recordings named by letters, one to a part; those in ``other`` have other samples."""
    recordings = {}
    for name in names:
        x = np.random.default_rng((name in other, ord(name))).integers(0, 99, (n_samples, 2), np.int16)
        recordings[name] = ArrayRecording({"robs": ArraySignal(x, 100.0)})
    return prepare(ArraySource(recordings), path, part_bytes="200 B").store


def read(backend: Backend, extent: Extent) -> NDArray[np.int16]:
    """Read a recording."""
    out = np.empty((extent.n_samples, 2), np.int16)
    backend.read_into(extent.part, extent.start, out)
    return out


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four recordings in four parts."""
    store = build(tmp_path / "store", "abcd")
    assert len({extent.part.path for extent in store.extents("robs")}) == 4
    return store


@pytest.mark.parametrize("kind", sorted(BACKENDS))
def test_recordings_that_are_appended_disturb_no_reader(store: Store, kind: str) -> None:
    """Files opened afterwards are still those of the tables that were read."""
    with Store(store.path, kind) as reader:
        extents = list(reader.extents("robs"))
        expected = [read(store.backend, extent) for extent in extents]
        store.close()
        read(reader.backend, extents[0])
        build(store.path, "abcdef").close()
        assert len(Store(store.path).manifest.calls) == 2
        assert all(
            np.array_equal(read(reader.backend, extent), x)
            for extent, x in zip(extents, expected, strict=True)
        )


@pytest.mark.parametrize("kind", sorted(BACKENDS))
@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_part_that_was_prepared_anew_is_refused(store: Store, kind: str, *, is_pickled: bool) -> None:
    """Whoever opens it after that, also in another process; parts of the same bytes are served."""
    store.close()
    with Store(store.path, kind) as reader:
        a, b, c, d = reader.extents("robs")
        kept = read(reader.backend, a)
        shutil.rmtree(store.path)
        build(store.path, "abcd", other="cd").close()
        backend = pickle.loads(pickle.dumps(reader.backend)) if is_pickled else reader.backend

        assert np.array_equal(read(backend, a), kept)
        read(backend, b)
        for extent in (c, d, c):
            with pytest.raises(StoreDamaged, match=r"was prepared anew since it was opened\. Open it again"):
                read(backend, extent)
        backend.close()


@pytest.mark.parametrize(
    ("names", "n_samples", "message"),
    [
        ("abc", 50, "was prepared anew"),
        ("abcd", 100_000, "was prepared anew"),
        ("", 0, r"holds no store any more \(no manifest.json\)"),
    ],
    ids=["fewer recordings", "other lengths", "no store"],
)
def test_a_store_prepared_anew_is_told_from_a_damaged_one(
    store: Store, names: str, n_samples: int, message: str
) -> None:
    """Where the part is gone or of another size too, and where nothing was prepared."""
    extent = list(store.extents("robs"))[-1]
    store.close()
    shutil.rmtree(store.path)
    if names:
        build(store.path, names, n_samples=n_samples).close()
    with pytest.raises(StoreDamaged, match=message):
        read(store.backend, extent)


def test_a_part_of_another_size_is_damage_before_anything_is_read(store: Store) -> None:
    """The message says where it ends and where it should."""
    extent = next(store.extents("robs"))
    with (store.path / extent.part.file).open("r+b") as file:
        file.truncate(100)
    store.close()
    with pytest.raises(StoreDamaged, match=r"ends at byte 100, it should have \d+\. Run engram verify"):
        read(store.backend, extent)


def test_a_file_that_is_open_is_served_whatever_takes_its_place(store: Store) -> None:
    """A rename over it changes nothing for who reads it, nor does its removal."""
    extent = next(store.extents("robs"))
    kept = read(store.backend, extent)
    file = store.path / extent.part.file
    shutil.copy(file, other := file.with_name("other"))
    other.write_bytes(bytes(other.stat().st_size))
    other.replace(file)
    assert np.array_equal(read(store.backend, extent), kept)
    file.unlink()
    assert np.array_equal(read(store.backend, extent), kept)
    store.close()


def test_few_files_are_open_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is closed for a new one; but a file that somebody holds stays open."""
    monkeypatch.setattr(zarr_backend, "_MAX_OPEN_FILES", 2)
    extents = list(store.extents("robs"))
    expected = read(store.backend, extents[0])
    (held,) = store.backend.files([extents[0].part]) or ()
    for _ in range(3):
        for extent in extents:
            read(store.backend, extent)
            opened = {file.path for file in psutil.Process().open_files()}
            assert sum(path.startswith(str(store.path)) for path in opened) <= 2 + 1
    assert os.pread(held.descriptor, expected.nbytes, 0) == expected.tobytes()
    store.close()
