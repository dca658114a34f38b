"""What every backend of a store promises, as a class of tests to inherit.

A backend's own tests make a subclass that names it; pytest then runs every test below
against a store of every kind of signal. The model is NumPy's slicing of the arrays that the
store was made of.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from engram.errors import InputError, StoreDamaged
from engram.store.backend import Backend, Part, open_backend
from engram.store.precision import encode
from engram.store.reader import Extent, Store
from engram.testing.kinds import Arrays

__all__ = ["BackendConformance"]


class BackendConformance:
    """Tests that every ``Backend`` passes.

    A subclass names its backend and has the fixtures ``store_path``, a store prepared from
    ``engram.testing.kinds.make_source`` with default precision, and ``arrays``, what it was
    made of.

    Examples
    --------
    In a test module::

        class TestMyBackend(BackendConformance):
            name = "mine"
    """

    name: ClassVar[str]
    """Name of the backend in ``engram.store.backend.BACKENDS``."""

    @pytest.fixture
    def backend(self, store_path: Path) -> Iterator[Backend]:
        """Open the backend, and close it after the test."""
        opened = open_backend(self.name, store_path, Store(store_path).manifest.files)
        yield opened
        opened.close()

    @pytest.fixture
    def extents(self, store_path: Path) -> list[Extent]:
        """List every signal of every recording."""
        store = Store(store_path)
        return [e for name in sorted(set(store.signals["signal"].to_pylist())) for e in store.extents(name)]

    def test_every_recording_is_its_array(
        self, backend: Backend, extents: list[Extent], arrays: Arrays
    ) -> None:
        """Bytes as they were encoded, from every part."""
        for extent in extents:
            if extent.recording in arrays:
                out = _buffer(extent.part, extent.n_samples)
                backend.read_into(extent.part, extent.start, out)
                expected = encode(arrays[extent.recording][extent.part.signal], extent.precision)
                assert out.tobytes() == expected.tobytes()

    def test_ranges_are_slices(self, backend: Backend, extents: list[Extent]) -> None:
        """Any range of a part is that slice of the whole part, over block borders too."""
        rng = np.random.default_rng(0)
        for extent in extents:
            grid = extent.part.grid
            whole = _buffer(extent.part, grid.n_samples)
            backend.read_into(extent.part, 0, whole)
            for _ in range(10):
                start, stop = sorted(rng.integers(0, grid.n_samples + 1, 2).tolist())
                out = _buffer(extent.part, stop - start)
                backend.read_into(extent.part, start, out)
                assert np.array_equal(out, whole[start:stop])

    def test_the_callers_buffer_is_filled_and_not_kept(self, backend: Backend, extents: list[Extent]) -> None:
        """A later read into another buffer leaves the first one as it was."""
        part = max((e.part for e in extents), key=lambda part: part.grid.n_samples)
        first, second = _buffer(part, 5), _buffer(part, 5)
        backend.read_into(part, 0, first)
        kept = first.copy()
        backend.read_into(part, 5, second)
        assert np.array_equal(first, kept)

    def test_files_hold_samples_from_byte_0(self, backend: Backend, extents: list[Extent]) -> None:
        """Where there are files, reading them gives what the backend reads."""
        part = extents[0].part
        files = backend.files([part])
        if files is not None:
            out = _buffer(part, 3)
            backend.read_into(part, 0, out)
            backend.close()  # who holds a file can read it as long as that
            assert os.pread(files[0].descriptor, out.nbytes, 0) == out.tobytes()

    def test_reads_outside_the_part_are_refused(self, backend: Backend, extents: list[Extent]) -> None:
        """Neither before its first sample nor after its last."""
        part = extents[0].part
        for start in (-1, part.grid.n_samples):
            with pytest.raises(InputError, match="not all within"):
                backend.read_into(part, start, _buffer(part, 1))

    def test_buffers_of_another_form_are_refused(self, backend: Backend, extents: list[Extent]) -> None:
        """Another dtype, another sample shape, or not contiguous."""
        part = max((e.part for e in extents), key=lambda part: part.grid.n_samples)
        shape, dtype = part.grid.sample_shape, part.grid.dtype
        strided = np.empty((4, *shape), dtype)[::2]
        for out in (np.empty((2, *shape, 1), dtype), np.empty((2, *shape), "complex64"), strided):
            with pytest.raises(InputError, match="Give a C-contiguous buffer"):
                backend.read_into(part, 0, out)

    def test_a_part_that_is_not_there_is_damage(self, backend: Backend, extents: list[Extent]) -> None:
        """With its name."""
        part = Part("parts/9999-00000-eeg-0", "eeg", extents[0].part.grid)
        with pytest.raises(StoreDamaged, match=r"9999-00000-eeg-0.* is missing"):
            backend.read_into(part, 0, _buffer(part, 1))

    def test_pickled_closed_and_threaded_it_reads_the_same(
        self, backend: Backend, extents: list[Extent]
    ) -> None:
        """In another process, after close, and from several threads at once."""
        part = extents[0].part
        n_samples = min(part.grid.n_samples, 100)
        expected = _buffer(part, n_samples)
        backend.read_into(part, 0, expected)
        travelled: Backend = pickle.loads(pickle.dumps(backend))  # noqa: S301 - our own bytes
        backend.close()

        def read(_: int) -> bool:
            out = _buffer(part, n_samples)
            backend.read_into(part, 0, out)
            return np.array_equal(out, expected)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(32)))
        out = _buffer(part, n_samples)
        travelled.read_into(part, 0, out)
        travelled.close()
        assert np.array_equal(out, expected)


def _buffer(part: Part, n_samples: int) -> NDArray[Any]:
    return np.empty((n_samples, *part.grid.sample_shape), part.grid.dtype)
