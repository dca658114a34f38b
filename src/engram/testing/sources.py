"""What every source promises, as a class of tests to inherit.

A source's own tests make a subclass with a fixture ``source``; pytest then runs every test
below against it. What a recording holds is left to the source's own tests.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engram.errors import DoesNotFit, InputError, SourceError
from engram.recordings.recording import Entry, Recording, Signal, Source, signal_named

__all__ = ["SourceConformance", "opened_files"]

_MAX_BYTES = 1 << 16
"""Block size of the reading tests: small, so that short recordings have several blocks."""


class SourceConformance:
    """Tests that every ``Source`` passes.

    Examples
    --------
    In a test module::

        class TestMySource(SourceConformance):
            @pytest.fixture
            def source(self, tmp_path):
                return MySource(tmp_path)
    """

    @pytest.fixture
    def source(self) -> Source:
        """Give a source with at least one recording; every subclass has its own."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture named source.")

    def test_entries_are_sorted_and_unique(self, source: Source) -> None:
        """Ids are unique and sorted, so that parts and windows do not depend on the file system."""
        ids = [entry.id for entry in source.entries()]
        assert ids
        assert ids == sorted(set(ids))

    def test_listing_twice_gives_the_same(self, source: Source) -> None:
        """Two listings are equal, entries and refusals."""
        assert list(source.entries()) == list(source.entries())
        assert list(source.refusals()) == list(source.refusals())

    def test_a_pickled_source_lists_the_same(self, source: Source) -> None:
        """A source that went to another process lists what it listed here."""
        travelled = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
        assert list(travelled.entries()) == list(source.entries())

    def test_fields_can_be_written_as_json(self, source: Source) -> None:
        """Fields are text or finite numbers, so that tables and fingerprints can hold them."""
        for entry in source.entries():
            fields = dict(entry.fields)
            assert json.loads(json.dumps(fields, allow_nan=False)) == fields

    def test_sizes_are_those_of_the_files(self, source: Source) -> None:
        """The files of an entry exist with the sizes listed, and the signal's are among them."""
        for entry in source.entries():
            assert [file.path.stat().st_size for file in entry.files] == [f.size_bytes for f in entry.files]
            assert not entry.files or 0 <= entry.size_bytes <= sum(file.size_bytes for file in entry.files)

    def test_refusals_say_why(self, source: Source) -> None:
        """Every refusal has a reason to count by and a sentence to read, without a folder's path."""
        for refusal in source.refusals():
            assert refusal.id
            assert refusal.reason
            assert refusal.detail.endswith(".")
            assert not [folder for folder in _folders(source) if folder in refusal.detail]

    def test_listing_opens_no_file_of_a_recording(self, source: Source) -> None:
        """Listing costs a look at names and sizes, whatever the recordings hold."""
        files = {str(file.path) for entry in source.entries() for file in entry.files}
        with opened_files() as opened:
            source.entries()
            source.refusals()
        assert not files & set(opened)

    def test_signals_are_described_and_named_once(self, source: Source) -> None:
        """Every recording has at least one signal; names differ; gaps are sorted and inside."""
        for _, recording in _recordings(source):
            names = [signal.name for signal in recording.signals]
            assert names
            assert len(set(names)) == len(names)
            for signal in recording.signals:
                edges = [edge for gap in signal.gaps for edge in (gap.start, gap.stop)]
                assert edges == sorted(edges)
                assert not edges or (edges[0] >= 0 and edges[-1] <= signal.n_samples)

    def test_blocks_make_the_whole(self, source: Source) -> None:
        """Blocks come in order without overlap, within the size asked for, and equal one whole read."""
        for _, recording, signal in _signals(source):
            whole = recording.read(signal.name, 0, signal.n_samples)
            limit = max(_MAX_BYTES, signal.array.sample_bytes)
            blocks = list(recording.blocks(signal.name, limit))
            starts = [start for start, _ in blocks]
            assert starts == [0, *itertools.accumulate(len(block) for _, block in blocks)][:-1]
            assert all(block.nbytes <= limit for _, block in blocks)
            joined = np.concatenate([block for _, block in blocks]) if blocks else whole[:0]
            _assert_same(joined, whole)

    def test_reads_are_as_described(self, source: Source) -> None:
        """What is read has the shape and dtype that the signal says, also for no samples at all."""
        for _, recording, signal in _signals(source):
            for start, stop in ((0, signal.n_samples), (signal.n_samples, signal.n_samples), (0, 0)):
                data = recording.read(signal.name, start, stop)
                assert data.shape == (stop - start, *signal.array.sample_shape)
                assert data.dtype.name == signal.array.dtype

    def test_any_range_is_a_part_of_the_whole(self, source: Source) -> None:
        """Reading [start, stop) gives those samples of the whole, each time."""
        for _, recording, signal in _signals(source):
            whole = recording.read(signal.name, 0, signal.n_samples)
            for start, stop in _ranges(signal.n_samples):
                for _ in range(2):
                    _assert_same(recording.read(signal.name, start, stop), whole[start:stop])

    def test_what_is_read_belongs_to_the_reader(self, source: Source) -> None:
        """Changing what was read changes nothing for the next read."""
        for _, recording, signal in _signals(source):
            stop = min(signal.n_samples, 3)
            before = recording.read(signal.name, 0, stop).copy()
            recording.read(signal.name, 0, stop)[...] = 1
            _assert_same(recording.read(signal.name, 0, stop), before)

    def test_reading_outside_is_refused(self, source: Source) -> None:
        """Samples that the recording does not hold are an error, never padding."""
        for _, recording, signal in _signals(source):
            n_samples = signal.n_samples
            for start, stop in ((0, n_samples + 1), (-1, 1), (n_samples + 1, n_samples + 2), (1, 0)):
                with pytest.raises(SourceError):
                    recording.read(signal.name, start, stop)

    def test_unknown_signals_and_tiny_blocks_are_refused(self, source: Source) -> None:
        """An unknown name is an InputError; a block smaller than one sample does not fit."""
        for _, recording, signal in _signals(source):
            with pytest.raises(InputError):
                recording.read("no such signal", 0, 1)
            if signal.n_samples and signal.array.sample_bytes > 1:
                with pytest.raises(DoesNotFit):
                    next(iter(recording.blocks(signal.name, signal.array.sample_bytes - 1)))

    def test_events_are_sorted_columns(self, source: Source) -> None:
        """Events are sorted by onset, with finite times and durations that are not negative."""
        for _, recording in _recordings(source):
            events = recording.events
            assert list(events.onset_s) == sorted(events.onset_s)
            assert all(np.isfinite(events.onset_s)) if len(events) else True
            assert all(duration >= 0 for duration in events.duration_s)
            assert all(isinstance(text, str) for text in events.description)

    def test_numbers_of_bank_rows_lie_in_the_bank(self, source: Source) -> None:
        """A signal that numbers the rows of a bank holds whole numbers within that bank."""
        banks = {entry.id: _bank_rows(source, entry) for entry in source.entries() if entry.is_bank}
        for _, recording, signal in _signals(source):
            if signal.bank is not None:
                rows = recording.read(signal.name, 0, signal.n_samples)
                assert rows.dtype.kind in "iu"
                assert rows.size == 0 or (rows.min() >= 0 and rows.max() < banks[signal.bank])

    def test_leaving_closes_every_file(self, source: Source) -> None:
        """After the with-block no file is open that was not before; closing twice is allowed."""
        for entry in source.entries():
            before = _open_paths()
            with source.open(entry) as recording:
                signal = recording.signals[0]
                recording.read(signal.name, 0, min(signal.n_samples, 1))
            recording.close()
            assert _open_paths() <= before


def _folders(source: Source) -> set[str]:
    """Name this folder and those of all files: a refusal is kept in stores, which travel."""
    folders = {file.path.absolute().parent for entry in source.entries() for file in entry.files}
    return {str(folder) for folder in (Path.cwd(), *folders)}


def _recordings(source: Source) -> Iterator[tuple[Entry, Recording]]:
    for entry in source.entries():
        with source.open(entry) as recording:
            yield entry, recording


def _signals(source: Source) -> Iterator[tuple[Entry, Recording, Signal]]:
    for entry, recording in _recordings(source):
        for signal in recording.signals:
            yield entry, recording, signal


def _bank_rows(source: Source, entry: Entry) -> int:
    """Count rows: a bank is one signal under the bank's own name."""
    with source.open(entry) as recording:
        return signal_named(recording.signals, entry.id).n_samples


def _ranges(n_samples: int) -> list[tuple[int, int]]:
    middle = n_samples // 2
    ranges = {(0, 1), (n_samples - 1, n_samples), (middle, min(middle + 7, n_samples)), (1, n_samples)}
    return sorted((start, stop) for start, stop in ranges if 0 <= start < stop <= n_samples)


def _assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit: the same range read in other pieces gives the same values."""
    np.testing.assert_array_equal(one, other, strict=True)


def _open_paths() -> set[str]:
    return {opened.path for opened in psutil.Process().open_files()}


_noting: list[list[str]] = []
"""The lists to fill now, innermost last."""


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Note the names of all files that Python opens within the block.

    References
    ----------
    https://docs.python.org/3/library/audit_events.html, event ``open``

    Examples
    --------
    >>> with opened_files() as opened:
    ...     _ = Path("/dev/null").read_bytes()
    >>> opened
    ['/dev/null']
    """
    _add_hook()
    names: list[str] = []
    _noting.append(names)
    try:
        yield names
    finally:
        _noting.pop()


@cache
def _add_hook() -> None:
    """Add the hook once: Python cannot take it away again, so it notes only while asked to."""
    sys.addaudithook(_note)


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _noting and isinstance(args[0], str | bytes):
        for names in _noting:
            names.append(os.fsdecode(args[0]))
