"""Rows are read and compared by compiled code; Python's own reading and XXH3 are the reference."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ifvit.shards.format import Array, checksum
from ifvit.shards.reader import read_rows

NUM_BYTES = 5000


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(0).bytes(NUM_BYTES)


@pytest.fixture
def descriptor(tmp_path: Path, data: bytes) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def checksums(data: bytes, offsets: Array, size: int) -> Array:
    """What an index would hold for the pieces at `offsets`."""
    return np.array([checksum(data[start : start + size]) for start in offsets.tolist()])


@pytest.mark.parametrize("size", [1, 3, 8, 16, 100, 240, 241, 1024, 3001])  # XXH3's cases
def test_rows_come_from_their_places(descriptor: int, data: bytes, size: int) -> None:
    offsets = np.array([1999, 0, NUM_BYTES - size])
    rows = np.array([3, 0, 4])
    out = np.full((6, size), 7, np.uint8)
    expected = checksums(data, offsets, size)
    assert read_rows([descriptor] * 3, offsets, expected, rows, out) is None
    for start, row in zip(offsets.tolist(), rows.tolist(), strict=True):
        assert out[row].tobytes() == data[start : start + size]
    assert (out[[1, 2, 5]] == 7).all()


def test_the_first_row_with_other_bytes_is_named(descriptor: int, data: bytes) -> None:
    offsets, out = np.arange(0, 4000, 1000), np.empty((4, 1000), np.uint8)
    expected = checksums(data, offsets, 1000)
    for number in (3, 1):
        os.pwrite(descriptor, bytes([data[1000 * number + 999] ^ 1]), 1000 * number + 999)
        assert read_rows([descriptor] * 4, offsets, expected, np.arange(4), out) == number


def test_a_row_past_the_end_of_the_file_is_named(descriptor: int, data: bytes) -> None:
    offsets, out = np.arange(0, 4000, 1000), np.empty((4, 1000), np.uint8)
    expected = checksums(data, offsets, 1000)
    os.truncate(descriptor, 2999)
    assert read_rows([descriptor] * 4, offsets, expected, np.arange(4), out) == 2


def test_an_array_with_gaps_is_refused_not_copied() -> None:
    with pytest.raises(ValueError, match="copy"):
        read_rows([], np.array([0]), np.array([0]), np.array([0]), np.empty((1, 3, 4))[..., :2])
