"""The one checksum of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram.store.crc import crc32c, file_crc32c


def test_the_polynomial_is_castagnoli() -> None:
    """The check value of CRC-32C in RFC 3720 and in every catalogue."""
    assert crc32c(b"123456789") == 0xE3069283


@given(st.binary(), st.binary())
def test_piece_by_piece_is_the_same_as_whole(first: bytes, second: bytes) -> None:
    """A checksum is extended by what follows."""
    assert crc32c(second, crc32c(first)) == crc32c(first + second)


def test_arrays_of_any_dtype_count_by_their_bytes() -> None:
    """float16 has no buffer format of its own in Python, and counts all the same."""
    array = np.arange(6, dtype=np.float16).reshape(2, 3)

    assert crc32c(array) == crc32c(array.tobytes())


def test_a_file_counts_as_its_bytes(tmp_path: Path) -> None:
    """Files longer than one read are no exception."""
    data = np.random.default_rng(0).bytes((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)

    assert file_crc32c(tmp_path / "file") == crc32c(data)
