"""Where samples lie in a part."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram.store.grid import BLOCK_BYTES, Grid

grids = st.builds(
    Grid,
    n_samples=st.integers(1, 5000),
    sample_shape=st.lists(st.integers(1, 300), max_size=3).map(tuple),
    dtype=st.sampled_from(["uint8", "float16", "float32", "int16"]),
)


@given(grids, st.data())
def test_a_range_of_samples_is_the_range_of_bytes_of_the_flat_array(grid: Grid, data: st.DataObject) -> None:
    """Sample i begins at byte i times the size of a sample, whatever the blocks."""
    start = data.draw(st.integers(0, grid.n_samples))
    stop = data.draw(st.integers(start, grid.n_samples))
    sample = np.dtype((grid.dtype, grid.sample_shape))

    assert grid.sample_bytes == sample.itemsize
    assert grid.byte_range(start, stop) == (start * sample.itemsize, stop * sample.itemsize)


@given(grids)
def test_blocks_cover_every_sample_once(grid: Grid) -> None:
    """The samples of all blocks, one after another, are the samples of the part."""
    covered = [i for block in range(grid.n_blocks) for i in range(*grid.samples_of(block))]

    assert covered == list(range(grid.n_samples))


@given(grids, st.data())
def test_the_blocks_of_a_range_are_those_that_share_a_sample_with_it(grid: Grid, data: st.DataObject) -> None:
    """Checksums of exactly these blocks cover the range."""
    start = data.draw(st.integers(0, grid.n_samples - 1))
    stop = data.draw(st.integers(start + 1, grid.n_samples))
    sharing = [
        block
        for block in range(grid.n_blocks)
        if max(start, grid.samples_of(block)[0]) < min(stop, grid.samples_of(block)[1])
    ]

    assert list(grid.blocks_of(start, stop)) == sharing


@given(grids)
def test_a_block_is_at_most_128_kib_unless_one_sample_is_larger(grid: Grid) -> None:
    """A 9 MB volume is a block of its own; small samples share one."""
    assert grid.block_samples == 1 or grid.block_bytes <= BLOCK_BYTES


def test_the_index_is_offset_and_length_per_block_in_little_endian() -> None:
    """Zarr's sharding codec: two unsigned 64-bit integers per block."""
    grid = Grid(n_samples=3, sample_shape=(100_000,), dtype="uint8")

    assert grid.index() == b"".join(
        (block * 100_000).to_bytes(8, "little") + (100_000).to_bytes(8, "little") for block in range(3)
    )
    assert grid.file_bytes == 3 * 100_000 + 3 * 16 + 4
