"""Recordings that are already objects in Python: arrays, MNE ``Raw``, braindecode datasets.

This module decides how such objects become entries with signals. Nothing is copied here;
pickling such a source for a job in another process copies what is in memory (an array
mapped by ``numpy.memmap`` becomes an array in memory there, an open h5py dataset cannot be
pickled at all), so large arrays are best prepared in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError, MissingExtra, SourceError
from engram.recordings.mne_raw import RawRecording
from engram.recordings.recording import (
    Channel,
    Entry,
    Events,
    Field,
    Gap,
    Recording,
    Refusal,
    Signal,
    check_range,
    read_blocks,
    signal_named,
)

if TYPE_CHECKING:
    from mne.io import BaseRaw

__all__ = [
    "ArrayRecording",
    "ArraySignal",
    "ArraySource",
    "ConcatDataset",
    "ConcatSource",
    "RawSource",
    "SliceableArray",
]

_AXES = {1: ("time",), 2: ("time", "channel"), 3: ("frame", "height", "width")}
"""Axis names by number of axes, where none are given."""


class SliceableArray(Protocol):
    """What an array must offer: NumPy's, ``numpy.memmap``, h5py's and zarr's do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis, time first."""
        ...

    @property
    def dtype(self) -> Any:
        """Element type."""
        ...

    def __getitem__(self, key: slice, /) -> Any:
        """Give samples [start, stop) of the first axis."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ArraySignal:
    """One signal of an ``ArrayRecording``: an array and its clock.

    Raises
    ------
    InputError
        If the array has no axis or does not hold numbers, or axes and channels do not fit it.
    """

    data: SliceableArray
    """Samples along the first axis, booleans or numbers: (time, channel), (frame, height, width),
    (trial, voxel), ..."""
    rate_hz: float
    """Samples per second; 1.0 for trials without a clock."""
    _: KW_ONLY
    start_s: float = 0.0
    """Time of the first sample on the recording's clock."""
    axes: tuple[str, ...] = ()
    """Axis names; time, channel or frame, height, width where none are given."""
    channels: tuple[Channel, ...] = ()
    """One per index of the last axis, or none."""
    gaps: tuple[Gap, ...] = ()
    """Stretches that were not measured, sorted."""
    bank: str | None = None
    """Name of the bank whose rows the values number."""

    def described(self, name: str) -> Signal:
        """Describe the signal without its samples."""
        shape = tuple(int(length) for length in self.data.shape)
        axes = self.axes or _AXES.get(len(shape)) or ("time", *(f"axis_{i}" for i in range(1, len(shape))))
        try:
            array = ArraySpec(shape, np.dtype(self.data.dtype).str, axes)
        except (TypeError, ValueError) as error:
            raise InputError(f"Signal {name!r}: {error}") from error
        if self.bank is not None and np.dtype(array.dtype).kind not in "iu":
            raise InputError(
                f"Signal {name!r} numbers rows of bank {self.bank!r} with {array.dtype}. Give whole numbers."
            )
        return Signal(name, array, self.rate_hz, self.start_s, self.channels, self.gaps, self.bank)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayRecording:
    """What an ``ArraySource`` is told of one recording."""

    signals: Mapping[str, ArraySignal]
    """At least one signal by its name, the main one first."""
    events: Events = field(default_factory=Events)
    """Its events, with onsets on the recording's clock."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """subject, session, age, ... as text or numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """Recordings, and banks that they share, from arrays in memory or on disk.

    Raises
    ------
    InputError
        If a name is given to both a recording and a bank, a recording has no signal, a
        signal's bank does not exist, or an array does not fit its description.

    Examples
    --------
    >>> import numpy as np
    >>> eeg = ArraySignal(np.zeros((500, 4), "float32"), rate_hz=250.0)
    >>> shown = ArraySignal(np.array([2, 0, 1]), rate_hz=1.5, bank="images")
    >>> recordings = {"s1": ArrayRecording({"eeg": eeg, "shown": shown}, fields={"subject": "1"})}
    >>> source = ArraySource(recordings, banks={"images": np.zeros((3, 8, 8), "uint8")})
    >>> [(entry.id, entry.is_bank) for entry in source.entries()]
    [('images', True), ('s1', False)]
    >>> with source.open(source.entries()[1]) as recording:
    ...     [signal.name for signal in recording.signals], recording.read("shown", 1, 3).tolist()
    (['eeg', 'shown'], [0, 1])
    """

    recordings: Mapping[str, ArrayRecording]
    """Recordings by their id."""
    banks: Mapping[str, SliceableArray] = field(default_factory=dict)
    """Arrays shared by many recordings, such as the images shown, by name."""

    def __post_init__(self) -> None:
        if both := sorted(set(self.recordings) & set(self.banks)):
            raise InputError(f"{both[0]!r} names a recording and a bank. Rename one of them.")
        for name, recording in self.recordings.items():
            if not recording.signals:
                raise InputError(f"Recording {name!r} has no signal. Give at least one, or leave it out.")
            for signal_name, signal in recording.signals.items():
                signal.described(signal_name)
                if signal.bank is not None and signal.bank not in self.banks:
                    raise InputError(
                        f"Signal {signal_name!r} of {name!r} refers to bank {signal.bank!r}. "
                        f"Give banks={{{signal.bank!r}: array}}."
                    )

    def entries(self) -> tuple[Entry, ...]:
        """List recordings and banks, sorted by id."""
        kinds = [(name, self._signals(name), name in self.banks) for name in (*self.recordings, *self.banks)]
        return tuple(
            Entry(
                id=name,
                fields=self.recordings[name].fields if not is_bank else {},
                size_bytes=sum(signal.described(each).array.n_bytes for each, signal in signals.items()),
                is_bank=is_bank,
            )
            for name, signals, is_bank in sorted(kinds, key=lambda kind: kind[0])
        )

    def refusals(self) -> tuple[Refusal, ...]:
        """Nothing is left out: what does not fit is an error when the source is made."""
        return ()

    def open(self, entry: Entry) -> Recording:
        """Open one recording, or one bank as a recording of a single signal at 1 Hz."""
        sizes = {name: int(bank.shape[0]) for name, bank in self.banks.items()}
        events = self.recordings[entry.id].events if entry.id in self.recordings else Events()
        return _OpenArrays(self._signals(entry.id), events, sizes)

    def _signals(self, name: str) -> Mapping[str, ArraySignal]:
        if name in self.banks:
            return {name: ArraySignal(self.banks[name], rate_hz=1.0)}
        return self.recordings[name].signals


class _OpenArrays:
    """Arrays as a ``Recording``; numbers of bank rows are checked as they are read."""

    def __init__(
        self, arrays: Mapping[str, ArraySignal], events: Events, bank_sizes: Mapping[str, int]
    ) -> None:
        self._arrays: Mapping[str, ArraySignal] | None = arrays
        self._events = _sorted_events(events)
        self._bank_sizes = bank_sizes
        self._signals = tuple(signal.described(name) for name, signal in arrays.items())

    @property
    def signals(self) -> tuple[Signal, ...]:
        return self._signals

    @property
    def events(self) -> Events:
        return self._events

    @property
    def whole(self) -> None:
        return None

    def read(self, signal: str, start: int, stop: int) -> NDArray[Any]:
        spec = signal_named(self._signals, signal)
        if self._arrays is None:
            raise InputError("This recording is closed. Open it again from its source.")
        check_range(spec, start, stop)
        try:
            data = np.array(self._arrays[signal].data[start:stop])
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(f"Signal {signal!r} cannot be read ({error}). Leave it out.") from error
        if spec.bank is not None and data.size:
            lowest, highest, n_rows = int(data.min()), int(data.max()), self._bank_sizes[spec.bank]
            if lowest < 0 or highest >= n_rows:
                raise SourceError(
                    f"Signal {signal!r} numbers row {lowest if lowest < 0 else highest} of bank "
                    f"{spec.bank!r}, which has {n_rows}. Give numbers from 0 to {n_rows - 1}."
                )
        return data

    def blocks(self, signal: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        return read_blocks(self, signal, max_bytes)

    def close(self) -> None:
        self._arrays = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _sorted_events(events: Events) -> Events:
    order = sorted(range(len(events)), key=lambda row: events.onset_s[row])
    return Events(
        onset_s=tuple(events.onset_s[row] for row in order),
        duration_s=tuple(events.duration_s[row] for row in order),
        description=tuple(events.description[row] for row in order),
        extras={name: tuple(column[row] for row in order) for name, column in events.extras.items()},
    )


@dataclass(frozen=True, slots=True, eq=False)
class RawSource:
    """Recordings from MNE ``Raw`` objects, which are read and never changed or closed.

    ``Raw`` objects on disk are pickled as their paths, loaded ones with all their samples.

    Raises
    ------
    InputError
        If there is no ``Raw``, or fields are given for an id that does not exist.

    Examples
    --------
    >>> import mne, numpy as np
    >>> info = mne.create_info(["Cz"], 100.0, "eeg")
    >>> source = RawSource({"s1": mne.io.RawArray(np.zeros((1, 300)), info, verbose="ERROR")})
    >>> source.entries()[0].id
    's1'
    """

    raws: Mapping[str, BaseRaw] | Sequence[BaseRaw]
    """Recordings by their id; in a sequence they are called "0", "1", ... with zeros in front."""
    fields: Mapping[str, Mapping[str, Field]] = field(default_factory=dict)
    """Fields of recordings, by their id."""

    def __post_init__(self) -> None:
        raws = self._by_id()
        if not raws:
            raise InputError("There is no recording here. Give at least one Raw.")
        if unknown := sorted(set(self.fields) - set(raws)):
            raise InputError(f"Fields are given for {unknown[0]!r}, which is no recording. Use its id.")

    def entries(self) -> tuple[Entry, ...]:
        """List the recordings, sorted by id."""
        return tuple(
            Entry(
                id=name,
                fields=self.fields.get(name, {}),
                size_bytes=_FLOAT64_BYTES * int(raw.n_times) * len(raw.ch_names),
            )
            for name, raw in sorted(self._by_id().items())
        )

    def refusals(self) -> tuple[Refusal, ...]:
        """Nothing is left out while listing."""
        return ()

    def open(self, entry: Entry) -> RawRecording:
        """Read one ``Raw``; its events are its annotations."""
        return RawRecording(self._by_id()[entry.id])

    def _by_id(self) -> Mapping[str, BaseRaw]:
        if isinstance(self.raws, Mapping):
            return self.raws
        return dict(zip(_numbers(len(self.raws)), self.raws, strict=True))


class ConcatDataset(Protocol):
    """A braindecode ``BaseConcatDataset`` of recordings, or an eegdash dataset."""

    datasets: Sequence[Any]
    """Each with ``raw`` and ``description`` (a mapping or pandas Series, or None)."""


@dataclass(frozen=True, slots=True, eq=False)
class ConcatSource:
    """Recordings of a braindecode ``BaseConcatDataset`` or an eegdash dataset, known by their attributes.

    Subject, session, task and run of the description make the ids where they tell all
    recordings apart; otherwise the recordings are numbered. Listing takes sizes from eegdash's
    records; where there is none it asks a recording for its ``Raw``, once. Opening asks the one
    recording opened.

    Raises
    ------
    InputError
        If the dataset has windows instead of continuous recordings.

    Examples
    --------
    >>> import mne, numpy as np
    >>> from types import SimpleNamespace
    >>> raw = mne.io.RawArray(np.zeros((1, 300)), mne.create_info(["Cz"], 100.0, "eeg"), verbose="ERROR")
    >>> one = SimpleNamespace(raw=raw, description={"subject": "7", "task": "rest", "age": 9.5})
    >>> ConcatSource(SimpleNamespace(datasets=[one])).entries()[0].id
    'sub-7_task-rest'
    """

    dataset: ConcatDataset
    """The dataset; its ``target_transform`` and the like play no part."""

    _by_id: Mapping[str, Any] = field(init=False, repr=False)
    """The recordings by their id, in the dataset's order."""

    def __post_init__(self) -> None:
        recordings = list(self.dataset.datasets)
        for one in recordings:
            # braindecode's EEGWindowsDataset has a Raw too, and metadata that say where the windows lie.
            if _has(one, "windows") or _has(one, "metadata") or not _has(one, "raw"):
                raise InputError(
                    f"{type(one).__name__} holds windows. Hand in the continuous recordings that they were "
                    "cut from; Engram keeps windows as an index."
                )
        object.__setattr__(self, "_by_id", dict(zip(_ids(recordings), recordings, strict=True)))

    def entries(self) -> tuple[Entry, ...]:
        """List the recordings, sorted by id."""
        return tuple(
            Entry(id=name, fields=_description_fields(one), size_bytes=_listed_bytes(name, one))
            for name, one in sorted(self._by_id.items())
        )

    def refusals(self) -> tuple[Refusal, ...]:
        """Nothing is left out while listing."""
        return ()

    def open(self, entry: Entry) -> RawRecording:
        """Read one recording's ``Raw``; its events are its annotations.

        Raises
        ------
        SourceError
            If the dataset cannot give it.
        """
        return RawRecording(_raw_of(entry.id, self._by_id[entry.id]))


def _has(one: Any, name: str) -> bool:
    """Tell whether there is an attribute, without making a property fetch what it stands for."""
    return name in getattr(one, "__dict__", {}) or hasattr(type(one), name)


def _ids(recordings: Sequence[Any]) -> list[str]:
    fields = [_description_fields(one) for one in recordings]
    ids = [
        "_".join(f"{short}-{_label(each[key])}" for key, short in _ENTITIES.items() if key in each)
        for each in fields
    ]
    return ids if len(set(ids)) == len(ids) and all(ids) else _numbers(len(ids))


def _raw_of(name: str, one: Any) -> BaseRaw:
    """Ask for a ``Raw``; whatever fails while it is fetched and read is this recording's failure."""
    try:
        raw: BaseRaw | None = one.raw
    except (MemoryError, MissingExtra):
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise SourceError(
            f"{name} cannot be read ({type(error).__name__}: {why}). Leave it out of the dataset."
        ) from error
    if raw is None:  # eegdash's on_error="skip"
        raise SourceError(f"{name} has no Raw. Leave it out of the dataset.")
    return raw


def _listed_bytes(name: str, one: Any) -> int:
    """Tell a recording's size, by eegdash's record of it if there is one."""
    record = getattr(one, "record", None) or {}
    n_times, n_channels = record.get("ntimes"), record.get("nchans")
    if not n_times or not n_channels:
        try:
            raw = _raw_of(name, one)
        except SourceError:
            return 0  # opening it tells why, and refuses this one alone
        n_times, n_channels = raw.n_times, len(raw.ch_names)
    return _FLOAT64_BYTES * int(n_times) * int(n_channels)


_ENTITIES = {"subject": "sub", "session": "ses", "task": "task", "run": "run"}
"""Fields that make an id, and how BIDS abbreviates them."""

_FLOAT64_BYTES = 8
"""What MNE takes for one value in memory."""


def _numbers(n: int) -> list[str]:
    """Give numbers with zeros in front, so that sorting keeps the order."""
    return [str(i).zfill(len(str(n - 1))) for i in range(n)]


def _label(value: Field) -> str:
    """Write a value as in an id; pandas makes 1 of a mixed row 1.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _description_fields(one: Any) -> dict[str, Field]:
    """Take a description's values as fields; missing ones (None, NaN) are left out."""
    fields: dict[str, Field] = {}
    for key, value in dict({} if one.description is None else one.description).items():
        plain = value.item() if isinstance(value, np.generic) else value
        if plain is None or plain != plain:  # noqa: PLR0124 - NaN of any type is not itself
            continue
        fields[str(key)] = plain if isinstance(plain, str | int | float) else str(plain)
    return fields
