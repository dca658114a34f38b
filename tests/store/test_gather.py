"""Many ranges of samples at once: read, widened and turned, in C or by NumPy, to the same bytes."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeAlias
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.errors import StoreDamaged
from engram.store import gather as module
from engram.store.backend import Part
from engram.store.crc import crc32c
from engram.store.format import FileStamp
from engram.store.gather import (
    Ranges,
    can_gather_directly,
    check,
    gather,
    hint,
    is_cached,
    scratch_bytes,
)
from engram.store.grid import Grid
from engram.store.medium import can_forget, forget
from engram.store.precision import Precision, Scaling, decode, encode
from engram.store.ram_backend import RamBackend
from engram.store.reader import Store
from engram.store.zarr_backend import ZarrBackend

if module.IS_NATIVE:
    from engram.store import _native

needs_native = pytest.mark.skipif(not module.IS_NATIVE, reason="engram.store._native was not compiled here")


def can_be_direct() -> bool:
    """Whether the folder of temporary files can be read past the page cache."""
    with tempfile.NamedTemporaryFile() as file, suppress(OSError, AttributeError):
        os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        return module.IS_NATIVE
    return False


CAN_BE_DIRECT = can_be_direct()
needs_direct = pytest.mark.skipif(
    not CAN_BE_DIRECT, reason="temporary files cannot be read past the page cache here"
)
Way: TypeAlias = Literal["native", "numpy", "direct"]
WAYS = [pytest.param("native", marks=needs_native), "numpy", pytest.param("direct", marks=needs_direct)]

INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
FORMS: list[tuple[Precision, str]] = [
    ("float16", "float16"),
    ("bfloat16", "uint16"),
    ("float32", "float32"),
    ("int16", "int16"),
    *(("exact", dtype) for dtype in INTEGERS),
]
SHAPES = ((), (1,), (2,), (3,), (8,), (13,), (129,), (2, 3), (3, 1, 5))


class Files:
    """Shard files as a store has them, with a backend over them."""

    def __init__(self, root: Path) -> None:
        self.root, self.stamps = root, dict[str, FileStamp]()
        self.opened: list[ZarrBackend] = []

    def add(self, name: str, values: NDArray[Any]) -> Part:
        """Write samples (time, ...) as a part."""
        part = Part(name, "x", Grid(len(values), values.shape[1:], values.dtype.name))
        file = self.root / part.file
        file.parent.mkdir(parents=True)
        file.write_bytes(values.tobytes().ljust(part.grid.file_bytes, b"\0"))
        self.stamps[part.file] = FileStamp(part.grid.file_bytes, 0)
        return part

    def open(self) -> ZarrBackend:
        """Give a backend."""
        self.opened.append(ZarrBackend(self.root, self.stamps))
        return self.opened[-1]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """No files yet; their backends are closed after the test."""
    files = Files(tmp_path)
    yield files
    for backend in files.opened:
        backend.close()


def values_of(dtype: str, n_samples: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Draw samples of all bits: NaN, infinities and subnormals among the floats."""
    rng = np.random.default_rng((n_samples, *shape))
    if dtype == "bool":
        return rng.random((n_samples, *shape)) < 0.5
    n_bytes = n_samples * int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(n_bytes), dtype).reshape(n_samples, *shape).copy()


class Corpus:
    """Two parts of any dtype and sample shape, of 97 and 60 samples, with a backend over all of them."""

    def __init__(self, root: Path) -> None:
        self.files = Files(root)
        self.backend = self.files.open()

    @cache  # noqa: B019 - there is one corpus
    def get(self, dtype: str, shape: tuple[int, ...]) -> tuple[list[Part], list[NDArray[Any]]]:
        """Give the parts, and what is in them."""
        values = [values_of(dtype, n_samples, shape) for n_samples in (97, 60)]
        name = f"{dtype}-{'x'.join(map(str, shape))}"
        return [self.files.add(f"{name}-{number}", each) for number, each in enumerate(values)], values


@pytest.fixture(scope="module")
def corpus_(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus for all tests."""
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def corpus(corpus_: Corpus) -> Iterator[Corpus]:
    """The corpus, closed again after the test."""
    yield corpus_
    corpus_.backend.close()


def ranges_of(
    parts: Sequence[Part],
    precision: Precision,
    rows: Sequence[tuple[int, int, int, int, int]],
    scalings: Sequence[Scaling] | None = None,
) -> Ranges:
    """Give ranges from rows of (part, start, length, row, at)."""
    return Ranges(parts, precision, np.array(rows, np.int64).reshape(-1, 5).T.copy(), scalings)


def assert_same(one: NDArray[Any], other: NDArray[Any], *, is_bfloat16: bool = False) -> None:
    """Equal to the last bit; any NaN is as good as another."""
    assert one.dtype == other.dtype
    if is_bfloat16:
        one, other = ((x.astype(np.uint32) << 16).view(np.float32) for x in (one, other))
    if one.dtype.kind == "f":
        assert np.array_equal(np.isnan(one), np.isnan(other))
        one, other = (np.where(np.isnan(x), 0, x).view(np.uint32) for x in (one, other))
    np.testing.assert_array_equal(one, other)


def gathered(
    backend: ZarrBackend | RamBackend, ranges: Ranges, out: NDArray[Any], *, way: Way, **how: bool
) -> NDArray[Any]:
    """Fill ``out`` in one of the ways."""
    with mock.patch.object(module, "IS_NATIVE", way != "numpy"):
        gather(backend, ranges, out, **{"is_turned": False, "is_direct": way == "direct", **how})
    return out


@st.composite
def places(draw: st.DrawFn) -> tuple[list[tuple[int, int, int, int, int]], tuple[int, int]]:
    """Draw ranges of two parts, several to a row of an array, and how many rows and times it has."""
    rows: list[tuple[int, int, int, int, int]] = []
    n_rows, longest = draw(st.integers(1, 5)), 1
    for row in range(n_rows):
        at = draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3))):
            part, length = draw(st.integers(0, 1)), draw(st.integers(0, 60))
            start = draw(st.integers(0, (97, 60)[part] - length))
            rows.append((part, start, length, row, at))
            at += length + draw(st.integers(0, 2))
        longest = max(longest, at)
    return draw(st.permutations(rows)), (n_rows, longest + draw(st.integers(0, 2)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    shape=st.sampled_from(SHAPES),
    delivered=st.sampled_from(["as decoded", "float32", "bfloat16"]),
    where=places(),
    piece_values=st.sampled_from([1, 7, 40, 1000, 1 << 16]),
    last_cache_bytes=st.sampled_from([0, 1, 1 << 40]),
    data=st.data(),
)
def test_all_ways_give_what_numpy_decodes(
    corpus: Corpus,
    form: tuple[Precision, str],
    shape: tuple[int, ...],
    delivered: str,
    where: tuple[list[tuple[int, int, int, int, int]], tuple[int, int]],
    piece_values: int,
    last_cache_bytes: int,
    data: st.DataObject,
) -> None:
    """Any precision, dtype, shape and piece, turned or not, past the caches or not, to the bit.

    Nothing else is written. The model decodes slices of the array one by one.
    """
    (precision, dtype), (rows, (n_rows, n_times)) = form, where
    is_bfloat16 = delivered == "bfloat16"
    is_turned = len(shape) == 1 and data.draw(st.booleans())
    parts, values = corpus.get(dtype, shape)
    rng = np.random.default_rng(len(rows))
    n_scales = (shape or (1,))[-1]
    scalings = [Scaling(rng.uniform(0, 1e-3, n_scales), rng.normal(0, 9, n_scales)) for _ in rows]
    out_dtype = {"float32": "float32", "bfloat16": "uint16"}.get(delivered)
    out_dtype = out_dtype or (dtype if precision == "exact" else "float32")

    before = values_of(out_dtype, n_rows, (n_times, *shape))
    expected = before.copy()
    for (part, start, length, row, at), scaling in zip(rows, scalings, strict=True):
        decoded = decode(values[part][start : start + length], precision, scaling)
        expected[row, at : at + length] = encode(decoded, "bfloat16") if is_bfloat16 else decoded
    ranges = ranges_of(parts, precision, rows, scalings if precision == "int16" else None)
    possible: dict[Way, bool] = {"numpy": True, "native": module.IS_NATIVE, "direct": CAN_BE_DIRECT}
    for way in (way for way, is_possible in possible.items() if is_possible):
        out = np.moveaxis(before, 1, -1).copy("C") if is_turned else before.copy()
        with (
            mock.patch.object(module, "PIECE_VALUES", piece_values),
            mock.patch.object(module, "_last_cache_bytes", return_value=last_cache_bytes),
            nullcontext() if way == "numpy" else mock.patch.object(module, "_gather_plainly", None),
        ):
            how = {"is_turned": is_turned, "is_bfloat16": is_bfloat16}
            gathered(corpus.backend, ranges, out, way=way, **how)
        in_time = np.ascontiguousarray(np.moveaxis(out, -1, 1)) if is_turned else out
        assert_same(in_time, expected, is_bfloat16=is_bfloat16)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("precision", "dtype"), [("float16", "float16"), ("float32", "float32")])
@pytest.mark.parametrize("n_times", [8, 200, 511, 512, 513, 700])
@pytest.mark.parametrize("last_cache_bytes", [0, 1, 1 << 40])
def test_windows_are_turned_in_any_length(
    files: Files, precision: Precision, dtype: str, n_times: int, last_cache_bytes: int, *, way: Way
) -> None:
    """Rows of 512 samples and fewer are turned elsewhere first, if a window fills them.

    More than the processor's cache holds goes to memory past it, wherever a line of the cache begins.
    """
    values = values_of(dtype, 800, (19,))
    backend, part = files.open(), files.add("eeg", values)
    ranges = ranges_of([part], precision, [(0, 3, n_times, 0, 0), (0, 80, n_times - 1, 1, 1)])
    wide = values.astype(np.float32).T
    for offset in range(17):  # a line has 16 values
        beside = np.zeros(2 * 19 * n_times + 34, np.float32)
        out = beside[offset : offset + 2 * 19 * n_times].reshape(2, 19, n_times)
        with mock.patch.object(module, "_last_cache_bytes", return_value=last_cache_bytes):
            gathered(backend, ranges, out, way=way, is_turned=True)
        np.testing.assert_array_equal(out[0], wide[:, 3 : 3 + n_times])
        np.testing.assert_array_equal(out[1, :, 1:], wide[:, 80 : 79 + n_times])
        assert not out[1, :, 0].any()
        assert not beside[:offset].any()
        assert not beside[offset + 2 * 19 * n_times :].any()
    backend.close()


@pytest.mark.parametrize(
    ("sizes", "n_bytes"),
    [(["32K", "1024K", "32768K"], 32768 * 1024), (["", "48K"], 48 * 1024), (["unknown"], 0), ([], 0)],
)
def test_the_last_cache_is_the_largest_that_the_system_tells_of(
    tmp_path: Path, sizes: list[str], n_bytes: int
) -> None:
    """A machine that tells nothing has none."""
    for number, size in enumerate(sizes):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert module._last_cache_bytes(tmp_path) == n_bytes
    assert module._last_cache_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [ZarrBackend, RamBackend])
def test_a_store_s_recordings_are_what_it_reads(store_path: Path, kind: Any, *, way: Way) -> None:
    """Over every kind of signal; also from memory, where there are no files to read natively."""
    with Store(store_path) as store:
        backend = kind(store.path, store.manifest.files)
        for signal in ("eeg", "stim", "robs", "betas"):
            for extent in store.extents(signal):
                n_samples = min(extent.n_samples, 50)
                expected = store.read(extent.recording, signal, 0, n_samples)
                ranges = ranges_of([extent.part], extent.precision, [(0, extent.start, n_samples, 0, 0)])
                out = np.empty((1, *expected.shape), expected.dtype)
                np.testing.assert_array_equal(gathered(backend, ranges, out, way=way)[0], expected)
        backend.close()


def float16_by_hand(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen float16 by its definition, IEEE 754 binary16, in float64."""
    sign = np.where(bits >> 15, -1.0, 1.0)
    exponent, fraction = (bits >> 10 & 31).astype(int), (bits & 1023).astype(float)
    finite = np.where(
        exponent > 0, np.ldexp(1 + fraction / 1024, exponent - 15), np.ldexp(fraction / 1024, -14)
    )
    special = np.where(fraction > 0, np.nan, np.inf)
    return (sign * np.where(exponent == 31, special, finite)).astype(np.float32)


def bfloat16_by_hand(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16: it is the upper half of a float32."""
    return np.stack([np.zeros_like(bits), bits], axis=-1).view("<f4")[..., 0]


PATTERNS: list[tuple[Precision, str, Callable[[NDArray[np.uint16]], NDArray[np.float32]]]] = [
    ("float16", "float16", float16_by_hand),
    ("bfloat16", "uint16", bfloat16_by_hand),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece_values", [7, 1 << 16])
@pytest.mark.parametrize("is_flushed", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(("precision", "dtype", "by_hand"), PATTERNS)
def test_every_pattern_of_16_bits_is_widened_exactly(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    dtype: str,
    by_hand: Callable[[NDArray[np.uint16]], NDArray[np.float32]],
    *,
    is_turned: bool,
    is_flushed: bool,
    piece_values: int,
    way: Way,
) -> None:
    """All 65,536, by eight at once or one by one; subnormals too where the thread takes those for zero."""
    torch = pytest.importorskip("torch")
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    part = files.add("patterns", bits.view(dtype))
    ranges = ranges_of([part], precision, [(0, 0, len(bits), 0, 0)])
    monkeypatch.setattr(module, "PIECE_VALUES", piece_values)
    shape = (1, *(bits.T if is_turned else bits).shape)
    wide, narrow = np.empty(shape, np.float32), np.empty(shape, np.uint16)
    backend = files.open()
    is_supported = []

    def read() -> None:  # what is told to a processor ends with the thread
        is_supported.append(not is_flushed or torch.set_flush_denormal(True))
        gathered(backend, ranges, wide, way=way, is_turned=is_turned)
        gathered(backend, ranges, narrow, way=way, is_turned=is_turned, is_bfloat16=True)

    thread = Thread(target=read)
    thread.start()
    thread.join()
    if is_supported == [False]:
        pytest.skip("this processor cannot take subnormals for zero")

    one, other = (out[0].T.copy() if is_turned else out[0] for out in (wide, narrow))
    assert_same(one, by_hand(bits))
    assert_same(other, encode(by_hand(bits), "bfloat16"), is_bfloat16=True)
    if precision == "bfloat16":
        assert np.array_equal(other, bits)  # as stored, every NaN as it is


@pytest.mark.parametrize("way", WAYS)
def test_int16_is_rounded_twice_as_numpy_does(files: Files, *, way: Way) -> None:
    """scale * stored + offset: with both in one rounding, values at the offset would not be zero."""
    stored = np.arange(-(1 << 15), 1 << 15, dtype=np.int16)
    part = files.add("int16", np.repeat(stored[:, None], 3, axis=1))
    scale = np.array([1 / 3, 0.1, 1e-9])
    backend = files.open()
    for zero in (-32767, -12345, 77, 32767):
        scaling = Scaling(scale, -(scale * zero))
        ranges = ranges_of([part], "int16", [(0, 0, len(stored), 0, 0)], [scaling])
        out = gathered(backend, ranges, np.empty((1, len(stored), 3), np.float32), way=way)
        assert not out[0, stored == zero].any()
        assert_same(out[0], (stored[:, None] * scale + scaling.offset).astype(np.float32))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_cut_short_is_told_and_what_lies_before_is_read(files: Files, *, way: Way) -> None:
    """The message names the file and where it ends."""
    values = values_of("float16", 40_000, (4,))
    part = files.add("cut", values)
    backend = files.open()
    backend.files([part], is_direct=way == "direct")
    with (files.root / part.file).open("r+b") as file:
        file.truncate(8 * 30_000)
    ranges = ranges_of([part], "float16", [(0, 20_000, 100, 0, 0), (0, 29_950, 100, 1, 0)])
    out = np.zeros((2, 100, 4), np.float32)

    with pytest.raises(StoreDamaged, match=r"cut/x/c/0/0 ends at byte 240000, .* Run engram verify"):
        gathered(backend, ranges, out, way=way)
    assert_same(out[0], values[20_000:20_100].astype(np.float32))


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_file_is_told(files: Files, *, way: Way) -> None:
    """By gathering and by hinting."""
    part = Part("gone", "x", Grid(10, (2,), "uint8"))
    ranges = ranges_of([part], "exact", [(0, 0, 10, 0, 0)])
    with pytest.raises(StoreDamaged, match="gone/x/c/0/0 is missing"):
        gathered(files.open(), ranges, np.empty((1, 10, 2), np.uint8), way=way)
    with (
        mock.patch.object(module, "IS_NATIVE", way != "numpy"),
        pytest.raises(StoreDamaged, match="is missing"),
    ):
        hint(files.open(), ranges)
    with pytest.raises(StoreDamaged, match="is missing"):
        is_cached(files.open(), ranges)


def test_no_range_and_no_room_read_nothing(files: Files) -> None:
    """Also of a part that is not there."""
    gone = [Part("gone", "x", Grid(10, (2,), "uint8"))]
    gather(files.open(), ranges_of(gone, "exact", []), np.empty((1, 10, 2), np.uint8), is_turned=False)
    nothing = ranges_of(gone, "exact", [(0, 3, 0, 0, 0)])
    gather(files.open(), nothing, np.empty((1, 2, 0), np.uint8), is_turned=True)


# What the C refuses.


def natively(**changes: Any) -> int:
    """Ask for 4 samples of 3 int16 values of a file of none, into the middle of the second row of two."""
    arguments: dict[str, Any] = {
        "descriptors": np.zeros(1, np.int32),
        "firsts": np.zeros(1, np.int64),
        "lengths": np.full(1, 4),
        "rows": np.ones(1, np.int64),
        "ats": np.full(1, 2),
        "scale": np.ones((1, 3)),
        "offset": np.ones((1, 3)),
        "out": np.zeros((2, 3, 8), np.float32),
        "scratch": np.empty(12 * 8 + 16, np.uint8),
        "slots": np.empty(0, np.uint8),
        "slot_bytes": 0,
        "n_piece": 12,
        "stored": module._INT16_SCALED,
        "delivered": module._AS_STORED,
        "stored_bytes": 2,
        "delivered_bytes": 4,
        "n_values": 3,
        "n_times": 8,
        "n_scales": 3,
        "is_turned": True,
        "is_past_caches": True,
    }
    assert changes.keys() <= arguments.keys()
    return _native.gather(*(arguments | changes).values())


def _told(value: int | NDArray[Any]) -> str:
    """Name a value, and of a longer array its shape."""
    array = np.asarray(value)
    return str(array.tolist() if array.size < 5 else array.shape)


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        {"descriptors": np.zeros(2, np.int32)},
        {"firsts": np.zeros(0, np.int64)},
        {"firsts": np.full(1, -1)},
        {"lengths": np.full(1, 7)},
        {"lengths": np.full(1, -1)},
        {"lengths": np.full(1, 2**63 - 1)},
        {"lengths": np.full(2, 1)},
        {"rows": np.full(1, 2)},
        {"rows": np.full(1, -1)},
        {"rows": np.full(1, 2**61 - 1)},
        {"ats": np.full(1, 5)},
        {"ats": np.full(1, -1)},
        {"ats": np.full(1, 2**63 - 1)},
        {"scale": np.ones((1, 2))},
        {"offset": np.ones((0, 3))},
        {"out": np.zeros(47, np.float32)},
        {"scratch": np.zeros(12 * 8 + 15, np.uint8)},
        {"slots": np.zeros(4096 + 8191, np.uint8), "slot_bytes": 8192},
        {"slots": np.zeros(1, np.uint8), "slot_bytes": 4096},
        {"slots": np.zeros(9000, np.uint8), "slot_bytes": 4095},
        {"slots": np.zeros(9000, np.uint8), "slot_bytes": 0},
        {"slots": np.zeros(9000, np.uint8), "slot_bytes": -4096},
        {"slots": np.zeros(9000, np.uint8), "slot_bytes": 4096},
        {"slots": np.zeros(9000, np.uint8), "slot_bytes": 2**62},
        {"n_piece": 0},
        {"n_piece": 13},
        {"n_piece": -12},
        {"n_piece": 2**61},
        {"stored": module._FLOAT32},
        {"stored": 13},
        {"stored": -1},
        {"stored": module._AS_STORED},
        {"delivered": module._BFLOAT16},
        {"delivered_bytes": 2},
        {"stored_bytes": 8},
        {"n_values": 0},
        {"n_values": 2**62},
        {"n_values": -3},
        {"n_times": 2**62},
        {"n_times": 0},
        {"n_scales": 0},
        {"n_scales": 2},
        {"n_scales": -3},
    ],
    ids=lambda changes: " ".join(f"{name}={_told(value)}" for name, value in changes.items()),
)
def test_what_does_not_fit_its_buffers_is_refused_natively(changes: dict[str, Any]) -> None:
    """A mistake of ours is a ValueError: nothing is written, beyond a buffer least of all."""
    out = changes.setdefault("out", np.zeros((2, 3, 8), np.float32))
    with pytest.raises(ValueError, match="do not fit the buffers"):
        natively(**changes)
    assert not out.any()


@needs_native
def test_ranges_read_before_one_that_ends_too_early_are_counted_natively(tmp_path: Path) -> None:
    """A file of no bytes gives none of one; unequal columns of a hint are a ValueError."""
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        descriptors = np.array([file.fileno()], np.int32)
        assert natively(descriptors=descriptors) == 0
        assert natively(descriptors=descriptors, lengths=np.zeros(1, np.int64)) == 1
        with pytest.raises(ValueError, match="Not one first byte and count per descriptor"):
            _native.hint(descriptors, np.zeros(2, np.int64), np.zeros(1, np.int64))


# Past the page cache.


@needs_direct
@pytest.mark.parametrize("failure", [OSError("no such files here"), 0, 1])
def test_what_cannot_be_read_directly_is_read_through_the_page_cache(
    corpus: Corpus, failure: OSError | int
) -> None:
    """All of it, or from where it failed; and not by NumPy."""
    parts, values = corpus.get("int16", (3,))
    ranges = ranges_of(parts, "exact", [(0, 3, 20, 0, 0), (0, 10, 30, 1, 0), (1, 0, 60, 2, 0)])
    natively, asked = module._gather_natively, []

    def gather_natively(backend: Any, ranges: Ranges, out: Any, *, is_direct: bool, **how: Any) -> int:
        asked.append((is_direct, len(ranges)))
        if not is_direct:
            return natively(backend, ranges, out, is_direct=False, **how)
        if isinstance(failure, OSError):
            raise failure
        return natively(backend, ranges.between(0, failure), out, is_direct=True, **how) if failure else 0

    with (
        mock.patch.object(module, "_gather_natively", gather_natively),
        mock.patch.object(module, "_gather_plainly", None),
    ):
        out = gathered(corpus.backend, ranges, np.zeros((3, 60, 3), np.int16), way="direct")
    assert asked == [(True, 3), (False, 2 if failure == 1 else 3)]
    for row, expected in enumerate((values[0][3:23], values[0][10:40], values[1])):
        assert np.array_equal(out[row, : len(expected)], expected)


@needs_direct
def test_a_trial_says_whether_files_can_be_read_directly(files: Files) -> None:
    """Every dtype; not from memory, not where a file is damaged, not with pages that two buffers share."""
    parts = [files.add(dtype, values_of(dtype, 5, (3,))) for dtype in ("float16", "float32", *INTEGERS)]
    for part in parts:
        assert can_gather_directly(files.open(), part)
    assert not can_gather_directly(RamBackend(files.root, files.stamps), parts[0])
    assert not can_gather_directly(files.open(), Part("gone", "x", Grid(10, (2,), "uint8")))
    with mock.patch("mmap.PAGESIZE", 1 << 16):
        assert not can_gather_directly(files.open(), parts[0])
    with mock.patch.object(module, "IS_NATIVE", new=False):
        assert not can_gather_directly(files.open(), parts[0])


@needs_direct
def test_a_file_that_is_not_open_is_not_read_natively() -> None:
    """The kernel's refusal to take a read is the end of it: nothing is in flight, nothing was written."""
    out = np.zeros((2, 3, 8), np.float32)
    slots = np.empty(4096 + 8192, np.uint8)
    assert natively(descriptors=np.full(1, -1, np.int32), slots=slots, slot_bytes=8192, out=out) == 0
    assert not out.any()


# Chunks and hints.


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=200),
    max_bytes=st.integers(0, 2000),
    has_scalings=st.booleans(),
)
def test_chunks_are_all_ranges_in_turn(lengths: list[int], max_bytes: int, *, has_scalings: bool) -> None:
    """As few as can be: of so many bytes at most, or one range alone, and of 64 ranges at most."""
    part = Part("p", "x", Grid(1000, (3,), "int16"))
    scalings = [Scaling(np.full(3, i), np.zeros(3)) for i in range(len(lengths))] if has_scalings else None
    rows = [(0, i, length, i, 0) for i, length in enumerate(lengths)]
    ranges = ranges_of([part], "int16", rows, scalings)
    chunks = list(ranges.chunks(max_bytes))

    assert np.array_equal(np.concatenate([chunk.columns for chunk in chunks], axis=1), ranges.columns)
    if scalings is not None:
        assert [scaling for chunk in chunks for scaling in chunk.scalings or ()] == scalings
    for chunk in chunks:
        assert chunk.n_bytes == 6 * chunk.length.sum()
        assert len(chunk) <= 64
        assert chunk.n_bytes <= max_bytes or len(chunk) == 1
    for chunk, after in pairwise(chunks):
        assert len(chunk) == 64 or chunk.n_bytes + 6 * after.length[0] > max_bytes


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=places())
def test_the_kernel_is_asked_for_the_bytes_of_all_ranges(
    corpus: Corpus, where: tuple[list[tuple[int, int, int, int, int]], tuple[int, int]]
) -> None:
    """In the order in which they lie, and for no others: no bytes at all would mean a whole file."""
    if not hasattr(os, "posix_fadvise") or not where[0]:
        return
    parts, _ = corpus.get("int16", (3,))
    asked: list[tuple[int, int, int]] = []

    def note(descriptor: int, first: int, n_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((descriptor, first, n_bytes))

    numbers = {file.descriptor: number for number, file in enumerate(corpus.backend.files(parts))}
    with mock.patch.object(module, "IS_NATIVE", new=False), mock.patch.object(os, "posix_fadvise", note):
        hint(corpus.backend, ranges_of(parts, "exact", where[0]))

    covered = [(numbers[descriptor], first, first + n_bytes) for descriptor, first, n_bytes in asked]
    assert covered == sorted(covered, key=lambda piece: piece[:2])
    assert all(stop > first for _, first, stop in covered)
    wanted = [(part, 6 * start, 6 * (start + length)) for part, start, length, _, _ in where[0]]
    assert bytes_of(covered) == bytes_of(wanted)


def test_the_kernel_is_asked_for_the_blocks_that_are_compared(files: Files) -> None:
    """Whole ones, the last one as far as it goes; for a range of nothing, for nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    values = np.zeros((2 * 21_845 + 1000, 3), np.int16)
    parts = [files.add("p", values), files.add("q", values[:100])]
    assert parts[0].grid.block_samples == 21_845
    asked: list[tuple[int, int]] = []
    rows = [(0, 21_840, 10, 0, 0), (0, 43_700, 20, 1, 0), (0, 5, 0, 2, 0), (1, 3, 4, 3, 0)]
    with (
        mock.patch.object(module, "IS_NATIVE", new=False),
        mock.patch.object(os, "posix_fadvise", lambda _, first, n_bytes, __: asked.append((first, n_bytes))),
    ):
        hint(files.open(), ranges_of(parts, "exact", rows), is_checked=True)
    advised = [piece for piece in asked if piece != (0, 0)]  # a file that is opened is advised as a whole
    assert advised == [(0, 2 * 21_845 * 6), (2 * 21_845 * 6, 6000), (0, 600)]


def bytes_of(pieces: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
    """Give (part, byte) of pieces (part, first, stop)."""
    return {(part, byte) for part, first, stop in pieces for byte in range(first, stop)}


@pytest.mark.parametrize("way", WAYS)
def test_a_hint_changes_nothing_but_speed(corpus: Corpus, *, way: Way) -> None:
    """What is read after it is what is read without it; where nothing can be told, nothing is."""
    parts, values = corpus.get("int16", (3,))
    ranges = ranges_of(
        parts, "exact", [(0, 3, 20, 0, 0), (0, 10, 30, 1, 0), (0, 97, 0, 1, 0), (1, 0, 60, 2, 0)]
    )
    with mock.patch.object(module, "IS_NATIVE", way != "numpy"):
        hint(corpus.backend, ranges)
        hint(RamBackend(corpus.files.root, corpus.files.stamps), ranges)
    out = gathered(corpus.backend, ranges, np.zeros((3, 60, 3), np.int16), way=way)
    assert np.array_equal(out[1, :30], values[0][10:40])


def test_what_the_page_cache_holds_is_known(files: Files) -> None:
    """The middle of the first range, without waiting for a disk; no range is too short."""
    part = files.add("cached", values_of("uint8", 1 << 14, (1 << 8,)))  # 4 MiB
    backend = files.open()
    path = files.root / part.file
    ranges = ranges_of([part], "exact", [(0, 1 << 13, 1 << 10, 0, 0)])
    path.read_bytes()
    if not is_cached(backend, ranges):
        pytest.skip("the file system of temporary files cannot say what is in the page cache")
    assert is_cached(backend, ranges_of([part], "exact", [(0, 0, 0, 0, 0)]))
    # Past its end, and in no file, there is nothing.
    assert not is_cached(backend, ranges_of([part], "exact", [(0, part.grid.n_samples * 2, 1, 0, 0)]))
    assert not is_cached(RamBackend(files.root, files.stamps), ranges)
    if can_forget():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        forget([path])
        assert not is_cached(backend, ranges)
        path.read_bytes()
        assert is_cached(backend, ranges)


# Checksums.


def checksums_of(part: Part, values: NDArray[Any]) -> NDArray[np.uint32]:
    """Compute the CRC32C of every block, the last one filled up with zeros."""
    grid = part.grid
    padded = values.tobytes().ljust(grid.data_bytes, b"\0")
    return np.array(
        [crc32c(padded[i * grid.block_bytes : (i + 1) * grid.block_bytes]) for i in range(grid.n_blocks)],
        np.uint32,
    )


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Part, dict[str, NDArray[np.uint32]]]:
    """A part of four blocks of 8 samples of 16 KiB, the last of which holds three, and its checksums."""
    files = Files(tmp_path_factory.mktemp("blocks"))
    values = values_of("uint8", 27, (1 << 14,))
    part = files.add("blocks", values)
    assert (part.grid.block_samples, part.grid.n_blocks) == (8, 4)
    return files, part, {part.path: checksums_of(part, values)}


@settings(max_examples=80)
@given(data=st.data(), byte=st.integers(0, (27 << 14) - 1))
def test_a_flipped_byte_is_found_by_whoever_touches_its_block(
    blocks: tuple[Files, Part, dict[str, NDArray[np.uint32]]], data: st.DataObject, byte: int
) -> None:
    """In any block of any of the windows, and in none that they do not touch; the message names it."""
    files, part, checksums = blocks
    starts = data.draw(st.lists(st.integers(0, 27), min_size=1, max_size=3))
    rows = [(0, start, data.draw(st.integers(0, 27 - start)), row, 0) for row, start in enumerate(starts)]
    ranges = ranges_of([part], "exact", rows)
    block = byte // part.grid.block_bytes
    touched = {sample // 8 for _, start, length, _, _ in rows for sample in range(start, start + length)}
    path = files.root / part.file
    backend = files.open()
    check(backend, ranges, checksums)

    with path.open("r+b") as file:
        was = os.pread(file.fileno(), 1, byte)
        os.pwrite(file.fileno(), bytes([was[0] ^ 16]), byte)
        try:
            if block in touched:
                with pytest.raises(StoreDamaged, match=rf"Block {block} of .*blocks/x/c/0/0 \(samples"):
                    check(backend, ranges, checksums)
            else:
                check(backend, ranges, checksums)
        finally:
            os.pwrite(file.fileno(), was, byte)
    backend.close()


def test_a_block_is_read_once_for_all_windows_that_touch_it(
    blocks: tuple[Files, Part, dict[str, NDArray[np.uint32]]],
) -> None:
    """Windows that overlap cost no more checking than one."""
    files, part, checksums = blocks
    backend = files.open()
    with mock.patch.object(
        ZarrBackend, "read_into", autospec=True, side_effect=ZarrBackend.read_into
    ) as read:
        check(backend, ranges_of([part], "exact", [(0, i, 4, i, 0) for i in range(12)]), checksums)
    assert read.call_count == 2
    backend.close()


# What it holds.

LARGE: list[tuple[Precision, str, tuple[int, ...], int]] = [
    ("float16", "float16", (129,), 2000),
    ("float16", "float16", (129,), 100),
    ("bfloat16", "uint16", (129,), 2000),
    ("float32", "float32", (129,), 2000),
    ("int16", "int16", (129,), 2000),
    ("int16", "int16", (100_000,), 5),
    ("exact", "uint8", (129,), 2000),
    ("exact", "int64", (7, 9), 3000),
    ("exact", "int16", (50, 60, 70), 3),
]


@pytest.mark.parametrize("way", [*WAYS, "in memory"])
@pytest.mark.parametrize("dtype", ["as decoded", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("precision", "stored", "shape", "n_samples", "is_turned"),
    [(*large, is_turned) for large in LARGE for is_turned in {False, len(large[2]) == 1}],
)
def test_gathering_holds_no_more_than_it_says(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    stored: str,
    shape: tuple[int, ...],
    n_samples: int,
    dtype: str,
    way: str,
    *,
    is_turned: bool,
) -> None:
    """Beside its result and the ranges themselves; and no less than half of it, or some kilobytes."""
    if way == "numpy":
        monkeypatch.setattr(module, "IS_NATIVE", False)
    part = files.add("large", values_of(stored, n_samples, shape))
    scaling = Scaling(np.ones(shape[-1]), np.zeros(shape[-1]))
    ranges = ranges_of(
        [part], precision, [(0, 0, n_samples, 0, 0)], [scaling] if precision == "int16" else None
    )
    dtype = (stored if precision == "exact" else "float32") if dtype == "as decoded" else dtype
    out_shape = (1, *shape, n_samples) if is_turned else (1, n_samples, *shape)
    out = np.empty(out_shape, "uint16" if dtype == "bfloat16" else dtype)
    backend = RamBackend(files.root, files.stamps) if way == "in memory" else files.open()
    has_files = backend.files([]) is not None
    predicted = scratch_bytes(
        part.grid,
        precision,
        n_samples,
        dtype,
        is_turned=is_turned,
        has_files=has_files,
        is_direct=way == "direct",
    )
    how = {"is_turned": is_turned, "is_bfloat16": dtype == "bfloat16", "is_direct": way == "direct"}
    gather(backend, ranges, out, **how)

    module._own.slots = np.empty(0, np.uint8)  # as at a thread's first batch
    tracemalloc.start()
    gather(backend, ranges, out, **how)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    peak_bytes += len(module._own.slots)  # mapped, which tracemalloc does not see
    # The scales of one range, where the prediction is for as many as are read at once.
    of_scales = 2 * 8 * shape[-1] * 63 if precision == "int16" and way in ("native", "direct") else 0
    assert peak_bytes <= predicted - of_scales + 20_000
    assert predicted - of_scales <= 2 * peak_bytes + 20_000
