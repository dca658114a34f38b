"""Recordings read by MNE-Python: files of five formats, and ``Raw`` objects as they are.

This module decides which MNE reader opens which file, which files belong together, which
of MNE's warnings mean lost data (those become refusals, the others are logged), and how a
``Raw`` becomes signals, gaps and events. Where files are looked for, and what BIDS says
about them, is left to ``bids.py`` and ``files.py``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError, MissingExtra, SourceError
from engram.recordings.recording import (
    Channel,
    Entry,
    Events,
    Field,
    Gap,
    Signal,
    SourceFile,
    check_range,
    read_blocks,
    signal_named,
)

if TYPE_CHECKING:
    from mne import Annotations
    from mne.io import BaseRaw

__all__ = [
    "FORMATS",
    "Folder",
    "Format",
    "RawRecording",
    "beside",
    "first_part",
    "format_of",
    "format_problem",
    "make_entry",
    "open_entry",
    "open_raw",
    "signal_files",
    "unpacked",
]

_LOG = logging.getLogger(__name__)

MAIN_TYPE = "eeg"
"""The channel type whose samples stay float64, so that filters run in float64 as MNE's do."""

_GAP_KINDS = ("bad_acq_skip", "edge")
"""Beginnings of the annotations that MNE's filters do not reach over (``skip_by_annotation``)."""

_LOSS = re.compile(r"Invalid tag with only|FIF tag directory missing")
"""Warnings of MNE 1.13 on opening a FIF file whose end is missing."""

_PACKED = (".bz2", ".gz", ".xz", ".zip", ".zst")
"""Suffixes of compressed files, in which MNE cannot read from the middle."""

_EMBEDDED_SET_FACTOR = 4
"""MNE 1.13 holds an embedded ``.set`` whole: at its peak 3.0 times the samples of a float32 file, 2.0 to
3.0 of a float64 file (measured); the rest is for samples that are compressed in the file."""


@dataclass(frozen=True, slots=True)
class Format:
    """How recordings of one suffix are read."""

    reader: str
    """Name of the reading function in ``mne.io``."""
    companions: tuple[tuple[str, ...], ...]
    """Files beside it with the same stem: at least one of each tuple of suffixes is needed."""
    optional: tuple[str, ...]
    """Suffixes of files beside it that belong to it where they exist."""
    check: Callable[[Path, BaseRaw], None] | None
    """Refuses a damaged file that MNE reads shortened, where its warnings do not tell."""


def format_of(name: str) -> Format | None:
    """Tell the format of a file by its name, or None.

    Examples
    --------
    >>> format_of("sub-01_task-rest_eeg.bdf").reader, format_of("notes.txt")
    ('read_raw_bdf', None)
    """
    return FORMATS.get(PurePath(name).suffix.lower())


def unpacked(name: str) -> str:
    """Name what a compressed file holds; other names stay as they are.

    Examples
    --------
    >>> unpacked("a.bdf.gz"), unpacked("a.bdf")
    ('a.bdf', 'a.bdf')
    """
    path = PurePath(name)
    return path.stem if path.suffix.lower() in _PACKED else name


def format_problem(name: str) -> str:
    """Say of a recording in a format that is not read what to do with it."""
    if unpacked(name) != name:
        return f"{name} is compressed. Unpack it."
    return f"{name} is in a format that is not read here. Convert it to BDF, EDF or BrainVision."


def beside(stem: str, suffix: str, siblings: Container[str]) -> str | None:
    """Find the file of this stem and suffix, in small letters or capitals.

    Examples
    --------
    >>> beside("a", ".fdt", {"a.SET", "a.FDT"})
    'a.FDT'
    """
    return next((name for name in (stem + suffix, stem + suffix.upper()) if name in siblings), None)


def signal_files(name: str, siblings: Container[str]) -> tuple[str, ...]:
    """Name the files that hold the signal of one recording, the one to open first.

    Parameters
    ----------
    name
        File name of a known format.
    siblings
        File names in the same folder.

    Returns
    -------
    tuple of str
        File names; every one of them exists.

    Raises
    ------
    SourceError
        If a file that the format needs is missing.

    Examples
    --------
    >>> signal_files("a.vhdr", {"a.vhdr", "a.eeg", "a.vmrk", "b.eeg"})
    ('a.vhdr', 'a.eeg', 'a.vmrk')
    """
    path = PurePath(name)
    form = FORMATS[path.suffix.lower()]
    found = [name]
    for suffixes in form.companions:
        there = [other for suffix in suffixes if (other := beside(path.stem, suffix, siblings))]
        if not there:
            raise SourceError(
                f"{name} has no {path.stem}{suffixes[0]} beside it, which holds its samples. "
                "Put both files into one folder."
            )
        found += there  # which of several the header names is seen when it is opened
    found += [other for suffix in form.optional if (other := beside(path.stem, suffix, siblings))]
    if form.reader == "read_raw_fif":
        found += _later_parts(name, siblings)
    return tuple(found)


def first_part(name: str) -> str | None:
    """Name the first file of a split FIF recording if ``name`` is a later part, else None.

    Examples
    --------
    >>> first_part("a_raw-2.fif"), first_part("sub-1_split-02_meg.fif"), first_part("a_raw.fif")
    ('a_raw.fif', 'sub-1_split-01_meg.fif', None)
    """
    if match := re.fullmatch(r"(.*(?:raw|raw_sss|raw_tsss|_meg|_eeg|_ieeg))-[0-9]+(\.fif)", name):
        return match[1] + match[2]
    match = re.fullmatch(r"(.*_split-)(0*)([0-9]+)(_.*\.fif)", name)
    if match is None or int(match[3]) < 2:
        return None
    return match[1] + "1".zfill(len(match[2] + match[3])) + match[4]


@dataclass(frozen=True, slots=True)
class Folder:
    """The names in one folder, hidden ones left out, looked up once."""

    path: Path
    """Where it is."""
    sizes: Mapping[str, int | None]
    """Files with their sizes, sorted; None for a link that leads nowhere, as of a dataset of
    which only the names were fetched (``datalad``, ``git annex``)."""
    folders: tuple[str, ...]
    """Folders in it, sorted."""

    @classmethod
    def at(cls, path: Path) -> Self:
        """List a folder with one look at each file.

        Raises
        ------
        SourceError
            If it may not be listed.
        """
        sizes: dict[str, int | None] = {}
        folders: list[str] = []
        try:
            with os.scandir(path) as found:
                for item in found:
                    if item.name.startswith("."):
                        continue
                    size_bytes = _size_of(item)
                    if size_bytes is not None and item.is_dir():
                        folders.append(item.name)
                    else:
                        sizes[item.name] = size_bytes
        except OSError as error:
            raise SourceError(
                f"Folder {path.name} cannot be listed ({type(error).__name__}). Get the right to read it."
            ) from error
        return cls(path, dict(sorted(sizes.items())), tuple(sorted(folders)))

    def file(self, name: str) -> SourceFile:
        """Give a file as entries name it.

        Raises
        ------
        SourceError
            If it is a link that leads nowhere.
        """
        size_bytes = self.sizes[name]
        if size_bytes is None:
            raise SourceError(
                f"{name} is a link to a file that is not here. Fetch it, for example with datalad get."
            )
        return SourceFile(self.path / name, size_bytes)


def _size_of(item: os.DirEntry[str]) -> int | None:
    """Look at a file's size; None for a link that leads nowhere, or round in a circle."""
    try:
        return item.stat().st_size
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ELOOP}:
            return None
        raise


def make_entry(
    entry_id: str, folder: Folder, name: str, fields: Mapping[str, Field], sidecars: Sequence[str] = ()
) -> Entry:
    """Make the line of a listing for a recording that MNE reads, without opening it.

    Parameters
    ----------
    entry_id, fields
        As in ``Entry``.
    folder, name
        The file to open.
    sidecars
        Names of further files that describe the recording.

    Raises
    ------
    SourceError
        If its format is not read, or a file that belongs to it is missing.
    """
    if format_of(name) is None or name in folder.folders:
        raise SourceError(format_problem(name))
    first = first_part(name)
    if first is not None and first not in folder.sizes:
        raise SourceError(f"{name} continues {first}, which is missing. Put all parts into one folder.")
    names = signal_files(name, folder.sizes)
    files = tuple(folder.file(each) for each in (*names, *sidecars))
    embedded = PurePath(name).suffix.lower() == ".set" and len(names) == 1
    size_bytes = sum(file.size_bytes for file in files[: len(names)])
    return Entry(
        id=entry_id,
        fields=fields,
        files=files,
        size_bytes=size_bytes,
        resident_bytes=_EMBEDDED_SET_FACTOR * size_bytes if embedded else 0,
    )


def open_entry(entry: Entry) -> BaseRaw:
    """Open a listed recording as ``open_raw`` does, and hold its header to the files listed with it.

    A header may name its data otherwise than after itself. Such files would not be in the
    recording's fingerprint, and a change of them would go unseen.

    Raises
    ------
    SourceError
        If MNE reads a file that is not listed, and as ``open_raw`` raises.
    """
    head = entry.files[0].path
    raw = open_raw(head)
    listed = {file.path.resolve() for file in entry.files}
    for path in (*(Path(name) for name in raw.filenames if name), *_marker_files(head)):
        if path.resolve() in listed:
            continue
        if head.suffix.lower() == ".fif":
            raise SourceError(
                f"{head.name} goes on in {path.name}, which is not named after it. Save it again with MNE."
            )
        raise SourceError(
            f"{head.name} names {path.name}, which is not {head.stem}{path.suffix}. "
            "Rename it inside the header."
        )
    return raw


def open_raw(path: Path) -> BaseRaw:
    """Open a file with MNE's reader for its suffix, at MNE's defaults, without loading it.

    Raises
    ------
    InputError
        If the suffix is not in ``FORMATS``.
    SourceError
        If MNE cannot read it, it holds no samples, or its end is missing: fewer samples
        than its header promises are refused, never read shortened or filled with zeros.
    MissingExtra
        If MNE is not installed.
    """
    form = format_of(path.name)
    if form is None:
        raise InputError(f"{path.name} is of no known format. Use one of: {', '.join(sorted(FORMATS))}.")
    with _as_source_error(path):
        mne = _mne()
        # MNE gives its warnings to Python only while it also prints them on standard output, which
        # is not the reader's to write on: that print is caught, and the warnings are heeded below.
        with warnings.catch_warnings(record=True) as caught, mne.utils.catch_logging():
            warnings.simplefilter("always")
            raw = getattr(mne.io, form.reader)(path, preload=False, verbose="WARNING")
        if form.check is not None:
            form.check(path, raw)
    _heed(caught, path)
    if raw.n_times == 0:
        raise SourceError(f"{path.name} holds no samples. Leave it out, or fetch it again.")
    return raw


class RawRecording:
    """An MNE ``Raw`` as a ``Recording``: one signal per channel type, named by the type.

    Channels whose unit in MNE is the volt are read in microvolts, others in MNE's unit.
    ``eeg`` is float64, other types are float32. Reading leaves the ``Raw`` as it was.

    Parameters
    ----------
    raw
        Any continuous recording of MNE, in memory or on disk.
    events
        Its events, with onsets from the first sample of ``raw``; its annotations if None.

    Examples
    --------
    >>> import mne, numpy as np
    >>> info = mne.create_info(["Cz", "trigger"], 100.0, ["eeg", "stim"])
    >>> raw = mne.io.RawArray(np.ones((2, 50)), info, verbose="ERROR")
    >>> with RawRecording(raw) as recording:
    ...     [signal.name for signal in recording.signals], recording.read("eeg", 0, 2).tolist()
    (['eeg', 'stim'], [[1000000.0], [1000000.0]])
    """

    def __init__(self, raw: BaseRaw, events: Events | None = None) -> None:
        self._raw: BaseRaw | None = raw
        self._picks = _picks(raw)
        gaps = _gaps(raw)
        self._signals = tuple(_signal(raw, kind, picks, gaps) for kind, picks in self._picks.items())
        self._events = _annotation_events(raw) if events is None else events

    @property
    def signals(self) -> tuple[Signal, ...]:
        """One signal per channel type: ``eeg`` first, then as the channels come."""
        return self._signals

    @property
    def events(self) -> Events:
        """The events handed in, or the annotations with their extras as text."""
        return self._events

    @property
    def whole(self) -> BaseRaw:
        """The ``Raw`` itself.

        Raises
        ------
        InputError
            If the recording is closed.
        """
        if self._raw is None:
            raise InputError("This recording is closed. Open it again from its source.")
        return self._raw

    def read(self, signal: str, start: int, stop: int) -> NDArray[Any]:
        """Read samples [start, stop) of one signal; see ``Recording.read``."""
        spec = signal_named(self._signals, signal)
        check_range(spec, start, stop)
        if start == stop:
            return np.empty((0, *spec.array.sample_shape), spec.array.dtype)
        units = {signal: "uV"} if spec.channels[0].unit == "uV" else None
        with _as_source_error(_path(self.whole)), warnings.catch_warnings():
            # MNE only warns where it fills a FIF buffer that it cannot read with zeros, and
            # where slow EDF channels get other values at the edges of a block.
            warnings.filterwarnings("error", category=RuntimeWarning, module="mne")
            data: NDArray[Any] = self.whole.get_data(
                picks=self._picks[signal], start=start, stop=stop, units=units, verbose="WARNING"
            )
        if data.shape[1] != stop - start or np.iscomplexobj(data):
            raise SourceError(
                f"{_path(self.whole).name} gave {data.shape[1]} samples of {data.dtype} for "
                f"[{start}, {stop}) of {signal!r}. Fetch it again, or leave it out."
            )
        return data.T.astype(spec.array.dtype, copy=False)

    def blocks(self, signal: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Walk through a signal in blocks; see ``Recording.blocks``."""
        return read_blocks(self, signal, max_bytes)

    def close(self) -> None:
        """Let go of the ``Raw``. MNE opens and closes its files at every read."""
        self._raw = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _mne() -> Any:
    try:
        import mne
    except ImportError as error:
        raise MissingExtra("mne", "eeg") from error
    return mne


@contextmanager
def _as_source_error(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into one SourceError.

    MNE's readers raise what their parsing happens to meet (AssertionError, IndexError,
    UnicodeDecodeError, struct.error, ...); too little memory is no fault of the file.
    """
    try:
        yield
    except (SourceError, InputError, MissingExtra, MemoryError):
        raise
    except Exception as error:
        if _holds_epochs(path, str(error)):
            raise SourceError(
                f"{path.name} holds epochs. Hand in the continuous recording that they were cut from."
            ) from error
        raise SourceError(
            f"{path.name} cannot be read ({type(error).__name__}: {_one_line(error, path)}). "
            "Fetch it again, or leave it out."
        ) from error


def _holds_epochs(path: Path, message: str) -> bool:
    """Tell from MNE's refusal to read a Raw whether the file, FIF or .set, holds epochs."""
    if "No raw data in" in message:
        return bool(_mne().what(path) == "epochs")
    return "number of trials is" in message


def _heed(caught: list[warnings.WarningMessage], path: Path) -> None:
    """Refuse what MNE's warnings say is lost; log the others."""
    for warning in caught:
        text = _one_line(warning.message, path)
        if _LOSS.search(text):
            raise SourceError(f"{path.name} is truncated ({text}). Fetch it again, or leave it out.")
        _LOG.warning("%s: %s", path.name, text)


def _one_line(message: object, path: Path) -> str:
    """Write MNE's message on one line and without the folder: refusals are kept in stores."""
    text = str(message)
    # MNE makes names absolute, and follows links for some.
    folders = {path.parent, path.parent.absolute(), path.parent.resolve(), path.resolve().parent}
    for folder in sorted(map(str, folders - {Path()}), key=len, reverse=True):
        text = text.replace(f"{folder}{os.sep}", "")
    return " ".join(text.split())


def _path(raw: BaseRaw) -> Path:
    return Path(raw.filenames[0] or "Raw object")


# -- from Raw to Recording ---------------------------------------------------------------


def _picks(raw: BaseRaw) -> dict[str, list[int]]:
    picks: dict[str, list[int]] = {}
    for index, kind in enumerate(raw.get_channel_types()):
        picks.setdefault(kind, []).append(index)
    return dict(sorted(picks.items(), key=lambda item: item[0] != MAIN_TYPE))


def _signal(raw: BaseRaw, kind: str, picks: list[int], gaps: tuple[Gap, ...]) -> Signal:
    dtype = "float64" if kind == MAIN_TYPE else "float32"
    return Signal(
        name=kind,
        array=ArraySpec((int(raw.n_times), len(picks)), dtype, ("time", "channel")),
        rate_hz=float(raw.info["sfreq"]),
        channels=tuple(_channel(raw, kind, index) for index in picks),
        gaps=gaps,
    )


def _channel(raw: BaseRaw, kind: str, index: int) -> Channel:
    from mne.defaults import DEFAULTS

    unit = DEFAULTS["si_units"].get(kind, "")
    name = raw.ch_names[index]
    place = [float(x) for x in raw.info["chs"][index]["loc"][:3]]
    known = bool(np.all(np.isfinite(place)) and np.any(place))
    return Channel(
        name=name,
        type=kind,
        unit="uV" if unit == "V" else unit,
        position_m=(place[0], place[1], place[2]) if known else None,
        bad=name in raw.info["bads"],
    )


def _gaps(raw: BaseRaw) -> tuple[Gap, ...]:
    """Find gaps and joints by the rule of MNE's ``skip_by_annotation``; overlaps become one."""
    notes, n_times = raw.annotations, int(raw.n_times)
    chosen = [i for i, text in enumerate(notes.description) if text.lower().startswith(_GAP_KINDS)]
    onsets = notes.onset[chosen] - raw.first_time
    # As raw.time_as_index(times, use_rounding=True), which makes 8 bytes per sample to do so.
    edges = np.round(np.stack([onsets, onsets + notes.duration[chosen]], 1) * raw.info["sfreq"])
    gaps: list[Gap] = []
    for onset, end in sorted(edges.astype(int).tolist()):
        start, stop = max(onset, 0), min(end, n_times)
        if stop <= 0 or start >= n_times:  # at the very edge there is nothing to join
            continue
        if gaps and start <= gaps[-1].stop:
            gaps[-1] = Gap(gaps[-1].start, max(stop, gaps[-1].stop))
        else:
            gaps.append(Gap(start, stop))
    return tuple(gaps)


def _annotation_events(raw: BaseRaw) -> Events:
    notes = raw.annotations
    return Events(
        # Onsets count from the measurement date, or from sample 0 of the first file, where
        # there is none; ``first_time`` is the first sample on that same clock.
        onset_s=tuple((notes.onset - raw.first_time).tolist()),
        duration_s=tuple(notes.duration.tolist()),
        description=tuple(str(text) for text in notes.description),
        extras=_annotation_extras(notes),
    )


def _annotation_extras(notes: Annotations) -> dict[str, tuple[str | None, ...]]:
    keys = dict.fromkeys(key for row in notes.extras for key in row)
    columns: dict[str, list[Any]] = {key: [row.get(key) for row in notes.extras] for key in keys}
    if any(notes.ch_names):
        columns["ch_names"] = [",".join(names) or None for names in notes.ch_names]
    return {
        key: tuple(None if value is None else str(value) for value in column)
        for key, column in columns.items()
    }


# -- what MNE would read without an error ------------------------------------------------


def _check_edf(path: Path, raw: BaseRaw, *, value_bytes: int) -> None:  # noqa: ARG001 - as every Format.check
    """Compare an EDF or BDF header with the file's size.

    MNE takes the number of records from the size and warns. Fewer than the header promises
    is a truncated file. -1 says that the recorder never closed the file; whole records are
    then all there is, part of one is damage. Slow channels and interruptions are refused
    because MNE's values would depend on the block read, or its times be wrong.

    References
    ----------
    https://www.edfplus.info/specs/edf.html and https://www.edfplus.info/specs/edfplus.html
    """
    with path.open("rb") as file:
        head = file.read(256)
        n_channels = int(head[252:256])
        table = file.read(256 * n_channels)
        size_bytes = file.seek(0, 2)
    n_promised, header_bytes = int(head[236:244]), int(head[184:192])
    labels = [table[16 * i : 16 * i + 16].decode("latin-1").strip() for i in range(n_channels)]
    lengths = [int(table[216 * n_channels + 8 * i :][:8]) for i in range(n_channels)]
    record_bytes = sum(lengths) * value_bytes
    n_held, rest_bytes = divmod(max(size_bytes - header_bytes, 0), record_bytes)
    if n_held < n_promised or (n_promised < 0 and rest_bytes):
        promised = f"{n_promised} records" if n_promised >= 0 else "whole records"
        raise SourceError(
            f"{path.name} is truncated: its header promises {promised} of {record_bytes} bytes, it holds "
            f"{n_held} and {rest_bytes} bytes. Fetch it again, or leave it out."
        )
    if head[192:197] in (b"EDF+D", b"BDF+D"):
        raise SourceError(
            f"{path.name} is {head[192:197].decode()}, with interruptions that MNE reads as if there were "
            "none. Convert it to an uninterrupted file for each stretch."
        )
    rates = {n for label, n in zip(labels, lengths, strict=True) if label.lower() not in _NOT_SAMPLED}
    if len(rates) > 1:
        raise SourceError(
            f"{path.name} mixes channels of {sorted(rates)} samples per record, which MNE can bring to one "
            "rate only in memory. Hand in mne.io.read_raw(path, preload=True) instead of the path."
        )


_NOT_SAMPLED = frozenset({"edf annotations", "bdf annotations", "status", "trigger"})
"""Labels of annotation and trigger channels, whose rate does not matter (MNE's ``stim_channel='auto'``)."""


def _check_brainvision(path: Path, raw: BaseRaw) -> None:
    """Compare a BrainVision header with the size of its data file.

    MNE takes the number of samples from the size, drops a part of one, and looks for the
    channels of a vectorized file in the wrong places if its end is missing. Of a marker file
    (.vmrk) without its end nothing can be told: it states no number of markers.

    References
    ----------
    BrainVision Core Data Format 1.0: DataPoints is optional in multiplexed files.
    """
    header = path.read_bytes()
    frame_bytes = raw.info["nchan"] * _BRAINVISION_BYTES[raw.orig_format]
    size_bytes = raw.filenames[0].stat().st_size
    match = re.search(rb"^DataPoints\s*=\s*([0-9]+)", header, re.MULTILINE)
    n_promised = int(match[1]) if match else 0
    binary = re.search(rb"^DataFormat\s*=\s*ASCII", header, re.MULTILINE) is None
    if raw.n_times < n_promised or (binary and size_bytes % frame_bytes):
        raise SourceError(
            f"{raw.filenames[0].name} is truncated: {path.name} promises "
            f"{f'{n_promised} samples' if match else 'whole samples'} of {frame_bytes} bytes, it holds "
            f"{size_bytes} bytes. Fetch it again, or leave it out."
        )


def _marker_files(head: Path) -> list[Path]:
    """Find the marker file that a BrainVision header names; where it is absent, MNE takes the listed one."""
    form = format_of(head.name)
    if form is None or form.reader != "read_raw_brainvision":
        return []
    header = head.read_bytes()
    match = re.search(rb"^MarkerFile[ \t]*=[ \t]*([^\r\n]*)", header, re.MULTILINE | re.IGNORECASE)
    name = match[1].strip().decode("utf-8" if b"UTF-8" in header else "latin-1") if match else ""
    return [head.parent / name] if name and (head.parent / name).is_file() else []


_BRAINVISION_BYTES = {"short": 2, "int": 4, "single": 4, "double": 8}
"""Bytes of one value by MNE's name of a BrainVision BinaryFormat."""


def _check_eeglab(path: Path, raw: BaseRaw) -> None:
    """Compare an EEGLAB header with the size of its .fdt, which is float32 throughout.

    References
    ----------
    https://eeglab.org/tutorials/ConceptsGuide/Data_Structures.html
    """
    data_file = raw.filenames[0]
    needed_bytes = raw.n_times * raw.info["nchan"] * 4
    if data_file.suffix == ".fdt" and data_file.stat().st_size < needed_bytes:
        raise SourceError(
            f"{data_file.name} is truncated: {path.name} promises {needed_bytes} bytes, it holds "
            f"{data_file.stat().st_size}. Fetch it again, or leave it out."
        )


def _later_parts(name: str, siblings: Container[str]) -> list[str]:
    """Name the further files of a split FIF recording, by MNE's two ways of naming them."""
    path = PurePath(name)
    split = re.fullmatch(r"(.*_split-)(0*1)(_.*)", name)
    parts: list[str] = []
    while True:
        number = len(parts) + 1
        later = (
            f"{path.stem}-{number}{path.suffix}"
            if split is None
            else f"{split[1]}{str(number + 1).zfill(len(split[2]))}{split[3]}"
        )
        if later not in siblings:
            return parts
        parts.append(later)


FORMATS: dict[str, Format] = {
    ".bdf": Format("read_raw_bdf", (), (), partial(_check_edf, value_bytes=3)),
    ".edf": Format("read_raw_edf", (), (), partial(_check_edf, value_bytes=2)),
    ".fif": Format("read_raw_fif", (), (), None),
    ".set": Format("read_raw_eeglab", (), (".fdt",), _check_eeglab),
    ".vhdr": Format("read_raw_brainvision", ((".eeg", ".dat"),), (".vmrk",), _check_brainvision),
}
"""What is read, by suffix."""
