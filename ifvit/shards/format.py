"""File formats of a dataset of shards: sample records, manifest, and the index beside each shard.

The encode job (data_pipeline) writes these files and `ShardReader` reads them. A dataset holds
`manifest.json`, the null context, and `NAME.tar` and `NAME.index.npz` for each shard.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import xxhash

from ifvit import storage
from ifvit.arrays import Array, parse_npy_header, parse_npz
from ifvit.errors import UserError
from ifvit.records import (
    MAX_BYTES,
    PositiveInt,
    Rule,
    Sha256,
    is_plain_name,
    parse_json,
    parse_sealed,
    record,
    shorten,
)

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
NULL_CONTEXT = "null_context.npy"
COMPLETED = "completed"
"""Folder of the completion markers that the encode job writes beside the shards."""
RESIZE = "center_crop+lanczos"

MAX_VALUES = 1 << 28
"""Largest number of values of one latent or context; a manifest with more is refused."""
Count = Annotated[int, Rule("from 0 to 2**40", lambda value: 0 <= value <= 1 << 40)]
ShardName = Annotated[
    str,
    Rule(
        "a plain file name of at most 200 bytes",
        lambda name: is_plain_name(name) and len(name.encode()) <= 200,
    ),
]
LatentStd = Annotated[float, Rule("from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6)]


class ShardError(UserError):
    """A shard, index or manifest is missing, damaged or of another format."""


@record
class EncoderIdentity:
    """Frozen encoder that made the data: the name it was loaded by, the sha256 of its weights."""

    name: str
    sha256: Sha256


@record
class SampleMetadata:
    """Content of `KEY.json`; `captions` is empty in a dataset with class labels.

    `width` and `height` are the size of the original image in pixels.
    """

    image_id: int | str
    captions: tuple[str, ...]
    width: PositiveInt
    height: PositiveInt


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One image as the encode job writes it.

    `moments` (2C, H, W) are the unscaled mean and logvar of the VAE posterior, stacked along the
    channel axis, and `flipped` those of the horizontally flipped image. A sample has either
    `context` (captions, M, D) or `label`. `key` contains no dot and no slash, because WebDataset
    ends a key there.
    """

    key: str
    moments: Array
    context: Array | None = None
    label: int | None = None
    flipped: Array | None = None
    metadata: SampleMetadata


@record
class ShardEntry:
    """Sizes and hashes of `NAME.tar` and `NAME.index.npz`."""

    name: ShardName
    num_samples: Count
    num_captions: Count
    num_bytes: Count
    sha256: Sha256
    index_sha256: Sha256


@record
class TextEncoding:
    """How captions were embedded: encoder, shape (M, D) of a context, hash of the null context."""

    encoder: EncoderIdentity
    context_shape: tuple[PositiveInt, PositiveInt]
    null_context_sha256: Sha256

    def __post_init__(self) -> None:
        if prod(self.context_shape) > MAX_VALUES:
            raise UserError(f"context_shape {self.context_shape} has more than {MAX_VALUES} values")


@record
class Manifest:
    """Content of `manifest.json`: the shards of a dataset and how they were made.

    `text` is None in a dataset with class labels, `classes` is empty in one with captions.
    `latent_mean` and `latent_std` are statistics of z = mean + std * eps over all elements of all
    latents.
    """

    format_version: int = FORMAT_VERSION
    vae: EncoderIdentity
    text: TextEncoding | None
    classes: tuple[str, ...] = ()
    image_size: PositiveInt
    resize: str = RESIZE
    flipped: bool = False
    dtype: Literal["float16", "float32"]
    moments_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    num_samples: PositiveInt
    num_captions: Count
    latent_mean: float
    latent_std: LatentStd
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        for key in ("num_samples", "num_captions"):
            total = sum(getattr(entry, key) for entry in self.shards)
            if total != getattr(self, key):
                raise UserError(f"{key} is not the sum over its shards, {total}")
        if len({entry.name for entry in self.shards}) < len(self.shards):
            raise UserError("two shards have the same name")
        if (self.text is None) != bool(self.classes):
            raise UserError("a dataset has either text or classes")
        if self.moments_shape[0] % 2 or prod(self.moments_shape) > MAX_VALUES:
            raise UserError(
                f"moments_shape is {self.moments_shape}; it must be (2C, H, W) with at most "
                f"{MAX_VALUES} values"
            )

    @property
    def scaling_factor(self) -> float:
        """Factor that gives the latents unit standard deviation."""
        return 1.0 / self.latent_std


def write_manifest(url: str, manifest: Manifest) -> None:
    """Write `url/manifest.json`, which completes the dataset."""
    storage.write_sealed(storage.join(url, MANIFEST), manifest)


def read_manifest(url: str) -> Manifest:
    """Read `url/manifest.json`. Raises ShardError if it is absent, damaged or another version."""
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise ShardError(
            f"{where}: no such file; {url} is not a dataset, or its encode job has not finished"
        )
    data = storage.read_bytes(where)
    try:
        version = parse_json(dict[str, object], data, where).get("format_version")
        if version == FORMAT_VERSION:
            return parse_sealed(Manifest, data, where)
    except UserError as error:
        raise ShardError(f"{error}; download it or run the encode again") from None
    raise ShardError(
        f"{where}: format_version is {shorten(version)}, expected {FORMAT_VERSION}; encode the "
        "images again or install the version of ifvit that wrote it"
    )


def parse_metadata(data: bytes, where: str) -> SampleMetadata:
    """Parse the content of `KEY.json`. Raises ShardError that names the sample, `where`."""
    return parse_json(SampleMetadata, data, where, error=ShardError)


def remedy_for(entry: ShardEntry) -> str:
    """Advice for a damaged shard: without its completion marker, the encode job makes it again."""
    return f"delete {COMPLETED}/{entry.name}.json and run the encode again"


ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Content of `NAME.index.npz`: arrays over the N samples and T captions of one shard.

    `keys` (N,) bytes. All other arrays are int64 and hold ABSENT where there is no such member:
    `moments` and `flipped` (N, 2) offset of the values in the tar and checksum, `metadata` (N, 3)
    offset, length and checksum, `label` (N,), `context` (T, 2) offset and checksum of each
    caption's embedding. Sample n has the captions first_caption[n] to first_caption[n + 1] - 1;
    `first_caption` is (N + 1,).
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

    def captions(self, row: int) -> range:
        """Rows of `context` with the captions of sample number `row`."""
        return range(int(self.first_caption[row]), int(self.first_caption[row + 1]))

    @property
    def caption_counts(self) -> Array:
        """(N,) number of captions of each sample."""
        counts: Array = np.diff(self.first_caption)
        return counts


def checksum(data: bytes | memoryview) -> int:
    """XXH3 hash of the bytes as a signed 64-bit integer."""
    return int.from_bytes(xxhash.xxh3_64_digest(data), "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Content of a file in a tar, and the offset of its first byte."""

    offset: int
    data: bytes


_SUFFIXES = ("moments.npy", "flipped.npy", "context.npy", "json", "cls")
_PAX_PATH = re.compile(rb"\d{1,5} path=([^\n\0]{1,1000})\n")
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
        if not is_key(stem) or suffix not in _SUFFIXES:
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


def is_key(text: str) -> bool:
    """Whether `text` may be the key of a sample: it names a file and has no dot."""
    has_surrogates = any("\ud800" <= char <= "\udfff" for char in text)  # not UTF-8
    return is_plain_name(text) and "." not in text and not has_surrogates


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
    return ShardIndex(
        keys=np.array(keys, dtype=np.bytes_),
        moments=_table([found[0] for found in entries["moments.npy"]], 2),
        flipped=_table([(found or absent)[0] for found in entries["flipped.npy"]], 2),
        metadata=_table([found[0] for found in entries["json"]], 3),
        label=np.array([(found or absent)[0][0] for found in entries["cls"]], dtype=np.int64),
        context=_table([entry for found in contexts for entry in found], 2),
        first_caption=np.cumsum([0, *map(len, contexts)], dtype=np.int64),
    )


def _index_entries(suffix: str, member: Member, where: str) -> list[tuple[int, ...]]:
    """Index entries of one tar member; for `cls` its label."""
    data = member.data
    if suffix == "cls":
        return [(parse_label(data, where),)]
    if suffix == "json":
        return [(member.offset, len(data), checksum(data))]
    header = parse_npy_header(data, where, error=ShardError)
    num_rows = header.shape[0] if suffix == "context.npy" and header.shape else 1
    if header.is_fortran or 0 in header.shape or num_rows > _MAX_CAPTIONS:
        raise ShardError(f"{where} has the shape {header.shape} or order of columns; encode again")
    size = (len(data) - header.offset) // num_rows
    view = memoryview(data)
    starts = [header.offset + row * size for row in range(num_rows)]
    return [(member.offset + start, checksum(view[start : start + size])) for start in starts]


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
    np.savez(buffer, allow_pickle=False, **vars(index))
    return buffer.getvalue()


def parse_index(data: bytes, where: str, manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Decode `NAME.index.npz`. Raises ShardError unless it fits the manifest and the tar's size."""
    arrays = parse_npz(data, where, error=ShardError)
    if set(arrays) != set(ShardIndex.__annotations__):
        raise ShardError(f"{where}: not an index of this format; encode again")
    index = ShardIndex(**arrays)
    for problem in _index_problems(index, manifest, entry):
        raise ShardError(f"{where}: {problem}; {remedy_for(entry)}")
    return index


def _index_problems(index: ShardIndex, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    num_samples, num_captions = entry.num_samples, entry.num_captions
    shapes = {
        **{"keys": (num_samples,), "label": (num_samples,), "metadata": (num_samples, 3)},
        **{"moments": (num_samples, 2), "flipped": (num_samples, 2), "context": (num_captions, 2)},
        "first_caption": (num_samples + 1,),
    }
    for name, shape in shapes.items():
        array: Array = getattr(index, name)
        is_right = array.dtype.kind == "S" if name == "keys" else array.dtype == np.int64
        if not is_right or array.shape != shape:
            yield f"{name} is {array.dtype} {array.shape}, the manifest says {shape}"
            return  # the checks below need the shapes
    if not _are_keys(index.keys.tolist()):
        yield "keys are not unique names without dots"
    itemsize = np.dtype(manifest.dtype).itemsize
    latent = prod(manifest.moments_shape) * itemsize
    places = [("metadata", index.metadata[:, 0], index.metadata[:, 1])]
    places.append(("moments", index.moments[:, 0], np.array(latent)))
    if manifest.flipped:
        places.append(("flipped", index.flipped[:, 0], np.array(latent)))
    if manifest.text:
        context = prod(manifest.text.context_shape) * itemsize
        places.append(("context", index.context[:, 0], np.array(context)))
    for name, offset, length in places:
        if ((length < 0) | (offset < 0) | (offset > entry.num_bytes - length)).any():
            yield f"{name} lies outside the tar"
    first = index.first_caption
    is_inside = first[0] == 0 and first[-1] == num_captions and (first <= num_captions).all()
    if not is_inside or (np.diff(first) < (1 if manifest.text else 0)).any():
        yield "first_caption does not rise from 0 to the number of captions"
    labels = range(len(manifest.classes)) if manifest.classes else range(ABSENT, 0)
    if ((index.label < labels.start) | (index.label >= labels.stop)).any():
        yield f"label is not one of {len(manifest.classes)} classes"


def _are_keys(keys: list[bytes]) -> bool:
    """Whether all are unique keys; a million take 0.2 s."""
    text = b"/".join(keys)
    forbidden = bytes([*range(32), 127, *b".\\"])
    return (
        len(set(keys)) == len(keys)
        and all(keys)
        and text.count(b"/") == max(len(keys) - 1, 0)
        and len(text.translate(None, forbidden)) == len(text)
        and "\ufffd" not in text.decode(errors="replace")
    )
