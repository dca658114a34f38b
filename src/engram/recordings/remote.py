"""BIDS datasets behind a URL: which there are, which files they hold, and fetching some of them.

This module decides how a remote is asked, which dataset is meant by the name of a release,
and when a fetched file is the one that was listed. Which of a dataset's files are wanted
is left to ``bids.py``; what becomes of them is left to ``engram.preparation.releases``.

References
----------
An ETag is the MD5 of an object that was put in one piece and is not encrypted with a key;
what can be read without an account is not:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from engram.atomic import replacing
from engram.errors import EngramError, InputError, MissingExtra, SourceError
from engram.recordings.bids import release_in

__all__ = ["RemoteFile", "RemoteRoot", "choose_roots", "fetch", "find_roots", "is_url", "leads_out"]

_DESCRIPTION = "dataset_description.json"

_S3 = ("s3", "s3a")

_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp"}
"""What the extra ``remote`` brings for each kind of URL."""

_TAGS = ("ETag", "etag", "Content-MD5", "md5", "LastModified", "Last-Modified", "mtime", "created")
"""Where file systems of fsspec say which state of a file this is, the surest first."""

_N_REQUESTS = 8
"""Requests at once: enough to hide the time that one takes, few enough for any server."""

_WAITS_S = (1.0, 5.0, 15.0)
"""Waits before another attempt; the library below has tried a few times already."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the remote lists it."""

    path: str
    """Path below the dataset's folder."""
    size_bytes: int
    """Its size."""
    tag: str
    """What changes when its contents do: ETag, MD5 or time of change; empty if the remote tells none."""
    md5: str | None
    """MD5 of its contents in hexadecimal digits, where the remote tells it."""


@dataclass(frozen=True, slots=True)
class RemoteRoot:
    """One BIDS dataset behind a URL."""

    url: str
    """Where it is."""
    file_system: Any
    """The fsspec file system that reads it."""
    place: str
    """Its folder, as the file system names it."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.place.rpartition("/")[2]

    @property
    def release(self) -> str | None:
        """The release that the folder's name tells."""
        return release_in(self.name)

    def listing(self) -> dict[str, Mapping[str, Any]]:
        """List all files: path below the folder -> what the file system says of it.

        Raises
        ------
        InputError
            If it cannot be listed, or names a file outside itself.
        """
        with _asking(self.url):
            found = self.file_system.find(self.place, detail=True)
            self.file_system.invalidate_cache()  # which else keeps all of it
        inside = f"{self.place}/"
        names = (name for name in sorted(found) if name.startswith(inside))
        # A name that ends with a slash is an empty object by which some tools mark a folder.
        listing = {name.removeprefix(inside): found[name] for name in names if not name.endswith("/")}
        for path in listing:
            if leads_out(path):
                raise InputError(f"{self.url} lists {path!r}, which is not in it. Fetch it by hand.")
        return listing

    def look_at(self, listing: Mapping[str, Mapping[str, Any]], paths: Sequence[str]) -> list[RemoteFile]:
        """Give files of a listing, with one more request for each whose size it does not tell.

        Raises
        ------
        InputError
            If a file cannot be looked at, or the remote does not tell its size.
        """

        def look(path: str) -> RemoteFile:
            info = listing[path]
            if info.get("size") is None:
                with _asking(f"{self.url}/{path}"):
                    info = self.file_system.info(f"{self.place}/{path}")
            if info.get("size") is None:
                raise InputError(f"{self.url}/{path} has no size. Fetch the dataset by other means.")
            tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
            return RemoteFile(path, int(info["size"]), tag, _md5(self.url, info))

        with ThreadPoolExecutor(_N_REQUESTS, "engram-look") as pool:
            return list(pool.map(look, paths))


def is_url(text: str) -> bool:
    """Tell a URL from a path.

    Examples
    --------
    >>> is_url("s3://nmdatasets/NeurIPS25"), is_url("corpus/R1_L100_bdf")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def leads_out(path: str) -> bool:
    """Tell whether a path, joined to a folder, may name something else than a file in it.

    Examples
    --------
    >>> leads_out("sub-1/eeg/a.bdf"), leads_out("sub-1/../../a.bdf"), leads_out("/a.bdf")
    (False, True, True)
    """
    place = PureWindowsPath(path)  # which knows both slashes, and drives
    return bool(place.anchor) or ".." in place.parts or not place.parts


def find_roots(url: str) -> tuple[RemoteRoot, ...]:
    """Find the datasets: this folder, or the folders in it.

    Raises
    ------
    InputError
        If there is none, one has a name that no folder here can have, or the URL cannot be listed.
    MissingExtra
        If the library for this kind of URL is not installed.
    """
    url = url.rstrip("/")
    file_system, place = _open(url)
    with _asking(url):
        file_system.invalidate_cache()
        if file_system.exists(f"{place}/{_DESCRIPTION}"):
            roots = [RemoteRoot(url, file_system, place)]
        else:
            found = file_system.ls(place, detail=True)
            places = sorted(each["name"].rstrip("/") for each in found if each["type"] == "directory")
            roots = [
                RemoteRoot(f"{url}/{each.rpartition('/')[2]}", file_system, each)
                for each in places
                if file_system.exists(f"{each}/{_DESCRIPTION}")
            ]
    for root in roots:
        if root.name in ("", ".", "..") or "\\" in root.name:
            raise InputError(
                f"{root.url} is a dataset in a folder named {root.name!r}, which cannot be fetched to. "
                "Rename it there, or fetch it by hand."
            )
    if not roots:
        raise InputError(
            f"Neither {url} nor a folder in it has {_DESCRIPTION}. Give the URL of a dataset, or of the "
            "folder above several."
        )
    return tuple(roots)


def choose_roots(
    roots: Sequence[RemoteRoot], releases: Sequence[str] | None, *, mini: bool
) -> tuple[RemoteRoot, ...]:
    """Choose one dataset for each release.

    The same dataset in EEGLAB's format (``R1_L100``) is left out where it is there as BDF
    (``R1_L100_bdf``). With ``mini`` a release's small variant (``R1_mini_L100_bdf``) is
    taken where there is one; without ``mini`` only if it is all there is of the release.

    Parameters
    ----------
    roots
        What ``find_roots`` found.
    releases
        Names of releases, in the order wanted; None for all, by their number.

    Raises
    ------
    InputError
        If a release is not there, none is asked for, or several datasets are of the same release.
    """
    if releases is not None and not releases:
        raise InputError("releases=[] asks for no release. Name one or more, or give None for all.")
    names = {root.name for root in roots}
    grouped: dict[str, list[RemoteRoot]] = {}
    for root in sorted(roots, key=_by_number):
        if f"{root.name}_bdf" not in names:
            grouped.setdefault(root.release or root.name, []).append(root)
    if missing := [name for name in releases or () if name not in grouped]:
        raise InputError(f"There is no release {missing[0]!r} here. Use one of: {', '.join(grouped)}.")
    return tuple(_only(name, grouped[name], mini=mini) for name in dict.fromkeys(releases or grouped))


def _by_number(root: RemoteRoot) -> tuple[int, str]:
    return int((root.release or "R0").removeprefix("R")), root.name


def _only(name: str, roots: Sequence[RemoteRoot], *, mini: bool) -> RemoteRoot:
    small = [root for root in roots if re.search(r"(?:^|[_-])mini(?:[_-]|$)", root.name)]
    whole = [root for root in roots if root not in small]
    chosen = small if small and (mini or len(roots) == 1) else whole
    if len(chosen) != 1:
        raise InputError(
            f"{', '.join(root.name for root in chosen or roots)} are all of release {name}. "
            "Give the URL of the one that you want."
        )
    return chosen[0]


def fetch(
    root: RemoteRoot, files: Sequence[RemoteFile], folder: Path, fetched: Callable[[int], None]
) -> None:
    """Fetch files, several at a time; a file takes its name when it is whole.

    Parameters
    ----------
    root
        Where they are.
    files
        Which.
    folder
        Where to put them, under the same paths.
    fetched
        Called with a file's size when it has come.

    Raises
    ------
    SourceError
        If a file did not come as it was listed, after four attempts; others that have come stay.
    OSError
        If the disk refuses.
    """
    stopping = threading.Event()
    with ThreadPoolExecutor(_N_REQUESTS, "engram-fetch") as pool:
        coming = {pool.submit(_fetch_one, root, file, folder, stopping): file for file in files}
        try:
            for done in as_completed(coming):
                done.result()
                fetched(coming[done].size_bytes)
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_one(root: RemoteRoot, file: RemoteFile, folder: Path, stopping: threading.Event) -> None:
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait_s in (*_WAITS_S, None):
        try:
            with replacing(path) as target:
                _get(root, file, target.name)
        except SourceError as error:
            if wait_s is None or stopping.wait(wait_s):
                raise SourceError(
                    f"{root.url}/{file.path} could not be fetched in {len(_WAITS_S) + 1} attempts "
                    f"({error}). What has come is kept: run the same again."
                ) from error
        else:
            return


def _get(root: RemoteRoot, file: RemoteFile, target: str) -> None:
    """Get a file once; what is the remote's fault is a SourceError, what is this disk's goes out as it is."""
    try:
        root.file_system.get_file(f"{root.place}/{file.path}", target)
        _check(Path(target), file)
    except Exception as error:  # every file system has errors of its own
        if isinstance(error, OSError) and _is_of_disk(error, target):
            raise
        raise SourceError(f"{type(error).__name__}: {error}") from error


def _is_of_disk(error: OSError, target: str) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename == target:
        return True
    # Writing names no file; s3fs also says EIO, of answers that it does not know, in words of its own.
    return error.errno == errno.EIO and error.filename is None and error.strerror == os.strerror(errno.EIO)


def _check(path: Path, file: RemoteFile) -> None:
    """Hold what came to what was listed."""
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        raise SourceError(f"{size_bytes} bytes came, {file.size_bytes} were listed")
    if file.md5 is not None:
        with path.open("rb") as came:
            md5 = hashlib.file_digest(came, "md5").hexdigest()
        if md5 != file.md5:
            raise SourceError(f"the MD5 of what came is {md5}, {file.md5} was listed")


def _md5(url: str, info: Mapping[str, Any]) -> str | None:
    if url.partition("://")[0] in _S3:
        tag = str(info.get("ETag", "")).strip('"')
        return tag if re.fullmatch("[0-9a-f]{32}", tag) else None
    try:
        return base64.b64decode(info.get("Content-MD5", ""), validate=True).hex() or None
    except binascii.Error:
        return None


def _open(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingExtra("fsspec", "remote") from error
    scheme = url.partition("://")[0]
    try:
        # Public buckets only: without an account there is nothing of the user's to read.
        file_system, place = url_to_fs(url, **({"anon": True} if scheme in _S3 else {}))
    except ImportError as error:
        if scheme in _LIBRARIES:
            raise MissingExtra(_LIBRARIES[scheme], "remote") from error
        raise InputError(f"{url} cannot be opened: {error}.") from error
    except ValueError as error:
        raise InputError(f"{url} cannot be opened: {error}. Use s3://, https:// or file://.") from error
    return file_system, place.rstrip("/")


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Tell which URL it was that could not be asked."""
    try:
        yield
    except EngramError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise InputError(
            f"{url} cannot be listed ({type(error).__name__}: {error}). Check it, and the network."
        ) from error
