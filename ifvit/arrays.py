"""Files of arrays, `.npy` and `.npz`, that may come from strangers.

numpy.load believes the header of a file: it allocates what the header states and evaluates text as
Python. These functions accept only what numpy.save and numpy.savez write for numbers and texts, and
only when header and file have the same size.
"""

import io
import math
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifvit.errors import UserError
from ifvit.records import MAX_BYTES, shorten

Array = NDArray[Any]

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00.."
    rb"\{'descr': '(<f[248]|<[iu][248]|\|[biu]1|<U[1-9]\d{0,4}|\|S[1-9]\d{0,4})', "
    rb"'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}(?:, \d{1,15}){0,7},?)?)\), \} *\n",
    re.DOTALL,
)
_MAX_SIZE = 1 << 40
_MAX_MEMBERS = 1000


def parse_npy(data: bytes, where: str, *, error: type[UserError] = UserError) -> Array:
    """Parse a whole `.npy` file. Raises `error` naming `where` unless it fits the file's size."""
    found = _HEADER.match(data[:4096])
    if found is None:
        raise error(f"{where}: not an array of numbers or texts as numpy.save writes it")
    dtype = np.dtype(found[1].decode())
    shape = tuple(int(size) for size in found[3].split(b",") if size)
    # A shape such as (0, 10**15) needs no bytes, but is too large for numpy.
    is_huge = math.prod(max(size, 1) for size in shape) > _MAX_SIZE
    if is_huge or math.prod(shape) * dtype.itemsize != len(data) - found.end():
        raise error(f"{where}: {len(data)} bytes cannot hold {dtype} of shape {shorten(shape)}")
    values = np.frombuffer(data, dtype, offset=found.end())
    return values.reshape(shape, order="F" if found[2] == b"True" else "C").copy(order="K")


def npy_bytes(array: Array) -> bytes:
    """Encode an array as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_npz(
    data: bytes, where: str, *, max_bytes: int = MAX_BYTES, error: type[UserError] = UserError
) -> dict[str, Array]:
    """Parse a whole `.npz` file, compressed or not. Raises `error` naming `where`.

    The arrays may take `max_bytes` in all, so that a small file cannot fill the memory.
    """
    arrays = {}
    try:
        members = list(_read_members(data, max_bytes))
    except Exception as problem:  # zipfile raises about a dozen kinds
        raise error(f"{where}: not an intact .npz file ({shorten(problem)})") from None
    for name, content in members:
        arrays[name.removesuffix(".npy")] = parse_npy(content, f"{where}, {name}", error=error)
    return arrays


def _read_members(data: bytes, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a zip file. Raises errors of many kinds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS or len({member.filename for member in members}) < len(
            members
        ):
            raise UserError("too many members or two of one name")
        if sum(member.file_size for member in members) > max_bytes:
            raise UserError(f"its arrays take more than {max_bytes:,} bytes")
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError("unknown compression")
            with archive.open(member) as file:
                # Reading with a size bounds what is decompressed, whatever the directory states.
                yield member.filename, file.read(member.file_size)
