"""Records of a dataset of shards: manifest, shard entries, samples and their metadata.

The encode job (data_pipeline) writes these files and `ShardReader` reads them. A dataset holds
`manifest.json`, the null context, and `NAME.tar` and `NAME.index.npz` for each shard.
"""

import contextlib
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Annotated, Any, Literal

import numpy as np

from ifvit import storage
from ifvit.arrays import Array
from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.records import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Rule,
    Sha256,
    is_plain_name,
    parse_json,
    parse_sealed,
    record,
    shorten,
)

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
NULL_CONTEXT = "null_context.npy"
IMAGE_ARRAYS = ("moments", "flipped", "features", "flipped_features")
"""Arrays of a sample that are made from its image, by field of LatentSample."""
FEATURE_DTYPE = "float16"
"""Number format of features in every dataset."""
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
FormatVersion = Annotated[int, Rule(f"{FORMAT_VERSION}", lambda value: value == FORMAT_VERSION)]
LatentStd = Annotated[float, Rule("from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6)]


class ShardError(UserError):
    """A shard, index or manifest is missing, damaged or of another format."""


@record
class EncoderIdentity:
    """Frozen encoder that made the data: its hub name or absolute folder, and its sha256.

    The hash of the weights identifies it. A verb that opens the encoder takes another folder with
    the same weights, because the data may move to another machine.
    """

    name: str
    sha256: Sha256


Precision = Literal["fp32", "bf16"]
"""Number format in which a frozen encoder computes."""
Template = Annotated[str, Rule("a text with {} once", lambda text: text.count("{}") == 1)]
NumTokens = Annotated[int, Rule("from 1 to 4096", lambda value: 1 <= value <= 4096)]
Layer = Annotated[int, Rule("from 0 to 256", lambda value: 0 <= value <= 256)]
State = Layer | Literal["last", "penultimate", "mean"]
"""Hidden state of a text encoder: of its last or last but one layer, the mean over all layers, or
that of a layer by number, where 0 are the embeddings."""


@record
class TextSettings:
    """How a text encoder makes context tokens of a caption; the defaults are those of the paper."""

    state: State = "last"
    final_norm: bool = True
    """Whether the encoder's final norm was applied to the state."""
    max_length: NumTokens = 77
    """Largest number of tokens of a context, special tokens included."""
    template: Template = "{}"
    """Text around the caption, which stands for {}; the empty caption has none."""
    precision: Precision = "fp32"
    """Number format in which the encoder computed."""
    keeps_padding: bool = True
    """Whether contexts have `max_length` tokens, padding included, which are all attended to, as
    for CLIP; otherwise padding was masked and is not stored."""


@record
class TextEncoderIdentity(EncoderIdentity):
    """Frozen text encoder that made contexts, and how it made them."""

    settings: TextSettings = field(default_factory=TextSettings)


@record
class SampleMetadata:
    """Content of `KEY.json`; `captions` is empty in a dataset with class labels.

    `sources` has the number of each caption's source in `Manifest.caption_sources`; without these
    it is empty. `width` and `height` are the size of the upright original image in pixels.
    """

    image_id: int | str
    captions: tuple[str, ...]
    sources: tuple[NonNegativeInt, ...] = ()
    width: PositiveInt
    height: PositiveInt

    def __post_init__(self) -> None:
        if self.sources and len(self.sources) != len(self.captions):
            raise UserError(f"{len(self.captions)} captions, but {len(self.sources)} sources")


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One image as the encode job writes it.

    `moments` (2C, H, W) are the unscaled mean and logvar of the VAE posterior, stacked along the
    channel axis, or the latent (C, H, W) of a deterministic autoencoder, and `flipped` those of the
    horizontally flipped image. `features` (T, F) float16 are those of an image encoder's patches,
    and `flipped_features` those of the flipped image. `key` contains no dot and no slash, because
    WebDataset ends a key there.

    A sample has captions or a `label`. `context` (T, D) are the context tokens of all its captions
    in order, and `context_lengths` (captions,) int32 their numbers of tokens; their sum is T.
    Where `context` is int8, its rows times `context_scale` (T,) float32 are the tokens.
    """

    key: str
    moments: Array
    context: Array | None = None
    context_lengths: Array | None = None
    context_scale: Array | None = None
    label: int | None = None
    flipped: Array | None = None
    features: Array | None = None
    flipped_features: Array | None = None
    metadata: SampleMetadata

    @property
    def contexts(self) -> list[Array]:
        """Stored context tokens (M, D) of each caption; M differs between captions."""
        assert self.context is not None
        assert self.context_lengths is not None
        return np.split(self.context, np.cumsum(self.context_lengths)[:-1])


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
    """How captions were embedded, and how their contexts are stored.

    A context has at most M tokens of width D, by `context_shape` (M, D), and exactly M if the
    encoder keeps padding. `dtype` is that of the stored tokens; the null context, of the empty
    caption, has the dtype of the dataset.
    """

    encoder: TextEncoderIdentity
    context_shape: tuple[PositiveInt, PositiveInt]
    dtype: Literal["float16", "float32", "int8"]
    null_context_sha256: Sha256

    def __post_init__(self) -> None:
        if prod(self.context_shape) > MAX_VALUES:
            raise UserError(f"context_shape {self.context_shape} has more than {MAX_VALUES} values")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a stored token, and of the scale of an 8-bit one."""
        token = np.dtype(self.dtype).itemsize * self.context_shape[1]
        return token + (4 if self.dtype == "int8" else 0)

    def allows(self, num_tokens: int) -> bool:
        """Whether a context may have this number of tokens."""
        most = self.context_shape[0]
        return num_tokens == most or (
            1 <= num_tokens < most and not self.encoder.settings.keeps_padding
        )


@record
class FeatureEncoding:
    """How features of images were made: encoder, patches per side, channels of a feature."""

    encoder: EncoderIdentity
    grid: PositiveInt
    width: PositiveInt

    def __post_init__(self) -> None:
        if prod(self.shape) > MAX_VALUES:
            raise UserError(f"features of shape {self.shape} have more than {MAX_VALUES} values")

    @property
    def shape(self) -> tuple[int, int]:
        """(T, F) of an image's features, row by row."""
        return self.grid**2, self.width


@record
class Manifest:
    """Content of `manifest.json`: the shards of a dataset and how they were made.

    `classes` is empty in a dataset with captions. `text` is None in a dataset without contexts: one
    with class labels, or one of captions whose contexts are computed while training.
    `caption_sources` names where captions come from if there are several places.
    `features` is None in a dataset without features of images. A latent of a deterministic
    autoencoder is stored in place of moments. `latent_mean` and `latent_std` are statistics of
    unscaled latents z = mean + std * eps over all elements, `channel_mean` and `channel_std` over
    those of each channel.
    """

    format_version: FormatVersion = FORMAT_VERSION
    vae: EncoderIdentity
    text: TextEncoding | None
    classes: tuple[str, ...] = ()
    caption_sources: tuple[str, ...] = ()
    image_size: PositiveInt
    resize: str = RESIZE
    image_rules: ImageRules = field(default_factory=ImageRules)
    flipped: bool = False
    dtype: Literal["float16", "float32"]
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    deterministic: bool = False
    features: FeatureEncoding | None = None
    num_samples: PositiveInt
    num_captions: Count
    latent_mean: float
    latent_std: LatentStd
    channel_mean: tuple[float, ...]
    channel_std: tuple[NonNegativeFloat, ...]
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        for key in ("num_samples", "num_captions"):
            total = sum(getattr(entry, key) for entry in self.shards)
            if total != getattr(self, key):
                raise UserError(f"{key} is not the sum over its shards, {total}")
        if len({entry.name for entry in self.shards}) < len(self.shards):
            raise UserError("two shards have the same name")
        if len(set(self.caption_sources)) < len(self.caption_sources):
            raise UserError("caption_sources: two have the same name")
        if self.classes and (self.text or self.caption_sources):
            raise UserError("text or caption_sources beside classes; give only one of them")
        if self.text and self.text.dtype not in (self.dtype, "int8"):
            raise UserError(f"contexts are {self.text.dtype}, but the dataset is {self.dtype}")
        if prod(self.moments_shape) > MAX_VALUES:
            raise UserError(
                f"latent_shape is {self.latent_shape}; moments of {MAX_VALUES} values are the most"
            )
        if {len(self.channel_mean), len(self.channel_std)} != {self.latent_shape[0]}:
            raise UserError(
                f"channel_mean and channel_std must have latent_shape[0], {self.latent_shape[0]}, "
                "numbers"
            )

    @property
    def contents(self) -> str:
        """Numbers of the images and of their captions or classes."""
        what = f"{self.num_captions:,} captions"
        if self.classes:
            what = f"{len(self.classes):,} classes"
        return f"{self.num_samples:,} images, {what}"

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, H, W) of a sample's moments; (C, H, W) of a deterministic latent."""
        channels, height, width = self.latent_shape
        return (channels if self.deterministic else 2 * channels, height, width)

    @property
    def scaling_factor(self) -> float:
        """Factor that gives the latents unit standard deviation."""
        return 1.0 / self.latent_std


def write_manifest(url: str, manifest: Manifest) -> None:
    """Write `url/manifest.json`, which completes the dataset."""
    content = asdict(manifest)
    if manifest.features is None:
        del content["features"]  # so that datasets without features stay as they were
    storage.write_sealed(storage.join(url, MANIFEST), content)


def read_manifest(url: str) -> Manifest:
    """Read `url/manifest.json`. Raises ShardError if it is absent, damaged or another version."""
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise ShardError(
            f"{where}: no such file; {url} is not a dataset, or its encode job has not finished"
        )
    data = storage.read_bytes(where)
    try:
        return parse_sealed(Manifest, data, where)
    except UserError as error:
        problem = error
    version: object = FORMAT_VERSION
    with contextlib.suppress(UserError):  # another version has other fields
        version = parse_json(dict[str, Any], data, where).get("format_version")
    if version == FORMAT_VERSION:
        raise ShardError(f"{problem}; download it or run the encode again")
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
