"""Recordings: where they come from, and what one is.

``as_source`` decides which source reads what a person hands in; each source has a file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from engram.errors import InputError
from engram.recordings.bids import BidsSource
from engram.recordings.files import FileSource
from engram.recordings.objects import ArrayRecording, ArraySource, ConcatSource, RawSource
from engram.recordings.recording import Source
from engram.recordings.remote import is_url

__all__ = ["as_source"]


def as_source(given: Any, **filters: Any) -> Source:
    """Make a source of whatever a person has.

    Parameters
    ----------
    given
        A path of a BIDS dataset or of a folder of them; one or several paths of files or
        folders; a ``Raw``, several in a list, or several by name in a dict; a dict of
        ``ArrayRecording``; a braindecode or eegdash dataset; or a source, returned as it is.
    **filters
        Options of ``BidsSource`` (subjects, sessions, tasks, runs, releases, datatype, mini)
        where a BIDS dataset is given.

    Raises
    ------
    InputError
        If this is none of those, there is no such filter, or filters are given for something
        that is no BIDS dataset; or it is a URL, which has to be fetched first.

    Examples
    --------
    >>> type(as_source("pilot.bdf")).__name__
    'FileSource'
    """
    names = [each.name for each in fields(BidsSource) if each.name != "root"]
    if unknown := sorted(set(filters) - set(names)):
        raise InputError(f"There is no filter {unknown[0]!r}. Use one of: {', '.join(names)}.")
    if isinstance(given, str) and is_url(given):
        raise InputError(
            f"{given} is a URL. Prepare it with engram prepare {given} STORE, or prepare_releases of "
            "engram.preparation.releases."
        )
    if isinstance(given, str | Path) and _is_bids(Path(given)):
        return BidsSource(Path(given), **filters)
    if filters:
        raise InputError(
            f"{', '.join(sorted(filters))} can be chosen in a BIDS dataset only, not in {_brief(given)}. "
            "Leave that out, or hand in a folder with dataset_description.json."
        )
    if isinstance(given, Source):
        return given
    if hasattr(given, "datasets"):
        return ConcatSource(given)
    source = _of_one(given) or _of_many(given)
    if source is None:
        raise InputError(f"{_brief(given)} holds no recordings. Hand in a path, a Raw, or a source.")
    return source


def _of_one(given: Any) -> Source | None:
    if isinstance(given, str | Path):
        return FileSource(Path(given))
    return RawSource([given]) if _is_raw(given) else None


def _of_many(given: Any) -> Source | None:
    items = list(given.values()) if isinstance(given, Mapping) else list(given) if _is_list(given) else []
    if not items:
        return None
    if all(_is_raw(item) for item in items):
        return RawSource(given)
    if isinstance(given, Mapping):
        return ArraySource(given) if all(isinstance(item, ArrayRecording) for item in items) else None
    if not all(isinstance(item, str | Path) for item in items):
        return None
    if bids := [item for item in items if _is_bids(Path(item))]:
        raise InputError(f"{bids[0]} is a BIDS dataset in a list. Hand in the folder above.")
    return FileSource([Path(item) for item in items])


def _is_bids(path: Path) -> bool:
    """Tell whether this is a BIDS dataset, or a folder of some."""
    name = "dataset_description.json"
    return path.is_dir() and ((path / name).is_file() or any(path.glob(f"*/{name}")))


def _is_raw(given: Any) -> bool:
    """Know an MNE Raw by what it can do, so that nothing is imported to ask."""
    return hasattr(given, "get_data") and hasattr(given, "first_samp") and hasattr(given, "annotations")


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple)


def _brief(given: Any) -> str:
    return str(given) if isinstance(given, str | Path) else f"an object of type {type(given).__name__}"
