"""Files of a dataset of shards: records, manifest and the index beside each shard."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
NULL_CONTEXT = "null_context.npy"
COMPLETED = "completed"
"""Folder of the completion markers that the encode job writes beside the shards."""
RESIZE = "center_crop+lanczos"
SEAL = "content_sha256"

Array = NDArray[Any]
Record = TypeVar("Record")


class ShardError(UserError):
    """A shard, index or manifest that is missing or is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """Which frozen encoder made the data: the name it was loaded by, the hash of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleMetadata:
    """`KEY.json`: the image's id, all its captions (none if labelled), its original size."""

    image_id: int | str
    captions: tuple[str, ...]
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One image: moments (2C, H, W), mean above logvar, unscaled, and what it shows.

    Either `context` (captions, M, D) or `label` is there. `flipped` are the moments of the
    mirrored image. Keys hold no dot and no slash, WebDataset ends them there.
    """

    key: str
    moments: Array
    context: Array | None = None
    label: int | None = None
    flipped: Array | None = None
    metadata: SampleMetadata


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest promises about `NAME.tar` and `NAME.index.npz`."""

    name: str
    num_samples: int
    num_captions: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """How captions became context: by whom, the shape (M, D) of each, and the empty caption's."""

    encoder: EncoderIdentity
    context_shape: tuple[int, int]
    null_context_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The dataset's table of contents and how it was made.

    `text` is None in a labelled set, `classes` is empty in a captioned one. `latent_mean` and
    `latent_std` are of z = mean + std * eps over all elements of all latents.
    """

    format_version: int = FORMAT_VERSION
    vae: EncoderIdentity
    text: TextEncoding | None
    classes: tuple[str, ...] = ()
    image_size: int
    resize: str = RESIZE
    flipped: bool = False
    dtype: str
    moments_shape: tuple[int, int, int]
    num_samples: int
    num_captions: int
    latent_mean: float
    latent_std: float
    shards: tuple[ShardEntry, ...]

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by so that they have unit standard deviation."""
        return 1.0 / self.latent_std


def write_manifest(url: str, manifest: Manifest) -> None:
    """Write `url/manifest.json`; from then on the dataset exists."""
    write_sealed(storage.join(url, MANIFEST), asdict(manifest))


def read_manifest(url: str) -> Manifest:
    """Read `url/manifest.json`. Raises ShardError when it is missing, damaged or too new."""
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise ShardError(f"{where}: no such file; {url} is no dataset, or its encode has not ended")
    value = read_sealed(where)
    if value.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{where}: format_version is {value.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}; encode the images again or install the program that wrote it"
        )
    value["shards"] = tuple(build_record(ShardEntry, entry, where) for entry in value["shards"])
    value["vae"] = build_record(EncoderIdentity, value["vae"], where)
    if value["text"] is not None:
        value["text"] = _build_text(value["text"], where)
    for key in ("moments_shape", "classes"):
        value[key] = tuple(value[key])
    return build_record(Manifest, value, where)


def write_sealed(url: str, value: dict[str, Any]) -> None:
    """Write `value` as JSON that carries its own hash, so that any later change shows."""
    storage.write_json(url, {**value, SEAL: _seal(value)})


def read_sealed(url: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raises ShardError when a single character differs."""
    data = storage.read_bytes(url)
    remedy = "restore it, or delete it and run the encode again"
    try:
        value = json.loads(data)
        seal = value.pop(SEAL)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ShardError(f"{url}: damaged, not the JSON that was written; {remedy}") from None
    if seal != _seal(value):
        raise ShardError(f"{url}: damaged, {SEAL} does not match the content; {remedy}")
    return dict(value)


def build_record(cls: Callable[..., Record], value: dict[str, Any], where: str) -> Record:
    """A flat dataclass from its JSON object. Raises ShardError naming the keys that differ."""
    wrong = {field.name for field in fields(cls)} ^ set(value)  # type: ignore[arg-type]
    if wrong:
        raise ShardError(f"{where}: missing or unknown keys {sorted(wrong)}; encode again")
    return cls(**value)


def parse_metadata(data: bytes, where: str) -> SampleMetadata:
    """`KEY.json` => SampleMetadata. Raises ShardError naming the sample."""
    try:
        value = json.loads(data)
        value["captions"] = tuple(value["captions"])
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{where}: damaged json; run `ifvit shards verify`") from None
    return build_record(SampleMetadata, value, where)


def remedy_for(entry: ShardEntry) -> str:
    """Advice for a damaged shard: without its completion marker, the encode job makes it again."""
    return f"delete {COMPLETED}/{entry.name}.json and run the encode again"


def _build_text(value: dict[str, Any], where: str) -> TextEncoding:
    value["encoder"] = build_record(EncoderIdentity, value["encoder"], where)
    value["context_shape"] = tuple(value["context_shape"])
    return build_record(TextEncoding, value, where)


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
