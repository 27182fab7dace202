"""File formats of a dataset of shards: sample records, manifest, and the index beside each shard.

The encode job (data_pipeline) writes these files and `ShardReader` reads them. A dataset holds
`manifest.json`, the null context, and `NAME.tar` and `NAME.index.npz` for each shard.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

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
    """A shard, index or manifest is missing, damaged or of another format."""


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """Frozen encoder that made the data: the name it was loaded by, the sha256 of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleMetadata:
    """Content of `KEY.json`; `captions` is empty in a dataset with class labels.

    `width` and `height` are the size of the original image in pixels.
    """

    image_id: int | str
    captions: tuple[str, ...]
    width: int
    height: int


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


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Sizes and hashes of `NAME.tar` and `NAME.index.npz`."""

    name: str
    num_samples: int
    num_captions: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """How captions were embedded: encoder, shape (M, D) of a context, hash of the null context."""

    encoder: EncoderIdentity
    context_shape: tuple[int, int]
    null_context_sha256: str


@dataclass(frozen=True, kw_only=True)
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
        """Factor that gives the latents unit standard deviation."""
        return 1.0 / self.latent_std


def write_manifest(url: str, manifest: Manifest) -> None:
    """Write `url/manifest.json`, which completes the dataset."""
    write_sealed(storage.join(url, MANIFEST), asdict(manifest))


def read_manifest(url: str) -> Manifest:
    """Read `url/manifest.json`. Raises ShardError if it is absent, damaged or another version."""
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise ShardError(
            f"{where}: no such file; {url} is not a dataset, or its encode job has not finished"
        )
    value = read_sealed(where)
    if value.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{where}: format_version is {value.get('format_version')}, expected {FORMAT_VERSION}; "
            "encode the images again or install the version of ifvit that wrote it"
        )
    value["shards"] = tuple(build_record(ShardEntry, entry, where) for entry in value["shards"])
    value["vae"] = build_record(EncoderIdentity, value["vae"], where)
    if value["text"] is not None:
        value["text"] = _build_text(value["text"], where)
    for key in ("moments_shape", "classes"):
        value[key] = tuple(value[key])
    return build_record(Manifest, value, where)


def write_sealed(url: str, value: dict[str, Any]) -> None:
    """Write `value` as JSON with a hash of its content, which reveals any later change."""
    storage.write_json(url, {**value, SEAL: _seal(value)})


def read_sealed(url: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raises ShardError if the content does not match its hash."""
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
    """Build a flat dataclass from a JSON object. Raises ShardError naming keys that differ."""
    wrong = {field.name for field in fields(cls)} ^ set(value)  # type: ignore[arg-type]
    if wrong:
        raise ShardError(f"{where}: missing or unknown keys {sorted(wrong)}; encode again")
    return cls(**value)


def parse_metadata(data: bytes, where: str) -> SampleMetadata:
    """Parse the content of `KEY.json`. Raises ShardError that names the sample, `where`."""
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


def index_tar(path: Path) -> ShardIndex:
    """Build the index of a tar by reading it once."""
    members: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file.seek(member.offset_data)
            entries = _index_entries(suffix, member.offset_data, file.read(member.size))
            members.setdefault(key, {})[suffix] = entries
    samples = list(members.values())
    captions = [sample.get("context.npy", []) for sample in samples]
    absent = [(ABSENT, 0)]
    return ShardIndex(
        keys=np.array([key.encode() for key in members], dtype=np.bytes_),
        moments=_table([sample.get("moments.npy", absent)[0] for sample in samples], 2),
        flipped=_table([sample.get("flipped.npy", absent)[0] for sample in samples], 2),
        metadata=_table([sample.get("json", [(ABSENT, 0, 0)])[0] for sample in samples], 3),
        label=np.array([sample.get("cls", absent)[0][0] for sample in samples], dtype=np.int64),
        context=_table([entry for entries in captions for entry in entries], 2),
        first_caption=np.cumsum([0, *map(len, captions)], dtype=np.int64),
    )


def _index_entries(suffix: str, offset: int, data: bytes) -> list[tuple[int, ...]]:
    """Index entries of one tar member whose content starts at `offset`; for `cls` its label."""
    if suffix == "cls":
        return [(int(data),)]
    if suffix == "json":
        return [(offset, len(data), checksum(data))]
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    assert version == (1, 0), version
    shape, _, _ = np.lib.format.read_array_header_1_0(buffer)
    header, view = buffer.tell(), memoryview(data)
    num_rows = shape[0] if suffix == "context.npy" else 1
    size = (len(data) - header) // max(num_rows, 1)
    starts = [header + row * size for row in range(num_rows)]
    return [(offset + start, checksum(view[start : start + size])) for start in starts]


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Array:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


def index_bytes(index: ShardIndex) -> bytes:
    """Encode an index as `NAME.index.npz`; equal indexes give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **vars(index))
    return buffer.getvalue()


def parse_index(data: bytes, where: str) -> ShardIndex:
    """Decode `NAME.index.npz`. Raises ShardError when it has another format."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if set(arrays) != set(ShardIndex.__annotations__):
            raise ShardError(f"{where}: not an index of this format; encode again")
        return ShardIndex(**arrays)
