"""Latents and caption embeddings on disk: what the encode job writes and training reads.

A dataset is a folder: `shard-00000.tar` and its index `shard-00000.index.npy`, and so on,
`null_context.npy`, and `manifest.json`, written last. Readers trust the manifest only. A shard is
a plain WebDataset tar with `KEY.moments.npy`, `KEY.context.npy` and `KEY.json` for each sample.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NULL_CONTEXT = "null_context.npy"
RESIZE = "center_crop+lanczos"
INDEX_COLUMNS = ("moments_offset", "context_offset", "num_captions", "json_offset", "json_length")
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
    """`KEY.json`: the image's id, all its captions, and its original size in pixels."""

    image_id: int
    captions: tuple[str, ...]
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One image: moments (2C, H, W), mean above logvar, unscaled; context (captions, M, D)."""

    key: str
    moments: Array
    context: Array
    metadata: SampleMetadata


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest promises about `NAME.tar` and `NAME.index.npy`."""

    name: str
    num_samples: int
    num_captions: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The dataset's table of contents and how it was made.

    `latent_mean` and `latent_std` are of z = mean + std * eps over all elements of all latents.
    """

    format_version: int = FORMAT_VERSION
    vae: EncoderIdentity
    text_encoder: EncoderIdentity
    image_size: int
    resize: str = RESIZE
    dtype: str
    moments_shape: tuple[int, int, int]
    context_shape: tuple[int, int]
    num_samples: int
    num_captions: int
    latent_mean: float
    latent_std: float
    null_context: str = NULL_CONTEXT
    null_context_sha256: str
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
    for key in ("vae", "text_encoder"):
        value[key] = build_record(EncoderIdentity, value[key], where)
    for key in ("moments_shape", "context_shape"):
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
    """What to do about a damaged shard: without its receipt, the encode job makes it anew."""
    return f"delete receipts/{entry.name}.json and run the encode again"


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
