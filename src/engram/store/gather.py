"""Gathering: many ranges of samples, read, widened and laid out as a model wants them.

This module decides how stored samples become a caller's array: which conversion, whether
channels come before time, in pieces of how many values. Which ranges, and when, is left to
``engram.batches``. One call of ``engram.store._native`` does it without Python's lock, so that
two threads read twice as fast as one; where that module was not compiled, or samples lie in no
file, NumPy does the same, range by range. Both give the same bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram.errors import StoreDamaged
from engram.store.backend import Backend, Part
from engram.store.crc import crc32c
from engram.store.grid import Grid
from engram.store.precision import Precision, Scaling, decode, encode

try:
    from engram.store import _native
except ImportError:  # no C compiler when this was installed
    IS_NATIVE = False
else:
    IS_NATIVE = True

__all__ = [
    "IS_NATIVE",
    "Ranges",
    "can_gather_directly",
    "check",
    "gather",
    "hint",
    "is_cached",
    "scratch_bytes",
]

PIECE_VALUES = 1 << 16
"""Values that are widened at once: a piece as stored and widened stays in the processor's own cache."""

_MAX_RANGES = 64
"""Ranges whose files are held open at once: two loaders' threads stay far below 1,024 descriptors."""

_BLOCK_BYTES = 4096
"""What a file is read in past the page cache; a multiple of every disk's own blocks."""
_DEPTH, _LEAST_DEPTH, _SLOTS_BYTES = 64, 4, 4 << 20
"""Reads at once past the page cache: 64, or as many as fit into so many bytes, but 4 in any case."""

_CACHE_SHARE = 8
"""An array that takes more than an eighth of the processor's last cache is written past it: with four of them
in a ring, and the files beside, it would be gone from there before it is used (decision 015)."""

_Codes: TypeAlias = Mapping[str, int]
# As in _native.c.
_AS_STORED, _FLOAT16, _BFLOAT16, _FLOAT32, _INT16_SCALED = range(5)
_PRECISIONS: _Codes = {
    "float16": _FLOAT16, "bfloat16": _BFLOAT16, "float32": _FLOAT32, "int16": _INT16_SCALED
}  # fmt: skip
_INTEGERS: _Codes = {
    name: 5 + number
    for number, name in enumerate(("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"))
} | {"bool": 6}
_NONE = np.empty((0, 0))


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Ranges of samples stored in one precision and shape, and where they go: one entry per range."""

    parts: Sequence[Part]
    """The parts that there are; more than these ranges use, perhaps."""
    precision: Precision
    """How all of them are stored."""
    columns: NDArray[np.int64]
    """(5, range): number of its part in ``parts``, first sample within the part, samples, row of the
    array that they go to, and time in that row of the first one."""
    scalings: Sequence[Scaling] | None = None
    """(range,) maps of int16; None in other precisions."""
    even: int | None = None
    """Samples of every range, where it is known that all have the same number."""
    longest: int = field(init=False)
    """Samples of the longest range; 0 where there is none."""
    n_bytes: int = field(init=False)
    """Bytes of all ranges, as stored."""

    def __post_init__(self) -> None:
        if self.even is None:
            longest, n_samples = int(self.length.max(initial=0)), int(self.length.sum())
        else:
            longest, n_samples = self.even, self.even * len(self)
        object.__setattr__(self, "longest", longest)
        object.__setattr__(self, "n_bytes", n_samples and n_samples * self.first.grid.sample_bytes)

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    @property
    def part(self) -> NDArray[np.int64]:
        """(range,) number of its part in ``parts``."""
        return np.asarray(self.columns[0])

    @property
    def start(self) -> NDArray[np.int64]:
        """(range,) first sample within the part."""
        return np.asarray(self.columns[1])

    @property
    def length(self) -> NDArray[np.int64]:
        """(range,) samples."""
        return np.asarray(self.columns[2])

    @property
    def first(self) -> Part:
        """The part of the first range: all are stored in its dtype and sample shape."""
        return self.parts[int(self.part[0])]

    def chunks(self, max_bytes: int) -> Iterator[Ranges]:
        """Cut into runs of ranges of ``max_bytes`` at most, or of one range that is longer."""
        if len(self) <= _MAX_RANGES and self.n_bytes <= max_bytes:
            yield self  # nearly always
            return
        begin, n_bytes = 0, 0
        for number, of_range in enumerate((self.length * self.first.grid.sample_bytes).tolist()):
            if number > begin and (n_bytes + of_range > max_bytes or number - begin == _MAX_RANGES):
                yield self.between(begin, number)
                begin, n_bytes = number, 0
            n_bytes += of_range
        yield self.between(begin, len(self))

    def between(self, begin: int, end: int) -> Ranges:
        """Give ranges [begin, end)."""
        scalings = None if self.scalings is None else self.scalings[begin:end]
        return Ranges(self.parts, self.precision, self.columns[:, begin:end], scalings, self.even)


def scratch_bytes(
    grid: Grid,
    precision: Precision,
    n_samples: int,
    dtype: str,
    *,
    is_turned: bool,
    has_files: bool = True,
    is_direct: bool = False,
) -> int:
    """Give what gathering holds beside its result, at most.

    Parameters
    ----------
    grid, precision
        How samples are stored.
    n_samples
        Samples of the longest range.
    dtype
        What they are delivered as: NumPy's name, or ``"bfloat16"``.
    is_turned
        Whether values come before time.
    has_files
        Whether the backend has files (``Backend.files``).
    is_direct
        Whether they are read past the page cache.
    """
    alike = grid.sample_shape, grid.dtype, precision, dtype, n_samples
    form = _form_of(*alike, is_turned=is_turned, is_direct=is_direct)
    if not (IS_NATIVE and has_files):
        # NumPy takes whole samples, decodes int16 by way of float64, and narrows in four steps.
        decoded = {"exact": 0, "float16": 4, "float32": 4, "bfloat16": 8, "int16": 16}[precision]
        is_as_stored = form.stored == _AS_STORED
        of_value = form.stored_bytes + (0 if is_as_stored else decoded + (16 if dtype == "bfloat16" else 0))
        of_casting = 8 * np.getbufsize() if precision == "int16" else 0
        return _form_of(*alike, is_turned=True).n_piece * of_value + of_casting
    # Of shorter ranges more fit: all there is room for.
    of_slots = max(_SLOTS_BYTES, form.slots_bytes) + _BLOCK_BYTES if is_direct else 0
    of_scales = 2 * 8 * form.n_scales * _MAX_RANGES if form.scratch_bytes else 0
    return form.scratch_bytes + of_scales + of_slots


class _Form(NamedTuple):
    """How samples are gathered: what ``_native.gather`` is told of all ranges alike."""

    stored: int
    """Code of what is stored; ``_AS_STORED`` where it is delivered so."""
    stored_bytes: int
    """Of a value."""
    n_values: int
    """In a sample."""
    n_scales: int
    """Of int16: one per channel, or one where a sample is a single value; else none."""
    n_piece: int
    """Values that are widened at once: whole samples where they are turned."""
    scratch_bytes: int
    """For a piece as stored, widened and narrowed."""
    slot_bytes: int
    """Of one buffer that a piece is read into past the page cache; 0 through it."""
    slots_bytes: int
    """Of all of them."""


@lru_cache(maxsize=256)  # the same for batch after batch
def _form_of(
    sample_shape: tuple[int, ...],
    dtype: str,
    precision: Precision,
    delivered: str,
    n_samples: int,
    *,
    is_turned: bool,
    is_direct: bool = False,
) -> _Form:
    """Work out how ranges of ``n_samples`` at most are gathered."""
    stored = _PRECISIONS.get(precision) or _INTEGERS[dtype]
    if precision == delivered == "bfloat16" or (precision in ("exact", "float32") and dtype == delivered):
        stored = _AS_STORED
    stored_bytes, n_values = np.dtype(dtype).itemsize, math.prod(sample_shape)
    n_scales = (sample_shape or (1,))[-1] if precision == "int16" else 0
    step = n_values if is_turned else max(1, n_scales)
    n_piece = max(1, min(PIECE_VALUES, n_samples * n_values) // step) * step
    is_plain = stored == _AS_STORED and not is_turned
    scratch_bytes = 0 if is_plain else n_piece * (stored_bytes + 6) + 16
    slots = _slots(n_piece * stored_bytes) if is_direct else (0, 0)
    return _Form(stored, stored_bytes, n_values, n_scales, n_piece, scratch_bytes, *slots)


class _Own(threading.local):
    """What a thread keeps for as long as it lives: memory that is new for every batch costs too much."""

    def __init__(self) -> None:
        self.slots: NDArray[np.uint8] = np.empty(0, np.uint8)

    def slots_of(self, n_bytes: int) -> NDArray[np.uint8]:
        """Give memory for what is read past the page cache."""
        if len(self.slots) < n_bytes:
            # Mapped, and so given back when the thread ends: malloc would keep some megabytes for later.
            self.slots = np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)
        return self.slots[:n_bytes]


_own = _Own()


def _slots(piece_bytes: int) -> tuple[int, int]:
    """Give the bytes of one buffer that a piece is read into past the page cache, and of all of them."""
    slot_bytes = -(-(piece_bytes + _BLOCK_BYTES - 1) // _BLOCK_BYTES) * _BLOCK_BYTES
    depth = max(_LEAST_DEPTH, min(_DEPTH, _SLOTS_BYTES // slot_bytes))
    return slot_bytes, depth * slot_bytes + _BLOCK_BYTES


def gather(
    backend: Backend,
    ranges: Ranges,
    out: NDArray[Any],
    *,
    is_turned: bool,
    is_bfloat16: bool = False,
    is_direct: bool = False,
) -> None:
    """Fill rows of an array with ranges of samples.

    Parameters
    ----------
    backend
        Has the samples.
    ranges
        Which, and where they go; one chunk of them.
    out
        C-contiguous (row, value, time) if ``is_turned``, else (row, time, \\*sample shape): of the stored
        dtype where the precision is ``exact``, else float32; float32 in any case; or uint16 if
        ``is_bfloat16``.
    is_turned
        Whether values come before time.
    is_bfloat16
        Whether to narrow to bfloat16, as whose bits the uint16 are meant.
    is_direct
        Whether to read past the page cache, where ``can_gather_directly`` has said so.

    Raises
    ------
    StoreDamaged
        If a file is missing or cut short.
    """
    if not len(ranges) or not out.size:
        return
    # After a failure in another way, so that whoever knows says what is wrong, if it was no passing trouble.
    n_read = 0
    for is_past in ([True] if is_direct else []) + ([False] if IS_NATIVE else []):
        with suppress(OSError):  # the file system cannot: no more than a trial has said that it can
            rest = ranges.between(n_read, len(ranges)) if n_read else ranges
            n_read += _gather_natively(
                backend, rest, out, is_turned=is_turned, is_bfloat16=is_bfloat16, is_direct=is_past
            )
        if n_read == len(ranges):
            return
    _gather_plainly(
        backend, ranges.between(n_read, len(ranges)), out, is_turned=is_turned, is_bfloat16=is_bfloat16
    )


def can_gather_directly(backend: Backend, part: Part) -> bool:
    """Try whether samples can be read past the page cache here, many at once.

    Parameters
    ----------
    backend
        Has the samples.
    part
        Whose first sample is read.

    Returns
    -------
    bool
        False also where its file is damaged, which whoever reads it is told.
    """
    # A page of more than a block would be shared by two buffers, which a fork may part.
    if not (IS_NATIVE and hasattr(os, "O_DIRECT")) or mmap.PAGESIZE > _BLOCK_BYTES:
        return False
    precision: Precision = {"float16": "float16", "float32": "float32"}.get(part.grid.dtype, "exact")  # type: ignore[assignment]
    one = Ranges([part], precision, np.array([[0], [0], [1], [0], [0]]))
    dtype = part.grid.dtype if precision == "exact" else "float32"
    out = np.empty((1, 1, *part.grid.sample_shape), dtype)
    try:
        return _gather_natively(backend, one, out, is_turned=False, is_bfloat16=False, is_direct=True) == 1
    except (OSError, StoreDamaged):
        return False
    finally:
        _own.slots = np.empty(0, np.uint8)  # who tries is not who reads


def _gather_natively(
    backend: Backend,
    ranges: Ranges,
    out: NDArray[Any],
    *,
    is_turned: bool,
    is_bfloat16: bool,
    is_direct: bool,
) -> int:
    """Give how many ranges were read before one failed; none where samples lie in no file."""
    numbers, starts, lengths, rows, ats = map(np.ascontiguousarray, ranges.columns)
    files = backend.files([ranges.parts[number] for number in numbers.tolist()], is_direct=is_direct)
    if files is None:
        return 0
    grid = ranges.first.grid
    form = _form_of(
        grid.sample_shape,
        grid.dtype,
        ranges.precision,
        "bfloat16" if is_bfloat16 else _name_of(out.dtype),
        ranges.longest,
        is_turned=is_turned,
        is_direct=is_direct,
    )
    scale = offset = _NONE
    if ranges.scalings is not None:
        scale = np.stack([scaling.scale for scaling in ranges.scalings])
        offset = np.stack([scaling.offset for scaling in ranges.scalings])
    return _native.gather(
        array("i", [file.descriptor for file in files]),
        starts * grid.sample_bytes,
        lengths,
        rows,
        ats,
        scale,
        offset,
        out,
        np.empty(form.scratch_bytes, np.uint8),
        _own.slots_of(form.slots_bytes),
        form.slot_bytes,
        form.n_piece,
        form.stored,
        _BFLOAT16 if is_bfloat16 else _AS_STORED,
        form.stored_bytes,
        out.itemsize,
        form.n_values,
        out.shape[-1 if is_turned else 1],
        form.n_scales,
        is_turned,
        0 < _last_cache_bytes() < _CACHE_SHARE * out.nbytes,
    )


@cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """Give a dtype's name, which NumPy puts together anew every time."""
    return dtype.name


@cache
def _last_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Give the size of the processor's last cache, as Linux tells it; 0 where nobody does."""
    sizes = [re.fullmatch(r"(\d+)K", path.read_text().strip()) for path in root.glob("index*/size")]
    return max((int(size[1]) * 1024 for size in sizes if size), default=0)


def _gather_plainly(
    backend: Backend, ranges: Ranges, out: NDArray[Any], *, is_turned: bool, is_bfloat16: bool
) -> None:
    rows = np.moveaxis(out, -1, 1) if is_turned else out
    delivered = "bfloat16" if is_bfloat16 else out.dtype.name
    for number, (part_number, _, length, row, at) in enumerate(ranges.columns.T.tolist()):
        step = max(1, PIECE_VALUES // math.prod(ranges.parts[part_number].grid.sample_shape))
        for first in range(0, length, step):
            n = min(step, length - first)
            # No name for what is read: it would be held while the next piece is.
            rows[row, at + first : at + first + n] = _read(
                backend, ranges.between(number, number + 1), first, n, delivered
            ).reshape(n, *rows.shape[2:])


def _read(backend: Backend, one: Ranges, first: int, n_samples: int, delivered: str) -> NDArray[Any]:
    """Read and decode some samples of a single range."""
    part = one.first
    stored = np.empty((n_samples, *part.grid.sample_shape), part.grid.dtype)
    backend.read_into(part, int(one.start[0]) + first, stored)
    form = _form_of(part.grid.sample_shape, part.grid.dtype, one.precision, delivered, 1, is_turned=False)
    if form.stored == _AS_STORED:
        return stored
    values = decode(stored, one.precision, None if one.scalings is None else one.scalings[0])
    return encode(values, "bfloat16") if delivered == "bfloat16" else values


def hint(backend: Backend, ranges: Ranges, *, is_checked: bool = False) -> None:
    """Let the kernel read ranges ahead, where it can be told to.

    Parameters
    ----------
    backend
        Has the samples.
    ranges
        Which; those that overlap or touch are asked for once.
    is_checked
        Whether ``check`` is to come: it reads whole blocks.

    Raises
    ------
    StoreDamaged
        If a file is missing.
    """
    files = backend.files([ranges.parts[number] for number in ranges.part.tolist()])
    if files is None or not hasattr(os, "posix_fadvise"):
        return
    sample_bytes = ranges.first.grid.sample_bytes
    start, length = _whole_blocks(ranges) if is_checked else (ranges.start, ranges.length)
    firsts, n_bytes = start * sample_bytes, length * sample_bytes
    if IS_NATIVE:
        _native.hint(array("i", [file.descriptor for file in files]), firsts, n_bytes)
        return
    order = np.lexsort((firsts, ranges.part)).tolist()
    for number in order:
        first, n = int(firsts[number]), int(n_bytes[number])
        if n:  # no bytes would mean: up to the end of the file
            os.posix_fadvise(files[number].descriptor, first, n, os.POSIX_FADV_WILLNEED)


def is_cached(backend: Backend, ranges: Ranges) -> bool:
    """Look whether the middle of the first range is in the page cache, without waiting for a disk.

    Parameters
    ----------
    backend
        Has the samples.
    ranges
        At least one.

    Returns
    -------
    bool
        False also where the system cannot say.

    Raises
    ------
    StoreDamaged
        If a file is missing.
    """
    files = backend.files([ranges.first])
    if files is None or not hasattr(os, "RWF_NOWAIT"):
        return False
    middle = int(ranges.start[0]) + int(ranges.length[0]) // 2
    try:
        n_read = os.preadv(
            files[0].descriptor, [bytearray(1)], middle * ranges.first.grid.sample_bytes, os.RWF_NOWAIT
        )
    except OSError:  # it would have to wait, or the file system has no such question
        return False
    return n_read == 1


def _whole_blocks(ranges: Ranges) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the first sample and the count of samples of the blocks that each range lies in."""
    grids = [ranges.parts[number].grid for number in ranges.part.tolist()]
    of_block, of_part = np.array([(grid.block_samples, grid.n_samples) for grid in grids]).T
    start = ranges.start // of_block * of_block
    stop = np.minimum(-(-(ranges.start + ranges.length) // of_block) * of_block, of_part)
    return start, np.where(ranges.length > 0, stop - start, 0)


def check(backend: Backend, ranges: Ranges, checksums: Mapping[str, NDArray[np.uint32]]) -> None:
    """Compare every block that ranges touch with its checksum.

    Parameters
    ----------
    backend
        Has the samples.
    ranges
        Which.
    checksums
        Path of a part -> (block,) CRC32C.

    Raises
    ------
    StoreDamaged
        If a block differs, or a file is missing or cut short.
    """
    seen = set()
    for number, start, length in ranges.columns[:3].T.tolist():
        part = ranges.parts[number]
        for block in part.grid.blocks_of(start, start + length) if length else ():
            if (number, block) in seen:
                continue
            seen.add((number, block))
            first, last = part.grid.samples_of(block)
            # The last block is filled up with zeros, which its checksum covers.
            stored = np.zeros((part.grid.block_samples, *part.grid.sample_shape), part.grid.dtype)
            backend.read_into(part, first, stored[: last - first])
            if crc32c(stored) != checksums[part.path][block]:
                raise StoreDamaged(
                    f"Block {block} of {part.file} (samples {first} to {last}) is not what was written. "
                    "Run engram verify."
                )
