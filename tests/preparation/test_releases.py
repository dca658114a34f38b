"""Releases behind a URL become a store, one at a time on the disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from engram.errors import DoesNotFit, InputError, SourceError, StoreDamaged, StoreLocked, StoreNotWritable
from engram.preparation import releases as releases_module
from engram.preparation.ingest import prepare
from engram.preparation.releases import PreparedRelease, prepare_releases
from engram.preparation.steps import HighPass
from engram.recordings import remote
from engram.recordings.bids import BidsSource
from engram.store.verify import verify
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.testing.stores import digest

CCD = "contrastChangeDetection"
FOLDERS = {"R1": "R1_L100_bdf", "R2": "R2_L100_bdf"}
URL = "s3://nmdatasets/NeurIPS25"


class Info(dict[str, Any]):
    """What a bucket says of a file, which can be watched."""


class Bucket(AbstractFileSystem):  # type: ignore[misc]
    """A bucket as s3fs shows it, over a local folder: ETags are MD5s; what is fetched is noted."""

    protocol = "s3"
    cachable = False
    folder: Path
    anon: bool | None = None
    fetched: list[str]
    on_get: Callable[[str, Path], None]
    told: list[weakref.ref[Info]]

    def __init__(self, *, anon: bool, **options: Any) -> None:
        super().__init__(**options)
        type(self).anon = anon

    def _path(self, place: str) -> Path:
        return self.folder / place.removeprefix("nmdatasets/NeurIPS25").strip("/")

    def _info(self, place: str) -> dict[str, Any]:
        path = self._path(place)
        if path.is_dir():
            return {"name": place, "size": 0, "type": "directory"}
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        info = Info(name=place, size=path.stat().st_size, type="file", ETag=f'"{md5}"')
        self.told.append(weakref.ref(info))
        return info

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        place = self._strip_protocol(path)
        found = [self._info(f"{place}/{each.name}") for each in sorted(self._path(place).iterdir())]
        return found if detail else [each["name"] for each in found]

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        shutil.copyfile(self._path(rpath), lpath)
        self.fetched.append(rpath.removeprefix("nmdatasets/NeurIPS25/"))
        type(self).on_get(self.fetched[-1], Path(lpath))


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(remote, "_WAITS_S", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two releases of two subjects, two runs and rest each; one recording is truncated."""
    root = tmp_path_factory.mktemp("corpus")
    write_hbn(root, HbnCorpus(n_subjects=2, n_runs=2, n_trials=3, rest_s=10))
    return root


@pytest.fixture
def bucket(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    """The corpus in a bucket of its own."""
    for name, value in {
        "folder": tmp_path / "bucket",
        "fetched": [],
        "told": [],
        "on_get": lambda path, came: None,
    }.items():
        monkeypatch.setattr(Bucket, name, value, raising=False)
    shutil.copytree(corpus, Bucket.folder)
    monkeypatch.setitem(import_module("fsspec.registry")._registry, "s3", Bucket)
    return Bucket


def go(store: Path, url: str = URL, **options: Any) -> list[PreparedRelease]:
    """Prepare task contrastChangeDetection of all releases."""
    return list(prepare_releases(url, store, **{"tasks": CCD, "steps": [HighPass(1.0)], **options}))


def plain(corpus: Path, store: Path, releases: tuple[str, ...] = ("R1", "R2")) -> dict[str, str]:
    """Prepare the same from local folders, one after the other; give the bytes of the store."""
    for release in releases:
        source = BidsSource(corpus / FOLDERS[release], tasks=CCD)
        prepare(source, store, steps=[HighPass(1.0)]).store.close()
    return digest(store)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a store that was prepared from local folders."""
    return plain(corpus, tmp_path_factory.mktemp("plain") / "store")


def files_below(folder: Path) -> set[str]:
    """Name the files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_wanted(path: str) -> bool:
    """Tell what of the corpus belongs to the task: its recordings, and what lies at the top."""
    return f"_task-{CCD}_" in path or path.count("/") == 1


# -- what is made ------------------------------------------------------------------------


@pytest.mark.parametrize("delete_raw", [False, True])
def test_a_bucket_gives_the_store_that_local_folders_give(
    bucket: type[Bucket], tmp_path: Path, expected: dict[str, str], delete_raw: bool
) -> None:
    """Byte for byte, from the wanted files alone, asked for without an account."""
    first, second = go(tmp_path / "store", delete_raw=delete_raw)

    assert digest(tmp_path / "store") == expected
    assert sorted(bucket.fetched) == sorted(filter(is_wanted, files_below(bucket.folder)))
    assert bucket.anon is True
    assert (first.name, second.name) == ("R1_L100_bdf", "R2_L100_bdf")
    assert (first.n_recordings, second.n_recordings) == (4, 3)
    assert [refusal.reason for refusal in (*first.refusals, *second.refusals)] == ["unreadable"]
    sizes = [(bucket.folder / path).stat().st_size for path in bucket.fetched]
    assert first.n_files + second.n_files == len(sizes)
    assert first.fetched_bytes + second.fetched_bytes == sum(sizes)
    kept = files_below(tmp_path / "store.fetched") - {".lock", "R1_L100_bdf.json", "R2_L100_bdf.json"}
    assert kept == (set() if delete_raw else set(bucket.fetched))
    assert first.deleted_bytes == (first.fetched_bytes if delete_raw else 0)


def test_memory_and_file_urls_do_as_well(corpus: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    """Whatever fsspec opens; a URL may be a dataset itself, and releases come in the order asked for."""
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/corpus", recursive=True)
    try:
        go(tmp_path / "memory", "memory://corpus/")
    finally:
        memory.rm("/corpus", recursive=True)
    for folder in FOLDERS.values():
        go(tmp_path / "file", (corpus / folder).as_uri())
    turned = go(tmp_path / "turned", corpus.as_uri(), releases=["R2", "R1", "R2"])

    assert digest(tmp_path / "memory") == expected
    assert digest(tmp_path / "file") == expected
    assert [each.name for each in turned] == ["R2_L100_bdf", "R1_L100_bdf"]
    assert digest(tmp_path / "turned") == plain(corpus, tmp_path / "turned plain", ("R2", "R1"))


def test_two_datasets_of_the_same_recordings_are_refused(bucket: type[Bucket], tmp_path: Path) -> None:
    """Else each call would prepare one over the other."""
    shutil.copytree(bucket.folder / "R1_L100_bdf", bucket.folder / "copy")
    with pytest.raises(InputError, match=r"copy.*\.bdf and R1_L100_bdf.*\.bdf are both sub-"):
        go(tmp_path / "store")
    assert bucket.fetched == []


def test_what_is_listed_is_not_held_while_files_come(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket's listing of all releases takes as much memory as a batch."""
    held: list[int] = []

    def look(path: str, came: Path) -> None:
        gc.collect()
        held.append(sum(told() is not None for told in bucket.told))

    monkeypatch.setattr(bucket, "on_get", look)
    go(tmp_path / "store", releases="R1")
    assert bucket.told
    assert held
    assert not any(held)


def test_filters_count_over_all_releases(bucket: type[Bucket], tmp_path: Path) -> None:
    """As for a local folder: a subject is in one release, and of the other nothing is fetched."""
    subjects = sorted({str(entry.fields["subject"]) for entry in BidsSource(bucket.folder).entries()})
    done = go(tmp_path / "store", subjects=[subjects[0]], runs=1)

    assert sorted((each.n_recordings, each.n_files > 0) for each in done) == [(0, False), (1, True)]
    with pytest.raises(InputError, match="There is no subject 'nobody' among these recordings"):
        go(tmp_path / "store", subjects="nobody")


# -- on the disk -------------------------------------------------------------------------


def test_raw_files_of_two_releases_are_never_on_the_disk_together(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``delete_raw``, whenever a file comes, its own release is the only one there."""
    seen = set()

    def look(path: str, came: Path) -> None:
        there = {folder.name for folder in (tmp_path / "store.fetched").iterdir() if folder.is_dir()}
        seen.add((path.partition("/")[0], *sorted(there)))

    monkeypatch.setattr(bucket, "on_get", look)
    go(tmp_path / "store", delete_raw=True)

    assert seen == {(folder, folder) for folder in FOLDERS.values()}


def test_a_full_disk_is_told_before_the_first_byte(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both figures; what is there already is not counted."""
    needed = sum(
        (bucket.folder / path).stat().st_size
        for path in files_below(bucket.folder)
        if is_wanted(path) and path.startswith("R1")
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DoesNotFit, match=r"The disk has no room for .*R1_L100_bdf") as caught:
        go(tmp_path / "store", releases="R1")

    assert (caught.value.resource, caught.value.needed_bytes, caught.value.allowed_bytes) == (
        "disk",
        needed,
        needed - 1,
    )
    assert bucket.fetched == []


def test_a_disk_that_fills_up_meanwhile_is_not_asked_again(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at once, and with the error that a full disk gives."""

    def fill(path: str, came: Path) -> None:
        if path.endswith("participants.tsv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bucket, "on_get", fill)
    with pytest.raises(DoesNotFit, match="is full"):
        go(tmp_path / "store")
    assert bucket.fetched.count("R1_L100_bdf/participants.tsv") == 1


@pytest.mark.parametrize(
    ("number", "words", "is_named"),
    [
        (errno.EIO, os.strerror(errno.EIO), False),
        (errno.EROFS, os.strerror(errno.EROFS), False),
        (errno.EACCES, os.strerror(errno.EACCES), True),
    ],
)
def test_a_disk_that_refuses_is_not_blamed_on_the_remote(
    bucket: type[Bucket],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    words: str,
    is_named: bool,
) -> None:
    """Asked once; as s3fs words an answer that it does not know, it is the remote's, and asked again."""

    def refuse(path: str, came: Path) -> None:
        if path.endswith("participants.tsv"):
            raise OSError(number, words, str(came)) if is_named else OSError(number, words)

    monkeypatch.setattr(bucket, "on_get", refuse)
    with pytest.raises(StoreNotWritable, match=f"R1_L100_bdf cannot be written: {words}"):
        go(tmp_path / "store")
    assert bucket.fetched.count("R1_L100_bdf/participants.tsv") == 1

    words, is_named = "We encountered an internal error.", False
    if number != errno.EROFS:
        with pytest.raises(SourceError, match=r"in 4 attempts \((OSError|PermissionError): .*internal error"):
            go(tmp_path / "store")


def test_a_file_that_may_not_be_opened_is_not_asked_for(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk says so before the remote is asked."""

    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(remote, "replacing", refuse)
    with pytest.raises(StoreNotWritable, match="R1_L100_bdf cannot be written: Permission denied"):
        go(tmp_path / "store")
    assert bucket.fetched == []


@pytest.mark.parametrize(
    ("store", "fetch_to"), [("store", "store"), ("store", "store/raw"), ("all/store", "all"), ("a", "b/../a")]
)
def test_fetched_files_and_the_store_lie_apart(tmp_path: Path, store: str, fetch_to: str) -> None:
    """That is told before the remote is asked at all."""
    with pytest.raises(InputError, match=r"one lies in the other. Fetch to a folder beside the store"):
        prepare_releases("nowhere://x", tmp_path / store, fetch_to=tmp_path / fetch_to)
    assert not any(tmp_path.iterdir())


def test_only_what_was_fetched_is_deleted(bucket: type[Bucket], tmp_path: Path) -> None:
    """A file of somebody else's stays; a folder that was not fetched is refused before a byte comes."""
    go(tmp_path / "store", releases="R1")
    own = tmp_path / "store.fetched" / "R1_L100_bdf" / "sub-mine" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    (own.parent / "empty").mkdir()
    go(tmp_path / "store", releases="R1", delete_raw=True)
    assert (own.parent / "empty").is_dir()
    (own.parent / "empty").rmdir()

    assert files_below(tmp_path / "store.fetched") == {
        ".lock",
        "R1_L100_bdf.json",
        "R1_L100_bdf/sub-mine/notes.txt",
    }
    shutil.copytree(bucket.folder, tmp_path / "by hand")
    before, bucket.fetched[:] = files_below(tmp_path / "by hand"), []
    with pytest.raises(InputError, match="holds files that were not fetched by engram prepare"):
        go(tmp_path / "store", fetch_to=tmp_path / "by hand", delete_raw=True)
    assert files_below(tmp_path / "by hand") - {".lock"} == before
    assert bucket.fetched == []


# -- done before -------------------------------------------------------------------------


@pytest.mark.parametrize("delete_raw", [False, True])
def test_what_is_done_is_not_done_again(
    bucket: type[Bucket], tmp_path: Path, expected: dict[str, str], delete_raw: bool
) -> None:
    """Nothing is fetched, and the same counts and refusals are told."""
    first = go(tmp_path / "store", delete_raw=delete_raw)
    bucket.fetched.clear()
    again = go(tmp_path / "store", delete_raw=True)

    assert bucket.fetched == []
    assert [each.prepared for each in again] == [None, None]
    assert [(each.n_recordings, each.refusals) for each in again] == [
        (each.n_recordings, each.refusals) for each in first
    ]
    assert [each.deleted_bytes for each in again] == [
        0 if delete_raw else each.fetched_bytes for each in first
    ]
    assert digest(tmp_path / "store") == expected


@pytest.mark.parametrize("delete_raw", [False, True])
def test_a_remote_that_changed_is_fetched_again(
    bucket: type[Bucket], tmp_path: Path, delete_raw: bool
) -> None:
    """One byte of the same size is enough; what is on the disk as it was is kept."""
    go(tmp_path / "store", delete_raw=delete_raw)
    plain(bucket.folder, tmp_path / "plain")
    table = next(bucket.folder.glob(f"R2_L100_bdf/sub-*/eeg/*{CCD}_run-2_events.tsv"))
    table.write_text(table.read_text().replace("right_target", "other_target"))
    bucket.fetched.clear()
    first, second = go(tmp_path / "store", delete_raw=delete_raw)

    assert (first.prepared, first.n_files) == (None, 0)
    assert second.prepared is not None
    assert set(second.prepared.changed.values()) == {"its files changed"}
    changed = table.relative_to(bucket.folder).as_posix()
    assert (set(bucket.fetched) == {changed}) is (not delete_raw)
    assert changed in bucket.fetched
    assert digest(tmp_path / "store") == plain(bucket.folder, tmp_path / "plain")


def test_a_file_that_left_the_remote_leaves_the_disk(bucket: type[Bucket], tmp_path: Path) -> None:
    """Else a store would depend on what an earlier call had fetched; other tasks' files stay."""
    go(tmp_path / "store", tasks="RestingState")
    go(tmp_path / "store")
    table = next(bucket.folder.glob(f"R1_L100_bdf/sub-*/eeg/*{CCD}_run-2_events.tsv"))
    table.unlink()
    go(tmp_path / "other", fetch_to=tmp_path / "store.fetched")

    folder = tmp_path / "store.fetched"
    assert files_below(folder) - {".lock", "R1_L100_bdf.json", "R2_L100_bdf.json"} == files_below(
        bucket.folder
    )
    assert digest(tmp_path / "other") == plain(bucket.folder, tmp_path / "plain")


def test_a_store_that_is_gone_is_prepared_anew(
    bucket: type[Bucket], tmp_path: Path, expected: dict[str, str]
) -> None:
    """The record beside the files is believed only as far as the store holds what it says."""
    go(tmp_path / "store", delete_raw=True)
    shutil.rmtree(tmp_path / "store")
    go(tmp_path / "store", delete_raw=True)

    assert digest(tmp_path / "store") == expected


@pytest.mark.parametrize("delete_raw", [False, True])
def test_refused_recordings_are_tried_again(bucket: type[Bucket], tmp_path: Path, delete_raw: bool) -> None:
    """Without the record if the files are gone; else where they lie, and nothing comes again."""
    options: dict[str, Any] = {"releases": "R2", "delete_raw": delete_raw}
    (first,) = go(tmp_path / "store", **options)
    folder = tmp_path / "store.fetched" / "R2_L100_bdf"
    if delete_raw:
        folder.with_name("R2_L100_bdf.json").unlink()
        (again,) = go(tmp_path / "store", **options)
        assert again.prepared is not None
        assert again.n_files == first.n_files
        tried = again.prepared
    else:
        tried = prepare(BidsSource(folder, tasks=CCD), tmp_path / "store", steps=[HighPass(1.0)])
        (again,) = go(tmp_path / "store", **options)
        assert (again.prepared, again.n_files) == (None, 0)
    assert [refusal.reason for refusal in tried.refusals] == ["unreadable"]


def test_other_steps_prepare_again_or_are_refused_before_a_byte_comes(
    bucket: type[Bucket], tmp_path: Path
) -> None:
    """A store of one release may be prepared otherwise; of two, one would keep the old steps."""
    go(tmp_path / "store", releases="R1", delete_raw=True)
    (again,) = go(tmp_path / "store", releases="R1", steps=[HighPass(2.0)], delete_raw=True)
    assert again.prepared is not None
    assert again.prepared.n_prepared == 4

    go(tmp_path / "store", releases="R2", steps=[HighPass(2.0)], delete_raw=True)
    bucket.fetched.clear()
    with pytest.raises(InputError, match="prepared with other steps or precision"):
        go(tmp_path / "store")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        go(tmp_path / "file")
    assert bucket.fetched == []


def test_another_process_that_fetches_is_told(bucket: type[Bucket], tmp_path: Path) -> None:
    """Two writers of one file would spoil it."""
    going = prepare_releases(URL, tmp_path / "store", tasks=CCD)
    next(going)
    with pytest.raises(StoreLocked, match="Another process fetches into"):
        go(tmp_path / "other", fetch_to=tmp_path / "store.fetched")
    going.close()  # type: ignore[attr-defined]
    go(tmp_path / "other", fetch_to=tmp_path / "store.fetched")


def test_damage_of_what_was_written_keeps_what_was_fetched(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies is found before the only other copy is deleted."""

    def spoil(*arguments: Any, **options: Any) -> Any:
        prepared = prepare(*arguments, **options)
        part = next((tmp_path / "store" / "parts").glob("*/*/c/0/0"))
        data = bytearray(part.read_bytes())
        data[0] ^= 1
        part.write_bytes(data)
        return prepared

    monkeypatch.setattr(releases_module, "prepare", spoil)
    with pytest.raises(StoreDamaged, match="store is damaged in 1 files, such as parts/0000-00000-eeg-"):
        go(tmp_path / "store", delete_raw=True)
    assert {path for path in files_below(tmp_path / "store.fetched") if "/" in path} == set(bucket.fetched)


# -- in transit --------------------------------------------------------------------------


def spoiling(n_times: int, spoil: Callable[[Path], None]) -> tuple[Callable[..., None], list[str]]:
    """Spoil the first file that ends in ``run-1_eeg.bdf`` this many times."""
    spoiled: list[str] = []
    lock = threading.Lock()

    def on_get(path: str, came: Path) -> None:
        with lock:
            if path.endswith("run-1_eeg.bdf") and spoiled.count(path) == len(spoiled) < n_times:
                spoiled.append(path)
                spoil(came)

    return on_get, spoiled


def cut(path: Path) -> None:
    """Lose the end."""
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    """Change a byte."""
    path.write_bytes(b"?" + path.read_bytes()[1:])


def fail(path: Path) -> None:
    """Break off as a network does."""
    raise ConnectionResetError("connection reset by peer")


@pytest.mark.parametrize("spoil", [cut, garble, fail])
def test_what_is_spoiled_in_transit_is_fetched_again(
    bucket: type[Bucket],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, str],
    spoil: Callable[[Path], None],
) -> None:
    """Three times; the store is as if nothing had been."""
    on_get, spoiled = spoiling(3, spoil)
    monkeypatch.setattr(bucket, "on_get", on_get)
    go(tmp_path / "store")

    assert len(spoiled) == 3
    assert bucket.fetched.count(spoiled[0]) == 4
    assert digest(tmp_path / "store") == expected


def test_what_never_comes_whole_is_named_and_the_rest_is_kept(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """Four attempts; once the network is better, the same call fetches what is missing."""
    on_get, spoiled = spoiling(4, cut)
    monkeypatch.setattr(bucket, "on_get", on_get)
    with pytest.raises(
        SourceError, match=r"could not be fetched in 4 attempts \(SourceError: [0-9]+ bytes came"
    ) as caught:
        go(tmp_path / "store")

    assert f"{URL}/{spoiled[0]}" in str(caught.value)
    kept = {path for path in files_below(tmp_path / "store.fetched") if "/" in path}
    assert spoiled[0] not in kept
    assert all(not path.endswith(".tmp") for path in kept)
    bucket.fetched.clear()
    go(tmp_path / "store", releases=["R1"])
    assert kept.isdisjoint(bucket.fetched)
    go(tmp_path / "store")
    assert digest(tmp_path / "store") == expected


# -- real servers, real processes --------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """A web server of a folder, as Python brings it, that can be held."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.requested: list[str] = []
        self.hold_at: Callable[[str], bool] = lambda path: False
        self.holding, self.go_on = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Notes what is fetched, and stops in the middle of a file that is to be held."""

    server: Server

    def copyfile(self, source: Any, outputfile: Any) -> None:
        path = self.path.strip("/")
        if not hasattr(source, "name"):  # a listing of a folder, made in memory
            super().copyfile(source, outputfile)
            return
        self.server.requested.append(path)
        data = source.read()
        outputfile.write(data[: len(data) // 2])
        outputfile.flush()
        if self.server.hold_at(path):
            self.server.holding.set()
            self.server.go_on.wait(60)
        outputfile.write(data[len(data) // 2 :])

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """A client that is killed hangs up."""
        with contextlib.suppress(ConnectionError):
            super().handle()


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    """A web server of the corpus."""
    with Server(corpus) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


def start(server: Server, store: Path, *options: str) -> subprocess.Popen[bytes]:
    """Begin ``engram prepare`` in a process of its own."""
    command = ["prepare", server.url, str(store), "--task", CCD, "--high-pass", "1", "--delete-raw", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "engram", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(server: Server, store: Path) -> str:
    """Run it to its end; give what it says."""
    with start(server, store) as process:
        told, said = process.communicate()
    assert process.returncode == 0, said.decode()
    return told.decode()


def test_a_web_server_does_as_well(server: Server, tmp_path: Path, expected: dict[str, str]) -> None:
    """Files have no ETag there, only a size and a time of change; and each is fetched once."""
    told = finish(server, tmp_path / "store").splitlines()

    assert digest(tmp_path / "store") == expected
    wanted = {path for path in server.requested if not path.endswith("/")}
    assert all(is_wanted(path) for path in wanted)
    assert told[0].startswith("R1_L100_bdf: 22 files (")
    assert "3 recordings in the store, 3 of them new, 1 refused, " in told[1]
    assert "(unreadable)" in told[2]
    assert told[3].startswith("2 releases: ")
    assert told[3].endswith("1 refused (1 unreadable)")


@pytest.mark.slow
@pytest.mark.parametrize("release", FOLDERS.values())
def test_a_kill_while_a_file_comes_is_gone_on_from(
    server: Server, tmp_path: Path, expected: dict[str, str], release: str
) -> None:
    """SIGKILL with half a recording on the disk: it comes again, what had come does not."""
    server.hold_at = lambda path: path.startswith(release) and path.endswith("run-2_eeg.bdf")
    process = start(server, tmp_path / "store")
    assert server.holding.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.go_on.set()
    kept = {path for path in files_below(tmp_path / "store.fetched") if "/" in path}
    assert any(path.endswith("run-2_eeg.bdf.tmp") for path in kept)
    server.hold_at = lambda path: False
    server.requested.clear()
    finish(server, tmp_path / "store")

    asked = {
        path for path in server.requested if path.count("/") > 1
    }  # what is at the top tells of a dataset
    assert kept.isdisjoint(asked)
    assert {path.partition("/")[0] for path in asked} >= {release}
    assert release == "R1_L100_bdf" or "R1_L100_bdf" not in {path.partition("/")[0] for path in asked}
    assert digest(tmp_path / "store") == expected
    assert verify(tmp_path / "store").is_sound
    assert not any("/" in path for path in files_below(tmp_path / "store.fetched"))


MOMENTS = {
    "prepared": "building/*.tmp/*/*/c/0/0",
    "committed": "manifest.json",
    "appended": "building/0001-*.tmp/*/*/c/0/0",
}
"""What stands in the store's folder when it is killed."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_release_is_prepared_or_deleted_is_gone_on_from(
    server: Server, tmp_path: Path, expected: dict[str, str], moment: str
) -> None:
    """SIGKILL once what is looked for stands on the disk; to the same bytes, and nothing raw is left."""
    store = tmp_path / "store"
    for _ in range(10):
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(tmp_path / "store.fetched", ignore_errors=True)
        process = start(server, store)
        while process.poll() is None and not next(store.glob(MOMENTS[moment]), None):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            break
    assert process.returncode == -signal.SIGKILL
    finish(server, store)

    assert digest(store) == expected
    assert verify(store).is_sound
    assert not any("/" in path for path in files_below(tmp_path / "store.fetched"))


# -- what is asked for -------------------------------------------------------------------


def test_a_path_is_not_fetched_from(corpus: Path, tmp_path: Path) -> None:
    """A local folder is prepared where it lies; nothing of it is ever deleted."""
    with pytest.raises(InputError, match=r"is no URL. Hand a local folder to engram.prepare"):
        prepare_releases(str(corpus), tmp_path / "store", delete_raw=True)


DONE = {"files": {}, "steps": "", "recordings": {}, "refusals": []}


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {"url": "", "fetched": {}},
        {"url": "", "fetched": None, "done": {}},
        {"url": 1, "fetched": {}, "done": {}},
        {"url": "", "fetched": {"a": [1]}, "done": {}},
        {"url": "", "fetched": {"a": ["1", ""]}, "done": {}},
        {"url": "", "fetched": {"../mine.txt": [4, ""]}, "done": {}},
        {"url": "", "fetched": {"/mine.txt": [4, ""]}, "done": {}},
        {"url": "", "fetched": {}, "done": []},
        {"url": "", "fetched": {}, "done": {**DONE, "recordings": None}},
        {"url": "", "fetched": {}, "done": {**DONE, "refusals": [{"id": "a"}]}},
        {"url": "", "fetched": {}, "done": {**DONE, "refusals": [1]}},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_read_says_what_to_do(
    bucket: type[Bucket], tmp_path: Path, told: object
) -> None:
    """Nothing is deleted on its word."""
    (tmp_path / "store.fetched").mkdir()
    mine = tmp_path / "store.fetched" / "mine.txt"
    mine.write_text("mine")
    record = tmp_path / "store.fetched" / "R1_L100_bdf.json"
    for text in ("{", json.dumps(told)):
        record.write_text(text)
        with pytest.raises(InputError, match=r"R1_L100_bdf.json is damaged. Remove it, and "):
            go(tmp_path / "store", delete_raw=True)
    assert mine.exists()
    assert bucket.fetched == []
