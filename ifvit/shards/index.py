"""Tars of samples and the index beside each: offsets and checksums of all arrays.

A tar is read from front to back by `read_tar`, which accepts only plain files of samples. The index
is made from it once; readers check the index when they parse it, and then trust its offsets.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from ifvit import storage
from ifvit.arrays import Array, parse_npy, parse_npz
from ifvit.records import MAX_BYTES, is_plain_name, shorten
from ifvit.shards.format import IMAGE_ARRAYS, Manifest, ShardEntry, ShardError, remedy_for

ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Content of `NAME.index.npz`: arrays over the N samples and T captions of one shard.

    `keys` (N,) bytes. All other arrays are int64 and hold ABSENT where there is no such member:
    `moments` and `flipped` (N, 2) offset of the values in the tar and checksum, `metadata` (N, 3)
    offset, length and checksum, `label` (N,), `context` (T, 2) offset and checksum of each
    caption's embedding. Sample n has the captions first_caption[n] to first_caption[n + 1] - 1;
    `first_caption` is (N + 1,). `features` and `flipped_features` are like `moments`; in a shard
    without features they are (0, 2), and the file does not have them.
    """

    keys: Array
    moments: Array
    flipped: Array
    metadata: Array
    label: Array
    context: Array
    first_caption: Array
    features: Array = field(default_factory=lambda: _table([], 2))
    flipped_features: Array = field(default_factory=lambda: _table([], 2))

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, row: int) -> range:
        """Rows of `context` with the captions of sample number `row`."""
        return range(int(self.first_caption[row]), int(self.first_caption[row + 1]))


def checksum(data: bytes | memoryview) -> int:
    """XXH3 hash of the bytes as a signed 64-bit integer."""
    return int.from_bytes(xxhash.xxh3_64_digest(data), "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Content of a file in a tar, and the offset of its first byte."""

    offset: int
    data: bytes


_FEATURES = ("features", "flipped_features")
_SUFFIXES = (
    *("moments.npy", "flipped.npy", "context.npy", "json", "cls"),
    *(f"{name}.npy" for name in _FEATURES),
)
_PAX_PATH = re.compile(rb"\d{1,5} path=([^\n\0]{1,1000})\n")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_CAPTIONS = 10_000


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key of each sample and its members by suffix, in the order of the tar.

    Raises ShardError for a tar that holds anything but plain files of samples.
    """
    keys: set[str] = set()
    sample: dict[str, Member] = {}
    key = ""
    for name, member in _read_members(path):
        stem, _, suffix = name.partition(".")
        # A key names a file and has no dot; names that are no UTF-8 have surrogates.
        is_key = is_plain_name(stem) and "." not in stem and not _SURROGATE.search(stem)
        if not is_key or suffix not in _SUFFIXES:
            raise ShardError(f"{path}: {shorten(name)} is no member of a sample; encode again")
        if stem != key:
            if key:
                yield key, _complete(path, key, sample)
            key, sample = stem, {}
        if suffix in sample or (not sample and key in keys):
            raise ShardError(f"{path}: has {name} twice; encode again")
        keys.add(key)
        sample[suffix] = member
    if key:
        yield key, _complete(path, key, sample)


def _complete(path: Path, key: str, sample: dict[str, Member]) -> dict[str, Member]:
    for suffix in ("moments.npy", "json"):
        if suffix not in sample:
            raise ShardError(f"{path}: has no {key}.{suffix}; encode again")
    return sample


def _read_members(path: Path) -> Iterator[tuple[str, Member]]:
    """Yield names and members of a tar of plain files, as TarWriter writes it.

    tarfile's reader would follow sparse files, which fill the memory, and its regular expressions
    for extended headers take quadratic time.
    """
    long_name = None
    with storage.open_file(path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        while (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise ShardError(f"{path}: not a tar of samples ({error}); encode again") from None
            name, offset = long_name or info.name, file.tell()
            is_path = info.type == tarfile.XHDTYPE and long_name is None
            if not is_path and info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise ShardError(f"{path}: {shorten(name)} is not a plain file; encode again")
            if not 0 <= info.size <= min(MAX_BYTES, num_bytes - offset):
                raise ShardError(f"{path}: {shorten(name)} states {info.size} bytes; encode again")
            data, long_name = file.read(info.size), None
            file.seek(-info.size % tarfile.BLOCKSIZE, io.SEEK_CUR)
            if is_path:
                found = _PAX_PATH.fullmatch(data)
                if found is None:
                    raise ShardError(f"{path}: has an extended header without path; encode again")
                long_name = found[1].decode(errors="surrogateescape")
            else:
                yield name, Member(offset=offset, data=data)
    if len(block) < tarfile.BLOCKSIZE:
        raise ShardError(f"{path}: not a complete tar; encode again")


def index_tar(path: Path) -> ShardIndex:
    """Build the index of a tar by reading it once. Raises as `read_tar` does."""
    keys: list[bytes] = []
    entries: dict[str, list[list[tuple[int, ...]]]] = {suffix: [] for suffix in _SUFFIXES}
    for key, members in read_tar(path):
        keys.append(key.encode())
        for suffix in _SUFFIXES:
            where = f"{path}: {key}.{suffix}"
            member = members.get(suffix)
            entries[suffix].append(_index_entries(suffix, member, where) if member else [])
    absent = [(ABSENT, 0)]
    contexts = entries["context.npy"]
    features = {name: entries[f"{name}.npy"] for name in _FEATURES}
    return ShardIndex(
        keys=np.array(keys, dtype=np.bytes_),
        moments=_table([found[0] for found in entries["moments.npy"]], 2),
        flipped=_table([(found or absent)[0] for found in entries["flipped.npy"]], 2),
        metadata=_table([found[0] for found in entries["json"]], 3),
        label=np.array([(found or absent)[0][0] for found in entries["cls"]], dtype=np.int64),
        context=_table([entry for found in contexts for entry in found], 2),
        first_caption=np.cumsum([0, *map(len, contexts)], dtype=np.int64),
        **{
            name: _table([(one or absent)[0] for one in found] if any(found) else [], 2)
            for name, found in features.items()
        },
    )


def _index_entries(suffix: str, member: Member, where: str) -> list[tuple[int, ...]]:
    """Index entries of one tar member; for `cls` its label."""
    data = member.data
    if suffix == "cls":
        return [(parse_label(data, where),)]
    if suffix == "json":
        return [(member.offset, len(data), checksum(data))]
    array = parse_npy(data, where, error=ShardError)
    rows = array if suffix == "context.npy" and array.shape else array[None]
    if not array.flags.c_contiguous or array.size == 0 or len(rows) > _MAX_CAPTIONS:
        raise ShardError(f"{where} has the shape {array.shape} or order of columns; encode again")
    start, size = member.offset + len(data) - array.nbytes, array.nbytes // len(rows)
    return [(start + n * size, checksum(row.tobytes())) for n, row in enumerate(rows)]


def parse_label(data: bytes, where: str) -> int:
    """Parse the content of `KEY.cls`. Raises ShardError unless it is a small number."""
    if not re.fullmatch(rb"\d{1,9}", data):
        text = shorten(data.decode(errors="replace"))
        raise ShardError(f"{where} is {text}, not the number of a class; encode again")
    return int(data)


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Array:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


def index_bytes(index: ShardIndex) -> bytes:
    """Encode an index as `NAME.index.npz`; equal indexes give equal bytes."""
    buffer = io.BytesIO()
    stored = {k: array for k, array in vars(index).items() if k not in _FEATURES or len(array)}
    np.savez(buffer, allow_pickle=False, **stored)
    return buffer.getvalue()


def parse_index(data: bytes, where: str, manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Decode `NAME.index.npz`. Raises ShardError unless it fits the manifest and the tar's size."""
    arrays = parse_npz(data, where, error=ShardError)
    names = set(ShardIndex.__annotations__)
    if not names.difference(_FEATURES) <= set(arrays) <= names:
        raise ShardError(f"{where}: not an index of this format; encode again")
    index = ShardIndex(**arrays)
    for problem in _index_problems(index, manifest, entry):
        raise ShardError(f"{where}: {problem}; {remedy_for(entry)}")
    return index


def _index_problems(index: ShardIndex, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    num_samples, num_captions = entry.num_samples, entry.num_captions
    shapes = {
        "keys": (num_samples,),
        "moments": (num_samples, 2),
        "flipped": (num_samples, 2),
        "metadata": (num_samples, 3),
        "label": (num_samples,),
        "context": (num_captions, 2),
        "first_caption": (num_samples + 1,),
        "features": (num_samples if manifest.features else 0, 2),
        "flipped_features": (num_samples if manifest.features and manifest.flipped else 0, 2),
    }
    for name, shape in shapes.items():
        array: Array = getattr(index, name)
        is_right = array.dtype.kind == "S" if name == "keys" else array.dtype == np.int64
        if not is_right or array.shape != shape:
            yield f"{name} is {array.dtype} {array.shape}, the manifest says {shape}"
            return  # the checks below need the shapes
    tables = [getattr(index, name) for name in (*IMAGE_ARRAYS, "context", "metadata")]
    offsets, length = np.concatenate([table[:, 0] for table in tables]), index.metadata[:, 1]
    # Offsets below 0 stand for absent arrays.
    if (np.append(offsets, length) > entry.num_bytes).any() or (length < 0).any():
        yield "an array lies outside the tar"
    first = index.first_caption
    is_inside = first[0] == 0 and first[-1] == num_captions and (first <= num_captions).all()
    if not is_inside or (np.diff(first) < (1 if manifest.text else 0)).any():
        yield "first_caption does not rise from 0 to the number of captions"
    labels = range(len(manifest.classes)) if manifest.classes else range(ABSENT, 0)
    if ((index.label < labels.start) | (index.label >= labels.stop)).any():
        yield f"label is not one of {len(manifest.classes)} classes"
