"""prepare_releases: from datasets behind a URL to a store, one release on the disk at a time.

The order of work is: find the releases and list them, then for each fetch what the filters
want, prepare it, verify what was written, and on request delete what was fetched. A record
beside the fetched files tells what is there and what is done, so that the same call goes on
wherever it was stopped. How a remote is asked is in ``engram.recordings.remote``; how
recordings become a store is in ``ingest``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from engram.atomic import replacing
from engram.errors import DoesNotFit, InputError, StoreDamaged, StoreLocked
from engram.preparation.fingerprint import steps_hash
from engram.preparation.ingest import (
    PART_BYTES,
    Prepared,
    Progress,
    make_recipe,
    prepare,
    refuse_mixture,
    stored_fingerprints,
)
from engram.recordings.bids import BidsSource, Wanted
from engram.recordings.recording import Refusal
from engram.recordings.remote import (
    RemoteFile,
    RemoteRoot,
    choose_roots,
    fetch,
    find_roots,
    is_url,
    leads_out,
)
from engram.store.format import LOCK
from engram.store.reader import Store
from engram.store.verify import verify
from engram.store.writer import disk_errors, locked

__all__ = ["PreparedRelease", "prepare_releases"]


@dataclass(frozen=True, slots=True)
class PreparedRelease:
    """What became of one release."""

    name: str
    """Name of its folder, such as ``"R1_L100_bdf"``."""
    n_files: int
    """Files that this call fetched."""
    fetched_bytes: int
    """Their bytes."""
    deleted_bytes: int
    """Bytes of fetched files that this call deleted."""
    n_recordings: int
    """Recordings of this release that the store holds."""
    refusals: tuple[Refusal, ...]
    """Recordings of it that were left out, with the reason."""
    prepared: Prepared | None
    """What ``prepare`` did; None where an earlier call had done all, or the filters want nothing of it."""


def prepare_releases(
    url: str,
    store: str | Path,
    *,
    releases: str | Sequence[str] | None = None,
    subjects: int | str | Sequence[str] | None = None,
    sessions: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
    runs: int | str | Sequence[int | str] | None = None,
    datatype: str = "eeg",
    mini: bool = False,
    fetch_to: str | Path | None = None,
    delete_raw: bool = False,
    steps: Sequence[Any] | Mapping[str, Sequence[Any]] = (),
    precision: str | Mapping[str, str] = "default",
    memory: int | str | None = None,
    n_jobs: int | None = None,
    part_bytes: int | str = PART_BYTES,
    fetch_progress: Callable[[int, int], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[PreparedRelease]:
    """Prepare BIDS datasets behind a URL into a store, release by release.

    Called again after it was stopped, it goes on: files that have come are not fetched
    again, nor is anything of a release that is in the store, unless the remote's listing,
    the filters, steps or precision have changed since.

    Parameters
    ----------
    url
        ``s3://`` (public buckets), ``https://``, ``file://`` or any other that fsspec opens: a
        BIDS dataset, or the folder above several.
    store
        Folder of the store; made if it is not there, added to if it is.
    releases
        Names of releases, such as "R5", in the order in which to prepare them; None for all.
        They are known from the names of the datasets' folders.
    subjects, sessions, tasks, runs, datatype
        As in ``BidsSource``, over all these releases together.
    mini
        Take the small variants that HBN-EEG has (``R1_mini_L100_bdf``); where there is none, the
        first 20 subjects of a release.
    fetch_to
        Folder for fetched files, outside the store, which holds nothing else; None for one
        beside the store, named like it with ``.fetched``.
    delete_raw
        Delete what was fetched of a release as soon as it is prepared and verified.
    steps, precision, memory, n_jobs, part_bytes, progress
        As in ``prepare``.
    fetch_progress
        Called with bytes that have come and bytes in all of a release, after every file.

    Yields
    ------
    PreparedRelease
        One for each release, when it is done.

    Raises
    ------
    InputError
        If a release or a filter names what is not there, the URL cannot be listed, two datasets
        hold the same recording, ``fetch_to`` holds other files or the store, or lies in it, or
        the store holds other recordings with other steps.
    MissingExtra
        If the library for this kind of URL is not installed.
    SourceError
        If a file could not be fetched as it was listed.
    DoesNotFit
        If the disk has no room for a release, before its first byte is fetched.
    StoreDamaged
        If what was written is not read back; what was fetched is kept.
    StoreLocked
        If another process fetches into this folder.

    Other errors are those of ``prepare``.
    """
    if not is_url(url):
        raise InputError(f"{url} is no URL. Hand a local folder to engram.prepare.")
    root, recipe = Path(store).absolute(), make_recipe(steps, precision)
    folder = root.with_name(f"{root.name}.fetched") if fetch_to is None else Path(fetch_to).absolute()
    _check_apart(folder, root)
    source = BidsSource(Path(), subjects, sessions, tasks, runs, datatype=datatype, mini=mini)
    names = [releases] if isinstance(releases, str) else releases
    datasets = choose_roots(find_roots(url), names, mini=mini)
    listings = {dataset.name: dataset.listing() for dataset in datasets}
    wanted = source.wanted(listings)
    # What is listed of millions of files is not held while releases are prepared.
    files = {each.name: each.look_at(listings.pop(each.name), wanted[each.name].files) for each in datasets}

    def prepare_folder(release: _Release) -> Prepared:
        filters: Mapping[str, Any] = release.wanted.filters
        fetched = BidsSource(release.folder, datatype=datatype, **filters)
        return prepare(
            fetched, root, steps=steps, precision=precision, memory=memory, n_jobs=n_jobs,
            part_bytes=part_bytes, progress=progress,
        )  # fmt: skip

    def in_turn() -> Iterator[PreparedRelease]:
        with locked(root):
            pass  # a folder that prepare would refuse is refused before anything is fetched
        with _locked(folder):
            for dataset in datasets:
                hashed = steps_hash(recipe.settings(), recipe.precision)
                name = dataset.name
                release = _Release(dataset, wanted[name], folder / name, root, hashed, files.pop(name))
                yield _do(release, prepare_folder, fetch_progress, delete_raw=delete_raw)

    return in_turn()


def _check_apart(folder: Path, store: Path) -> None:
    one, other = folder.resolve(), store.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InputError(
            f"{folder} is the store {store}, or one lies in the other. Fetch to a folder beside the store."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process from writing the same files; the kernel lets go if we are killed."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreLocked(
                f"Another process fetches into {folder}. Wait until it has finished."
            ) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Release:
    """One release: what is wanted of it, where it comes to, and where it goes."""

    remote: RemoteRoot
    wanted: Wanted
    folder: Path
    store: Path
    steps: str
    files: Sequence[RemoteFile]

    @property
    def stamps(self) -> _Stamps:
        return {file.path: [file.size_bytes, file.tag] for file in self.files}

    def stored(self) -> dict[str, str]:
        """Give the recordings of this release that the store holds, with their fingerprints."""
        stored = stored_fingerprints(self.store)
        return {key: str(stored[key]) for key in sorted(self.wanted.ids & stored.keys())}


_Stamps = dict[str, list[Any]]
"""Path -> size and tag, as JSON has them."""


@dataclass(slots=True)
class _Record:
    """What this program put into a release's folder, and what it has done with it."""

    path: Path
    url: str
    fetched: _Stamps = field(default_factory=dict)
    """Files that are there, or were about to come when it was stopped."""
    done: dict[str, Any] = field(default_factory=dict)
    """Once prepared and verified: the files and steps of it, the recordings stored, the refusals."""

    @classmethod
    def load(cls, release: _Release) -> _Record:
        """Load what an earlier call left.

        Raises
        ------
        InputError
            If it cannot be read, or is none that this program writes.
        """
        path = release.folder.with_name(f"{release.folder.name}.json")
        if not path.exists():
            return cls(path, release.remote.url)
        try:
            told = json.loads(path.read_bytes())
        except ValueError:
            told = None
        if not _is_record(told):
            raise InputError(f"{path} is damaged. Remove it, and {release.folder}.")
        return cls(path, told["url"], told["fetched"], told["done"])

    def save(self) -> None:
        with replacing(self.path) as file:
            told = {"url": self.url, "fetched": self.fetched, "done": self.done}
            file.write(json.dumps(told, indent=1).encode())

    def says_done(self, release: _Release) -> bool:
        """Tell whether all of this was done, and the store still holds what came of it."""
        then = (self.url, self.done.get("files"), self.done.get("steps"), self.done.get("recordings"))
        return then == (release.remote.url, release.stamps, release.steps, release.stored())

    def renew(self, release: _Release) -> list[RemoteFile]:
        """Delete files that the remote has otherwise by now; give those that have to come.

        Raises
        ------
        InputError
            If a file of somebody else's is where one has to come.
        """
        stamps = release.stamps
        if any((release.folder / path).exists() for path in stamps.keys() - self.fetched.keys()):
            raise InputError(
                f"{release.folder} holds files that were not fetched by engram prepare. Name another "
                "folder to fetch to, or prepare this one as it is."
            )
        is_same = self.url == release.remote.url
        listed: Collection[str] = stamps.keys()
        if (
            is_same and self.fetched.keys() - stamps.keys()
        ):  # fetched with other filters, and kept if still listed
            listed = release.remote.listing().keys()
        for path, stamp in [*self.fetched.items()]:
            if not is_same or path not in listed or stamps.get(path, stamp) != stamp:
                _remove(release.folder, path)
                del self.fetched[path]
        self.url, self.done = release.remote.url, {}
        self.fetched.update(stamps)
        self.save()
        return [file for file in release.files if _size_of(release.folder / file.path) != file.size_bytes]

    def delete(self, folder: Path) -> int:
        """Delete what was fetched, and nothing else; give its bytes."""
        deleted_bytes = sum(_remove(folder, path) for path in self.fetched)
        self.fetched = {}
        self.save()
        return deleted_bytes


def _is_record(told: Any) -> bool:
    """Tell whether this is what ``_Record.save`` writes, with no path that leads out of the folder."""
    match told:
        case {"url": str(), "fetched": fetched, "done": dict() as done} if _are_stamps(fetched):
            refusals = done.get("refusals")
            return not done or (
                _are_texts(done.get("recordings"))
                and isinstance(refusals, list)
                and all(_are_texts(each) and each.keys() == {"id", "reason", "detail"} for each in refusals)
            )
    return False


def _are_stamps(told: Any) -> bool:
    return isinstance(told, dict) and all(
        isinstance(stamp, list) and [type(each) for each in stamp] == [int, str] and not leads_out(path)
        for path, stamp in told.items()
    )


def _are_texts(told: Any) -> bool:
    return isinstance(told, dict) and all(isinstance(text, str) for text in told.values())


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _remove(folder: Path, name: str) -> int:
    """Remove a file, what a kill left of it while it came, and folders left empty; give its bytes."""
    path = folder / name
    size_bytes = _size_of(path) or 0
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
    for place in PurePosixPath(name).parents:
        with suppress(OSError):  # it holds other files
            (folder / place).rmdir()
    return size_bytes


def _do(
    release: _Release,
    prepare_folder: Callable[[_Release], Prepared],
    told: Callable[[int, int], None] | None,
    *,
    delete_raw: bool,
) -> PreparedRelease:
    """Fetch, prepare, verify and delete one release, or what of that is left to do."""
    record, missing, prepared, deleted_bytes = _Record.load(release), [], None, 0
    if release.files and not record.says_done(release):
        stored = stored_fingerprints(release.store)
        others = {key: stored[key] for key in stored.keys() - release.wanted.ids}
        refuse_mixture(release.store, others, release.steps)
        with disk_errors(release.folder):
            missing = record.renew(release)
            _check_room(release, missing)
            _fetch(release, missing, told)
        prepared = prepare_folder(release)
        _verify(release)
        record.done = {
            "files": release.stamps,
            "steps": release.steps,
            "recordings": release.stored(),
            "refusals": [asdict(refusal) for refusal in prepared.refusals],
        }
    with disk_errors(release.folder):
        if prepared is not None:
            record.save()
        if delete_raw and record.fetched:
            deleted_bytes = record.delete(release.folder)
    done = record.done if release.files else {}
    return PreparedRelease(
        name=release.remote.name,
        n_files=len(missing),
        fetched_bytes=sum(file.size_bytes for file in missing),
        deleted_bytes=deleted_bytes,
        n_recordings=len(done.get("recordings", {})),
        refusals=tuple(Refusal(**each) for each in done.get("refusals", ())),
        prepared=prepared,
    )


def _check_room(release: _Release, missing: Sequence[RemoteFile]) -> None:
    needed = sum(file.size_bytes for file in missing)
    free = shutil.disk_usage(release.folder.parent).free
    if needed > free:
        raise DoesNotFit(
            f"The disk has no room for {release.folder}. Free some, or fetch to another disk",
            resource="disk",
            needed_bytes=needed,
            allowed_bytes=free,
        )


def _fetch(release: _Release, missing: Sequence[RemoteFile], told: Callable[[int, int], None] | None) -> None:
    done_bytes, all_bytes = 0, sum(file.size_bytes for file in missing)

    def tell(size_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += size_bytes
        if told is not None:
            told(done_bytes, all_bytes)

    fetch(release.remote, missing, release.folder, tell)


def _verify(release: _Release) -> None:
    """Read back every file that holds recordings of this release."""
    store = Store(release.store)
    ids = release.wanted.ids
    numbers = (call.number for call in store.manifest.calls)
    calls = {number for number in numbers if not ids.isdisjoint(store.fingerprints_of(number))}
    found = verify(release.store, calls=calls)
    if not found.is_sound:
        damage = found.damages[0]
        raise StoreDamaged(
            f"{release.store.name} is damaged in {len(found.damages)} files, such as {damage.path}: "
            f"{damage.where}. What was fetched is kept in {release.folder}: prepare it into a new store."
        )
