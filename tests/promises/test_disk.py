"""Disks that are full, read-only or somebody else's: clear errors, and nothing finished is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engram.errors import DoesNotFit, StoreNotWritable
from engram.preparation import ingest
from engram.preparation.ingest import prepare
from engram.recordings.bids import BidsSource
from engram.store.verify import verify
from engram.store.writer import locked
from engram.testing.hbn import HbnCorpus, write_hbn


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size; skip where that is not allowed."""
    folder.mkdir()
    options = f"size={size_bytes}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 recordings in two releases; 11 MB of store."""
    root = tmp_path_factory.mktemp("corpus")
    write_hbn(root, HbnCorpus(n_subjects=3, n_trials=3, rest_s=60))
    return root


def test_a_full_disk_keeps_what_is_finished(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction is passed over, so that the disk fills while a part is written; then space is made."""
    monkeypatch.setattr(ingest, "check_free_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        with pytest.raises(DoesNotFit, match=r"disk of \S*store is full\. Finished parts are kept") as caught:
            prepare(corpus, disk / "store", part_bytes="5 MB")
        assert caught.value.resource == "disk"
        finished = {path.name: path.stat().st_ino for path in (disk / "store/parts").iterdir()}
        subprocess.run(["mount", "-o", "remount,size=100000000", str(disk)], check=True)
        prepare(corpus, disk / "store", part_bytes="5 MB").store.close()

        assert finished
        assert {name: (disk / "store/parts" / name).stat().st_ino for name in finished} == finished
        assert verify(disk / "store").is_sound


def test_a_disk_too_small_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    """The predicted size with its margin of 20 % is compared with the real disk."""
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        with pytest.raises(DoesNotFit, match="predicted to take the disk's free space"):
            prepare(corpus, disk / "store")
        assert not list((disk / "store").glob("parts/*"))


def test_a_release_that_fills_the_disk_leaves_the_store_as_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first release stays open to readers, sound, and is served."""
    monkeypatch.setattr(ingest, "check_free_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 9_000_000) as disk:
        first = prepare(BidsSource(corpus, releases="R1"), disk / "store", part_bytes="2 MB")
        with pytest.raises(DoesNotFit):
            prepare(corpus, disk / "store", part_bytes="2 MB")
        found = verify(disk / "store")

        assert found.is_sound
        first.store.read(first.store.recordings["recording"][0].as_py(), "eeg")
        first.store.close()


def test_a_read_only_disk_is_named(corpus: Path, tmp_path: Path) -> None:
    """For a new store, and for one that is there, which is read all the same."""
    with small_disk(tmp_path / "disk", 50_000_000) as disk:
        first = prepare(BidsSource(corpus, releases="R1"), disk / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name in ("store", "other"):
            with pytest.raises(StoreNotWritable, match=f"{name} cannot be written: Read-only file system"):
                prepare(corpus, disk / name)
        assert verify(disk / "store").is_sound
        first.store.close()


def test_a_second_builder_in_another_process_is_refused(corpus: Path, tmp_path: Path) -> None:
    """With exit code 4 and one line; the first builder is not disturbed."""
    command = [sys.executable, "-m", "engram", "prepare", str(corpus), str(tmp_path / "store")]
    with locked(tmp_path / "store"):
        second = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    assert second.returncode == 4
    assert second.stderr == "engram: Another process is building store. Wait until it has finished.\n"
