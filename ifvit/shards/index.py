"""The index beside each shard: where every array of every sample lies, and its checksum.

With it one caption's embedding is read without the others, and each read is checked at the moment
of use: a flipped bit anywhere is found before a batch holds it.
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from ifvit.shards.records import Array, ShardError

ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Arrays over the N samples of one shard, all int64 but `keys` (N,) bytes.

    `moments`, `flipped`: (N, 2) offset past the npy header and checksum, ABSENT where there is
    none. `metadata`: (N, 3) offset, length, checksum. `label` (N,), ABSENT in captioned sets.
    `context` (T, 2) offset and checksum of every caption's embedding, sample by sample; those of
    sample n are the rows first_caption[n] ... first_caption[n + 1] - 1, `first_caption` (N + 1,).
    """

    keys: Array
    moments: Array
    flipped: Array
    metadata: Array
    label: Array
    context: Array
    first_caption: Array

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_captions(self) -> Array:
        """(N,) captions of each sample."""
        counts: Array = np.diff(self.first_caption)
        return counts


def checksum(data: bytes | memoryview) -> int:
    """XXH3 of the bytes, as the int64 that the index holds."""
    return int.from_bytes(xxhash.xxh3_64_digest(data), "little", signed=True)


def index_tar(path: Path) -> ShardIndex:
    """Index a tar of samples by reading it once."""
    rows: dict[str, _Row] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            rows.setdefault(key, _Row()).add(suffix, member, file)
    return _collect(rows)


def index_bytes(index: ShardIndex) -> bytes:
    """The content of `NAME.index.npz`; equal indexes give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **vars(index))
    return buffer.getvalue()


def parse_index(data: bytes, where: str) -> ShardIndex:
    """The inverse of `index_bytes`. Raises ShardError when it is of another format."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if set(arrays) != set(ShardIndex.__annotations__):
            raise ShardError(f"{where}: not an index of this format; encode again")
        return ShardIndex(**arrays)


class _Row:
    """One sample while the tar is read."""

    def __init__(self) -> None:
        self.arrays = {"moments": (ABSENT, 0), "flipped": (ABSENT, 0)}
        self.metadata = (ABSENT, 0, 0)
        self.label = ABSENT
        self.context: list[tuple[int, int]] = []

    def add(self, suffix: str, member: tarfile.TarInfo, file: IO[bytes]) -> None:
        file.seek(member.offset_data)
        data = file.read(member.size)
        if suffix == "json":
            self.metadata = (member.offset_data, member.size, checksum(data))
        elif suffix == "cls":
            self.label = int(data)
        else:
            header, rows = _split_npy(data)
            start = member.offset_data + header
            if suffix == "context.npy":
                size = len(rows[0]) if len(rows) else 0
                self.context = [(start + i * size, checksum(row)) for i, row in enumerate(rows)]
            else:
                payload = memoryview(data)[header:]
                self.arrays[suffix.removesuffix(".npy")] = (start, checksum(payload))


def _split_npy(data: bytes) -> tuple[int, list[memoryview]]:
    """`.npy` bytes => length of the header, and the bytes of each row along the first axis."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    assert version == (1, 0), version
    shape, _, _ = np.lib.format.read_array_header_1_0(buffer)
    header = buffer.tell()
    size = (len(data) - header) // max(shape[0], 1)
    view = memoryview(data)
    return header, [view[header + i * size : header + (i + 1) * size] for i in range(shape[0])]


def _collect(rows: dict[str, _Row]) -> ShardIndex:
    samples = list(rows.values())
    counts = [len(row.context) for row in samples]
    return ShardIndex(
        keys=np.array([key.encode() for key in rows], dtype=np.bytes_),
        moments=_table([row.arrays["moments"] for row in samples], 2),
        flipped=_table([row.arrays["flipped"] for row in samples], 2),
        metadata=_table([row.metadata for row in samples], 3),
        label=np.array([row.label for row in samples], dtype=np.int64),
        context=_table([entry for row in samples for entry in row.context], 2),
        first_caption=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
    )


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Array:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)
