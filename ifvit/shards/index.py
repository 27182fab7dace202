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
from ifvit.shards.format import (
    IMAGE_ARRAYS,
    Manifest,
    ShardEntry,
    ShardError,
    parse_metadata,
    remedy_for,
)

ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Content of `NAME.index.npz`: arrays over the N samples and T captions of one shard.

    `keys` (N,) bytes. All other arrays are int64 and hold ABSENT where there is no such member:
    `moments` and `flipped` (N, 2) offset of the values in the tar and checksum, `metadata` (N, 3)
    offset, length and checksum, `label` (N,). Sample n has the captions first_caption[n] to
    first_caption[n + 1] - 1; `first_caption` is (N + 1,). Of each caption, `context` (T, 3) has
    offset, number of tokens and checksum of its context, and `source` (T,) the number of its
    source. `features` and `flipped_features` are like `moments`, and `context_scale` (T, 2) holds
    offset and checksum of the scales of 8-bit contexts; in a shard without them these are (0, 2),
    and the file does not have them.
    """

    keys: Array
    moments: Array
    flipped: Array
    metadata: Array
    label: Array
    first_caption: Array
    context: Array
    source: Array
    context_scale: Array = field(default_factory=lambda: _table([], 2))
    features: Array = field(default_factory=lambda: _table([], 2))
    flipped_features: Array = field(default_factory=lambda: _table([], 2))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_rows(self) -> int:
        """Number of samples and captions."""
        return len(self.keys) + len(self.context)

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


_OPTIONAL = ("features", "flipped_features", "context_scale")
"""Arrays of an index that a file lacks where the shard has no such members."""
_CONTEXTS = ("context", "context_lengths", "context_scale")
_SUFFIXES = (*(f"{name}.npy" for name in (*IMAGE_ARRAYS, *_CONTEXTS)), "json", "cls")
_PAX_PATH = re.compile(rb"\d{1,5} path=([^\n\0]{1,1000})\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    images: dict[str, list[tuple[int, int]]] = {name: [] for name in IMAGE_ARRAYS}
    metadata, labels, counts = [], [], [0]
    contexts: list[tuple[int, int, int]] = []
    scales: list[tuple[int, int]] = []
    sources: list[int] = []
    for key, members in read_tar(path):
        where = f"{path}: {key}"
        keys.append(key.encode())
        for name, entries in images.items():
            entries.append(_index_image(members.get(f"{name}.npy"), f"{where}.{name}.npy"))
        json = members["json"]
        metadata.append((json.offset, len(json.data), checksum(json.data)))
        found = parse_metadata(json.data, f"{where}.json")
        label = members.get("cls")
        labels.append(parse_label(label.data, f"{where}.cls") if label else ABSENT)
        counts.append(len(found.captions))
        sources += found.sources or [0] * len(found.captions)
        added, scaled = _index_contexts(members, len(found.captions), where)
        contexts += added
        scales += scaled
    for name in _OPTIONAL:
        if name in images and all(entry == (ABSENT, 0) for entry in images[name]):
            images[name] = []
    return ShardIndex(
        keys=np.array(keys, dtype=np.bytes_),
        metadata=_table(metadata, 3),
        label=np.array(labels, dtype=np.int64),
        first_caption=np.cumsum(counts, dtype=np.int64),
        context=_table(contexts, 3),
        source=np.array(sources, dtype=np.int64),
        context_scale=_table(scales, 2),
        **{name: _table(entries, 2) for name, entries in images.items()},
    )


def _index_image(member: Member | None, where: str) -> tuple[int, int]:
    """Offset and checksum of the values of an image's array."""
    if member is None:
        return ABSENT, 0
    array, offset = _parse_array(member, where)
    return offset, checksum(array.tobytes())


def _index_contexts(
    members: dict[str, Member], num_captions: int, where: str
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Rows of `context` and `context_scale` for the captions of one sample."""
    present = [members.get(f"{name}.npy") for name in _CONTEXTS]
    if present == [None, None, None]:
        return [(ABSENT, 0, 0)] * num_captions, []
    if present[0] is None or present[1] is None:
        raise ShardError(f"{where} has only one of context and context_lengths; encode again")
    tokens, offset = _parse_array(present[0], f"{where}.context.npy")
    lengths, _ = _parse_array(present[1], f"{where}.context_lengths.npy")
    right = lengths.ndim == 1 and lengths.dtype == np.int32 and len(lengths) == num_captions
    if not right or tokens.ndim != 2 or (lengths < 1).any() or lengths.sum() != len(tokens):
        raise ShardError(
            f"{where}: context {tokens.shape} and its {lengths.shape} lengths do not belong to "
            f"{num_captions} captions; encode again"
        )
    ends = lengths.cumsum(dtype=np.int64).tolist()
    parts = list(zip([0, *ends], ends, strict=False))
    row = tokens[0].nbytes
    contexts = [(offset + a * row, b - a, checksum(tokens[a:b].tobytes())) for a, b in parts]
    if present[2] is None:
        return contexts, []
    scale, offset = _parse_array(present[2], f"{where}.context_scale.npy")
    if scale.dtype != np.float32 or scale.shape != tokens.shape[:1]:
        raise ShardError(f"{where}: context_scale is {scale.dtype} {scale.shape}; encode again")
    return contexts, [
        (offset + a * scale.itemsize, checksum(scale[a:b].tobytes())) for a, b in parts
    ]


def _parse_array(member: Member, where: str) -> tuple[Array, int]:
    """Return a member's array, and the offset of its first value in the tar."""
    array = parse_npy(member.data, where, error=ShardError)
    if not array.flags.c_contiguous or array.size == 0:
        raise ShardError(f"{where} has the shape {array.shape} or order of columns; encode again")
    return array, member.offset + len(member.data) - array.nbytes


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
    stored = {k: array for k, array in vars(index).items() if k not in _OPTIONAL or len(array)}
    np.savez(buffer, allow_pickle=False, **stored)
    return buffer.getvalue()


def parse_index(data: bytes, where: str, manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Decode `NAME.index.npz`. Raises ShardError unless it fits the manifest and the tar's size."""
    arrays = parse_npz(data, where, error=ShardError)
    names = set(ShardIndex.__annotations__)
    if not names.difference(_OPTIONAL) <= set(arrays) <= names:
        raise ShardError(f"{where}: not an index of this format; encode again")
    index = ShardIndex(**arrays)
    for problem in _index_problems(index, manifest, entry):
        raise ShardError(f"{where}: {problem}; {remedy_for(entry)}")
    return index


def _index_problems(index: ShardIndex, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    num_samples, num_captions = entry.num_samples, entry.num_captions
    text = manifest.text
    shapes = {
        "keys": (num_samples,),
        "moments": (num_samples, 2),
        "flipped": (num_samples, 2),
        "metadata": (num_samples, 3),
        "label": (num_samples,),
        "first_caption": (num_samples + 1,),
        "context": (num_captions, 3),
        "source": (num_captions,),
        "context_scale": (num_captions if text and text.dtype == "int8" else 0, 2),
        "features": (num_samples if manifest.features else 0, 2),
        "flipped_features": (num_samples if manifest.features and manifest.flipped else 0, 2),
    }
    for name, shape in shapes.items():
        array: Array = getattr(index, name)
        is_right = array.dtype.kind == "S" if name == "keys" else array.dtype == np.int64
        if not is_right or array.shape != shape:
            yield f"{name} is {array.dtype} {array.shape}, the manifest says {shape}"
            return  # the checks below need the shapes
    names = (*IMAGE_ARRAYS, "context", "context_scale", "metadata")
    tables = [getattr(index, name) for name in names]
    offsets, length = np.concatenate([table[:, 0] for table in tables]), index.metadata[:, 1]
    # Offsets below 0 stand for absent arrays.
    if (np.append(offsets, length) > entry.num_bytes).any() or (length < 0).any():
        yield "an array lies outside the tar"
    first = index.first_caption
    is_inside = first[0] == 0 and first[-1] == num_captions and (first <= num_captions).all()
    if not is_inside or (np.diff(first) < (0 if manifest.classes else 1)).any():
        yield "first_caption does not rise from 0 to the number of captions"
    if text and not all(map(text.allows, np.unique(index.context[:, 1]).tolist())):
        yield f"a context has another number of tokens than {text.context_shape} allows"
    num_sources = max(1, len(manifest.caption_sources))
    if ((index.source < 0) | (index.source >= num_sources)).any():
        yield f"a caption's source is none of {num_sources}"
    labels = range(len(manifest.classes)) if manifest.classes else range(ABSENT, 0)
    if ((index.label < labels.start) | (index.label >= labels.stop)).any():
        yield f"label is not one of {len(manifest.classes)} classes"
