"""Which bytes of a part hold samples [start, stop): integers only, no I/O.

A part is one Zarr array of whole samples, cut into *blocks* (Zarr's inner chunks) of whole
samples. Uncompressed, its one shard file is::

    block 0 | block 1 | ... | last block, padded with zeros | index | CRC32C of the index

so that sample ``i`` begins at byte ``i * sample_bytes``, whatever the blocks. The index
holds, for every block, its offset and length as little-endian unsigned 64-bit integers.

References
----------
Zarr v3 specification, "sharding-indexed" codec, version 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from engram.errors import StoreFormatError

__all__ = ["BLOCK_BYTES", "Grid"]

BLOCK_BYTES = 128 * 1024
"""Upper size of a block of several samples.

Zarr readers fetch whole blocks, checksums are kept per block, and damage is located to a
block: small enough for all three, large enough that 512 MiB has 4,096 blocks.
"""


_DTYPES = frozenset(
    ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32"]
)


@dataclass(frozen=True, slots=True)
class Grid:
    """The geometry of one part.

    Raises
    ------
    StoreFormatError
        If it is none: a store from a stranger may say anything.

    Examples
    --------
    >>> grid = Grid(n_samples=1000, sample_shape=(129,), dtype="float16")
    >>> grid.sample_bytes, grid.block_samples, grid.n_blocks, grid.data_bytes
    (258, 508, 2, 262128)
    >>> grid.byte_range(10, 12), grid.blocks_of(500, 600)
    ((2580, 3096), range(0, 2))
    """

    n_samples: int
    """Samples in the part, without padding."""
    sample_shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """NumPy's name of the stored element type."""
    sample_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one sample."""

    def __post_init__(self) -> None:
        is_sane = self.n_samples >= 0 and all(length > 0 for length in self.sample_shape)
        if self.dtype not in _DTYPES or not is_sane:
            raise StoreFormatError(
                f"A part cannot have {self.n_samples} samples of {self.dtype} {self.sample_shape}. "
                "Do not use this store."
            )
        object.__setattr__(self, "sample_bytes", math.prod(self.sample_shape) * np.dtype(self.dtype).itemsize)

    @property
    def block_samples(self) -> int:
        """Samples per block: as many as fit ``BLOCK_BYTES``, at least one."""
        return max(1, BLOCK_BYTES // self.sample_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return self.block_samples * self.sample_bytes

    @property
    def n_blocks(self) -> int:
        """Blocks in the part; the last may be padded."""
        return -(-self.n_samples // self.block_samples)

    @property
    def data_bytes(self) -> int:
        """Bytes of all blocks, padding included: where the index begins."""
        return self.n_blocks * self.block_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the shard file."""
        return self.data_bytes + 16 * self.n_blocks + 4

    @property
    def chunk_name(self) -> str:
        """Zarr's relative path of the one shard file."""
        return "/".join(["c", *("0" for _ in range(1 + len(self.sample_shape)))])

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Give the bytes [first, last) of the shard file that hold samples [start, stop)."""
        return start * self.sample_bytes, stop * self.sample_bytes

    def blocks_of(self, start: int, stop: int) -> range:
        """Give the numbers of the blocks that hold samples [start, stop)."""
        return range(start // self.block_samples, -(-stop // self.block_samples))

    def samples_of(self, block: int) -> tuple[int, int]:
        """Give the samples [start, stop) of a block, without padding."""
        start = block * self.block_samples
        return start, min(start + self.block_samples, self.n_samples)

    def index(self) -> bytes:
        """Write the shard's index, without its checksum."""
        index = np.empty((self.n_blocks, 2), "<u8")
        index[:, 0] = np.arange(self.n_blocks, dtype=np.uint64) * np.uint64(self.block_bytes)
        index[:, 1] = self.block_bytes
        return index.tobytes()
