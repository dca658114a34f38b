"""Opening a store: its tables, where samples lie, and reading them.

A store is data: nothing in it is unpickled or executed. Tables are read when they are
first asked for; of a recording that was prepared again, the last call's rows count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engram.errors import InputError, MissingExtra, StoreDamaged, StoreMissing
from engram.store.backend import Backend, Part, open_backend
from engram.store.format import BUILDING, MANIFEST, Manifest, call_folder
from engram.store.grid import Grid
from engram.store.precision import Precision, Scaling, decode
from engram.store.tables import TABLES, codes_of, numbers_of, read_table

if TYPE_CHECKING:
    from engram.batches.windows import Windows
    from engram.windows.spec import EventWindows, FixedWindows
    from engram.windows.targets import Target

__all__ = ["Extent", "Store"]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one signal of one recording lies, and what its numbers mean."""

    recording: str
    """Id of the recording."""
    part: Part
    """The part that holds it."""
    start: int
    """First sample within the part."""
    stop: int
    """One past the last sample within the part."""
    rate_hz: float
    """Samples per second."""
    start_s: float
    """Time of the first sample on the recording's clock."""
    precision: Precision
    """How values are stored; see ``engram.store.precision``."""
    layout: str | None
    """Id of its channel layout, or None where channels have no names."""

    @property
    def n_samples(self) -> int:
        """Samples of this signal in this recording."""
        return self.stop - self.start


class Store:
    """A store, open for reading.

    Parameters
    ----------
    path
        The store's folder.
    backend
        Name of the backend that reads samples: ``"zarr"`` where they lie, or ``"ram"``.

    Raises
    ------
    StoreMissing
        If there is no store.
    StoreFormatError
        If it is of another format version.
    StoreDamaged
        If the manifest is damaged.

    Notes
    -----
    May be read by several threads, after ``fork``, and in another process after pickling.
    It serves the recordings of the manifest that it opened, also while more are appended.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from engram import ArrayRecording, ArraySignal, ArraySource, prepare
    >>> x = np.arange(12, dtype="int16").reshape(6, 2)
    >>> source = ArraySource({"a": ArrayRecording({"robs": ArraySignal(x, 120.0)})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = prepare(source, f"{folder}/store").store
    ...     store.read("a", "robs", 2, 4)
    array([[4, 5],
           [6, 7]], dtype=int16)
    """

    def __init__(self, path: str | Path, backend: str = "zarr") -> None:
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            unfinished = (self.path / BUILDING).is_dir()
            remedy = (
                "Run the same prepare again to finish it."
                if unfinished
                else "Prepare it, or correct the path."
            )
            state = "is an unfinished store" if unfinished else "holds no store"
            raise StoreMissing(f"{self.path} {state} (no {MANIFEST}). {remedy}")
        self.manifest = Manifest.from_bytes(manifest.read_bytes())
        self.backend: Backend = open_backend(backend, self.path, self.manifest.files)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.recordings.num_rows} recordings)"

    @cached_property
    def recordings(self) -> pa.Table:
        """One row per recording, sorted by id: id, fingerprint, fields (all text)."""
        return self.table("recordings").sort_by("recording")

    @cached_property
    def signals(self) -> pa.Table:
        """One row per signal of a recording: part, samples, rate, start, layout, gaps."""
        return self.table("signals").sort_by([("recording", "ascending"), ("signal", "ascending")])

    @property
    def events(self) -> pa.Table:
        """One row per event: recording, onset_s, duration_s, description, further columns as text."""
        return self.table("events")

    def table(self, name: str, columns: Sequence[str] | None = None, *, is_encoded: bool = False) -> pa.Table:
        """Read a table over all calls, without the rows of recordings that were replaced.

        Parameters
        ----------
        name
            ``recordings``, ``signals``, ``events``, ``layouts``, ``scales``, ``parts``,
            ``checksums`` or ``refusals``.
        columns
            Names of the columns wanted, or None for all.
        is_encoded
            Give text as numbers of its distinct values, Arrow's dictionaries: a million events have a
            dozen descriptions.

        Raises
        ------
        InputError
            If there is no such table.
        StoreDamaged
            If it cannot be read.
        """
        if name not in TABLES:
            raise InputError(f"There is no table {name!r}. Use one of: {', '.join(TABLES)}.")
        tables = []
        stored = set(self.recordings["recording"].to_pylist()) if name == "refusals" else set()
        for call in reversed(self.manifest.calls):
            table = self._read_table(call.number, name, columns, is_encoded=is_encoded)
            if name in ("recordings", "signals", "events", "scales"):
                if replaced := self._replaced.get(call.number):
                    is_replaced = pc.is_in(table["recording"], pa.array(replaced, pa.string()))
                    table = table.filter(pc.invert(is_replaced))
            elif name == "refusals":
                # Refused by several calls, it is refused once: the last call's words count.
                table = table.filter(
                    pc.invert(pc.is_in(table["recording"], pa.array(sorted(stored), pa.string())))
                )
                stored.update(table["recording"].to_pylist())
            tables.append(table)
        return pa.concat_tables(reversed(tables), promote_options="default")

    def fingerprints_of(self, call: int) -> dict[str, str]:
        """Give the recordings that a call stored, replaced since or not: id -> fingerprint."""
        table = self._read_table(call, "recordings", ["recording", "fingerprint"])
        return dict(zip(table["recording"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))

    def _read_table(
        self, call: int, name: str, columns: Sequence[str] | None, *, is_encoded: bool = False
    ) -> pa.Table:
        try:
            path = self.path / call_folder(call) / f"{name}.parquet"
            return read_table(path, columns, is_encoded=is_encoded)
        except StoreDamaged as error:
            if self._is_outdated():
                raise StoreDamaged(
                    f"{self.path} was prepared again since it was opened. Open it anew."
                ) from error
            raise

    def _is_outdated(self) -> bool:
        try:
            return Manifest.from_bytes((self.path / MANIFEST).read_bytes()) != self.manifest
        except (OSError, StoreDamaged):
            return False  # gone or damaged itself: not the reason looked for

    @cached_property
    def _replaced(self) -> dict[int, list[str]]:
        """Call -> its recordings that a later call has stored again."""
        replaced: dict[int, list[str]] = {}
        call_of: dict[str, int] = {}
        for call in self.manifest.calls if len(self.manifest.calls) > 1 else ():
            stored = self.fingerprints_of(call.number)
            for recording in stored.keys() & call_of.keys():
                replaced.setdefault(call_of[recording], []).append(recording)
            call_of |= dict.fromkeys(stored, call.number)
        return replaced

    @cached_property
    def _extents(self) -> dict[tuple[str, str], Extent]:
        rows = {row["part"]: row for row in self.table("parts").to_pylist()}
        parts: dict[tuple[str, str], Part] = {}
        extents = {}
        columns = ("recording", "signal", "part", "start", "stop", "rate_hz", "start_s", "layout")
        # Not as a dict per row, and one part for all its recordings: there are tens of thousands.
        for recording, signal, name, start, stop, rate_hz, start_s, layout in zip(
            *(self.signals[column].to_pylist() for column in columns), strict=True
        ):
            row = rows.get(name)
            if row is None or not 0 <= start <= stop <= row["n_samples"] or rate_hz <= 0:
                raise StoreDamaged(f"The tables contradict each other on {recording!r}. Prepare it anew.")
            part = parts.get((name, signal)) or parts.setdefault((name, signal), self._part(row, signal))
            extents[recording, part.signal] = Extent(
                recording, part, start, stop, rate_hz, start_s, row["precision"], layout
            )
        return extents

    def _part(self, row: Mapping[str, Any], signal: str) -> Part:
        grid = Grid(row["n_samples"], tuple(row["sample_shape"]), row["dtype"])
        part = Part(row["part"], signal, grid)
        stamp = self.manifest.files.get(part.file)
        if stamp is None or stamp.size_bytes != grid.file_bytes:
            raise StoreDamaged(f"The tables and {MANIFEST} contradict each other on part {part.path!r}.")
        return part

    def extents(self, signal: str) -> Iterator[Extent]:
        """Walk through every recording's extent of a signal, sorted by recording."""
        return (extent for (_, name), extent in self._extents.items() if name == signal)

    def extent(self, recording: str, signal: str) -> Extent:
        """Find where a signal of a recording lies.

        Raises
        ------
        StoreMissing
            If the store has no such recording or signal.
        """
        try:
            return self._extents[recording, signal]
        except KeyError:
            names = sorted(name for other, name in self._extents if other == recording)
            found = f"it has {', '.join(names)}" if names else "there is no such recording"
            message = f"No signal {signal!r} of recording {recording!r}: {found}. See engram inspect."
            raise StoreMissing(message) from None

    def has(self, recording: str, signal: str) -> bool:
        """Tell whether a recording is stored and has a signal."""
        return (recording, signal) in self._extents

    def channels(self, recording: str, signal: str) -> list[dict[str, Any]]:
        """List a signal's channels: name, type, unit, bad, position; empty where they have no names."""
        layout = self.extent(recording, signal).layout
        return self._layouts.get(layout, []) if layout is not None else []

    @cached_property
    def _layouts(self) -> dict[str, list[dict[str, Any]]]:
        layouts: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.table("layouts").to_pylist():
            layouts.setdefault(row["layout"], {})[row["index"]] = row
        return {key: [rows[index] for index in sorted(rows)] for key, rows in layouts.items()}

    def read(self, recording: str, signal: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read samples [start, stop) of a signal, decoded.

        Returns
        -------
        ndarray
            (stop - start, \\*sample shape): float32 in the channels' units, or the stored
            integers as they are where the precision is ``exact``.

        Raises
        ------
        StoreMissing
            If the store has no such recording or signal.
        InputError
            If the range is not within the recording.
        StoreDamaged
            If the part's file is missing or cut short.
        """
        extent = self.extent(recording, signal)
        stop = extent.n_samples if stop is None else stop
        scaling = self.scaling(recording, signal) if extent.precision == "int16" else None
        return decode(self.read_stored(extent, start, stop), extent.precision, scaling)

    def read_stored(
        self, extent: Extent, start: int, stop: int, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Read samples [start, stop) of an extent as they are stored.

        Parameters
        ----------
        extent
            Of this store.
        start, stop
            Samples relative to the recording's first.
        out
            Buffer to fill, (stop - start, \\*sample shape) of the stored dtype, or None for a new one.

        Raises
        ------
        InputError
            If the range is not within the recording, or ``out`` has another form.
        """
        if not 0 <= start <= stop <= extent.n_samples:
            raise InputError(
                f"Samples [{start}, {stop}) are not all within {extent.recording}, which has "
                f"{extent.n_samples} of {extent.part.signal!r}. Ask for a range inside it."
            )
        grid = extent.part.grid
        if out is None:
            out = np.empty((stop - start, *grid.sample_shape), grid.dtype)
        self.backend.read_into(extent.part, extent.start + start, out)
        return out

    @cached_property
    def checksums(self) -> dict[str, NDArray[np.uint32]]:
        """Path of each part -> (block,) CRC32C of its blocks: 4 bytes per 128 KiB of samples."""
        table = self.table("checksums", is_encoded=True)
        codes, parts = codes_of(table["part"])
        rows = np.lexsort((numbers_of(table["block"]), codes))
        crcs, codes = numbers_of(table["crc32c"])[rows], codes[rows]
        firsts = np.searchsorted(codes, np.arange(len(parts) + 1))
        return {parts[i]: crcs[firsts[i] : firsts[i + 1]] for i in range(len(parts))}

    def scaling(self, recording: str, signal: str) -> Scaling:
        """Give int16's map of a recording, per channel.

        Raises
        ------
        StoreMissing
            If the signal is not stored as scaled int16.
        """
        rows = self._scalings.get((recording, signal))
        if rows is None:
            raise StoreMissing(
                f"{signal!r} of {recording!r} has no scaling: it is not stored as scaled int16."
            )
        return rows

    @property
    def scales_bytes(self) -> int:
        """Bytes of int16's maps of all recordings, which are read when the first is asked for.

        A thousand more are counted for each: two arrays, a key and an entry are so many objects of Python.
        """
        maps = self._scalings.values()
        return sum(scaling.scale.nbytes + scaling.offset.nbytes + 1000 for scaling in maps)

    @cached_property
    def _scalings(self) -> dict[tuple[str, str], Scaling]:
        """Every scaling, as slices of two arrays: millions of rows would be gigabytes as dicts."""
        table = self.table("scales", ["recording", "signal", "index", "scale", "offset"], is_encoded=True)
        if table["scale"].null_count:
            table = table.filter(pc.is_valid(table["scale"]))
        (recording, recordings), (signal, signals) = codes_of(table["recording"]), codes_of(table["signal"])
        index, scale, offset = (numbers_of(table[name]) for name in ("index", "scale", "offset"))
        # As a build leaves them they are looked at where Arrow has them, and not sorted.
        goes_on = (np.diff(index) == 1) & (np.diff(recording) == 0) & (np.diff(signal) == 0)
        if not (goes_on | (index[1:] == 0)).all():
            rows = np.lexsort((index, signal, recording))
            recording, signal, index, scale, offset = (
                column[rows] for column in (recording, signal, index, scale, offset)
            )
        starts = np.flatnonzero(index == 0)
        stops = np.append(starts, len(index))[1:].tolist()
        keys = zip(recording[starts].tolist(), signal[starts].tolist(), strict=True)
        # What was read with and is no longer needed: 150 MB of 27,000 recordings with 129 channels.
        del table, recording, signal, index
        pa.default_memory_pool().release_unused()
        return {
            (recordings[i], signals[j]): Scaling(scale[start:stop], offset[start:stop])
            for (i, j), start, stop in zip(keys, starts.tolist(), stops, strict=True)
        }

    def windows(
        self,
        spec: FixedWindows | EventWindows,
        target: Target | None = None,
        *,
        same_form: bool = True,
    ) -> Windows:
        """Cut the recordings into windows, to be split, put in order and read as batches.

        Parameters
        ----------
        spec
            Which windows.
        target
            What is predicted from them, or None.
        same_form
            Refuse recordings whose signals have other channels than most have. False where
            recordings differ by nature, as units of spikes do; no batch may then mix them.

        Returns
        -------
        Windows
            They read from this store, which stays the caller's to close.

        Raises
        ------
        InputError
            If the store has no such signal, event or column.
        MissingExtra
            If torch is not installed.
        StoreDamaged
            If the tables cannot be read.
        """
        # The face of the rooms above: a person who has a store asks it for windows. Imported
        # here, so that who only reads samples needs no torch.
        try:
            from engram.batches.windows import cut_windows
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingExtra("torch", "torch") from error
        return cut_windows(self, spec, target, same_form=same_form)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file. A later read opens them again."""
        self.backend.close()
