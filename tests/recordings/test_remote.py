"""Which datasets there are behind a URL, and which of them is meant."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engram.errors import InputError, MissingExtra
from engram.recordings import as_source, remote
from engram.recordings.remote import RemoteRoot, choose_roots, find_roots


def roots(*names: str) -> list[RemoteRoot]:
    """Make datasets of these names in one folder."""
    return [RemoteRoot(f"s3://b/{name}", None, f"b/{name}") for name in names]


BUCKET = roots(
    "R10_L100",
    "R10_L100_bdf",
    "R2_L100",
    "R2_L100_bdf",
    "R2_mini_L100",
    "R2_mini_L100_bdf",
    "R3_mini_L100_bdf",
)


@pytest.mark.parametrize(
    ("releases", "mini", "expected"),
    [
        (None, False, ["R2_L100_bdf", "R3_mini_L100_bdf", "R10_L100_bdf"]),
        (None, True, ["R2_mini_L100_bdf", "R3_mini_L100_bdf", "R10_L100_bdf"]),
        (["R10", "R2", "R10"], False, ["R10_L100_bdf", "R2_L100_bdf"]),
    ],
)
def test_each_release_is_one_dataset(releases: list[str] | None, mini: bool, expected: list[str]) -> None:
    """BDF rather than SET, whole or mini as asked where both are there; by number, or as asked."""
    assert [root.name for root in choose_roots(BUCKET, releases, mini=mini)] == expected


def test_a_release_that_is_not_there_names_those_that_are() -> None:
    """And two datasets of one release are named, for the user to decide."""
    with pytest.raises(InputError, match=r"There is no release 'R4' here. Use one of: R2, R3, R10."):
        choose_roots(BUCKET, ["R2", "R4"], mini=False)
    with pytest.raises(InputError, match=r"releases=\[\] asks for no release"):
        choose_roots(BUCKET, [], mini=False)
    with pytest.raises(InputError, match="R1_L100, R1_L250_bdf are all of release R1"):
        choose_roots(roots("R1_L100", "R1_L250_bdf"), None, mini=True)


def test_a_dataset_without_a_release_is_named_by_its_folder() -> None:
    """As OpenNeuro's are."""
    (chosen,) = choose_roots(roots("ds005505"), ["ds005505"], mini=False)
    assert chosen.name == "ds005505"


def test_a_folder_of_datasets_and_a_dataset_are_told_apart(tmp_path: Path) -> None:
    """By dataset_description.json; other folders are left out."""
    for name in ("R1_L100_bdf", "R2_L100_bdf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_description.json").touch()
    (tmp_path / "code").mkdir()

    assert [root.name for root in find_roots(tmp_path.as_uri())] == ["R1_L100_bdf", "R2_L100_bdf"]
    (one,) = find_roots((tmp_path / "R2_L100_bdf").as_uri() + "/")
    assert (one.name, one.release) == ("R2_L100_bdf", "R2")
    assert list(one.listing()) == ["dataset_description.json"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///nowhere/at/all", "file:///nowhere/at/all cannot be listed .FileNotFoundError"),
        ("http://127.0.0.1:1/x", "http://127.0.0.1:1/x cannot be listed .ClientConnectorError"),
        ("xyz://a", "xyz://a cannot be opened: Protocol not known: xyz. Use s3://"),
        ("gs://a", "gs://a cannot be opened: Please install gcsfs"),
    ],
)
def test_a_url_that_leads_nowhere_says_so(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked, and what came of it."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=message):
        find_roots(url)


def test_a_folder_without_a_dataset_says_so(tmp_path: Path) -> None:
    """A folder too high or too low."""
    with pytest.raises(InputError, match="nor a folder in it has dataset_description"):
        find_roots(tmp_path.as_uri())


@pytest.mark.parametrize(
    ("url", "library", "module"),
    [("s3://nmdatasets/NeurIPS25", "s3fs", "s3fs"), ("file:///x", "fsspec", "fsspec.core")],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    url: str, library: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An s3 URL alone needs s3fs."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf'{library} is not installed.*"engram\[remote\]"'):
        find_roots(url)


def test_a_url_is_no_source() -> None:
    """It has to be fetched first, and the error says by what."""
    with pytest.raises(InputError, match=r"is a URL. Prepare it with engram prepare s3://b/R1 STORE"):
        as_source("s3://b/R1")


def bucket(find: Any) -> SimpleNamespace:
    """Make a file system that lists this."""
    return SimpleNamespace(find=find, invalidate_cache=lambda: None)


@pytest.mark.parametrize(
    "path", ["sub-1/../../../eeg/x_eeg.bdf", "/etc/x_eeg.bdf", "sub-1\\..\\..\\x", "C:/x", "."]
)
def test_a_listing_that_leads_out_of_the_folder_is_refused(path: str) -> None:
    """A remote decides what is fetched, never where to on this disk."""
    lying = bucket(lambda place, detail: {f"{place}/{path}": {"size": 1}})
    with pytest.raises(InputError, match="which is not in it") as caught:
        RemoteRoot("s3://b/R1", lying, "b/R1").listing()
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "a\\..\\b", ""])
def test_a_dataset_that_is_named_as_no_folder_can_be_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be fetched to, and deleted from, a folder that is not its own."""
    lying = SimpleNamespace(
        invalidate_cache=lambda: None,
        exists=lambda path: path == f"b/{name}/dataset_description.json",
        ls=lambda place, detail: [{"name": f"b/{name}", "type": "directory"}],
    )
    monkeypatch.setattr(remote, "_open", lambda url: (lying, "b" if name else "b/"))
    with pytest.raises(InputError, match="is a dataset in a folder named") as caught:
        find_roots("s3://b")
    assert repr(name) in str(caught.value)


def test_objects_that_mark_folders_are_no_files() -> None:
    """Some tools leave them in a bucket, of no bytes, with names that end with a slash."""
    found = {name: {"size": 0} for name in ("b/R1", "b/R1/", "b/R1/sub-1/eeg/", "b/R1/README")}
    marked = bucket(lambda place, detail: found)
    assert list(RemoteRoot("s3://b/R1", marked, "b/R1").listing()) == ["README"]


def test_the_surest_sign_of_a_files_state_is_taken() -> None:
    """An ETag before a time; as MD5 only where S3 gives a plain one, else what HTTP calls MD5."""
    md5 = "d41d8cd98f00b204e9800998ecf8427e"
    infos: dict[str, dict[str, Any]] = {
        "plain": {"size": 1, "ETag": f'"{md5}"', "LastModified": "now"},
        "parts": {"size": 2, "ETag": f'"{md5}-3"'},
        "timed": {"size": 3, "mtime": 7.5},
        "bare": {"size": 4},
    }
    looked = roots("R1")[0].look_at(infos, list(infos))

    assert [(each.tag, each.md5) for each in looked] == [
        (f'"{md5}"', md5),
        (f'"{md5}-3"', None),
        ("7.5", None),
        ("", None),
    ]
    web = RemoteRoot("https://b/R1", None, "https://b/R1")
    (told,) = web.look_at({"a": {"size": 0, "Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}}, ["a"])
    assert told.md5 == md5
    sizeless = SimpleNamespace(info=lambda place: {"size": None})
    with pytest.raises(InputError, match="https://b/R1/a has no size"):
        RemoteRoot("https://b/R1", sizeless, "b").look_at({"a": {}}, ["a"])
