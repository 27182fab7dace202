"""Arrays read out of shards into the rows of a batch by one call, each compared with its checksum.

Called from Python, reading and hashing take Python's lock and give it away three times a sample:
reading threads wait for each other, and training for them. So the loop over the rows is compiled.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache

import numpy as np

from ifvit.shards.records import Array

_Loop = Callable[[Array, Array, Array, Array, Array], int]


def read_rows(
    descriptors: list[int], offsets: Array, checksums: Array, rows: Array, out: Array
) -> int | None:
    """Fill `out[rows]` of a contiguous `out`; the B-th of them from the B-th file and offset.

    `descriptors`, `offsets`, `checksums`, `rows`: (B,) int64, checksums as the index has them.
    => the first number in B whose bytes are not as its checksum says, None: all are.
    """
    as_bytes = out.reshape(len(out), -1, copy=False).view(np.uint8)
    # The index holds XXH3's canonical bytes, the highest first, read as if the lowest were.
    expected = checksums.byteswap()
    done = _compiled()(np.array(descriptors), offsets, expected, rows, as_bytes)
    return done if done < len(rows) else None


@cache
def _compiled() -> _Loop:
    """Half a second, once a process that reads."""
    from numba import njit, types

    ints, matrix = types.int64[:], types.uint8[:, ::1]
    compiled: _Loop = njit(types.int64(ints, ints, ints, ints, matrix), nogil=True)(_read_rows)
    return compiled


def _read_rows(
    descriptors: Array, offsets: Array, checksums: Array, rows: Array, out: Array
) -> int:
    size = out.shape[1]
    for number in range(len(rows)):
        address = out[rows[number]].ctypes.data
        for attempt in range(2):  # a signal may cut a read short on file systems of the network
            # Not by memory map: reading a file that was cut short would kill the process (SIGBUS).
            found = _pread(descriptors[number], address, size, offsets[number])
            if found == size and _xxh3(address, size) == checksums[number]:
                break
            if attempt:
                return number
    return len(rows)


# Compiled code may call C functions, and of Python's xxhash only those in its library. The one
# that chooses the processor's widest instructions exists on x86 alone.
_library = importlib.util.find_spec("xxhash._xxhash")
assert _library is not None
_hashes = ctypes.CDLL(_library.origin)
_xxh3 = getattr(_hashes, "XXH3_64bits_dispatch", _hashes.XXH3_64bits)
_xxh3.argtypes, _xxh3.restype = (ctypes.c_size_t, ctypes.c_size_t), ctypes.c_int64
_pread = ctypes.CDLL(None).pread
_pread.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64)
_pread.restype = ctypes.c_ssize_t
