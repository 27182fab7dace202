"""Configuration of the verbs `encode` and `shards`; imports no torch."""

import math
from dataclasses import field
from typing import Annotated, Literal

from ifvit.config import FLAG_ONLY
from ifvit.image_rules import ImageRules
from ifvit.models.config import TextOptions
from ifvit.records import NonNegativeInt, PositiveFloat, PositiveInt, Rule, record
from ifvit.shards.format import Precision

Side = Annotated[int, Rule("from 1 to 8192", lambda value: 1 <= value <= 8192)]
SIZE_FLAGS = ("--min_side", "--max_aspect_ratio")
AspectRatio = Annotated[float, Rule("at least 1", lambda value: value >= 1)]
NumThreads = Annotated[int, Rule("from 1 to 1024", lambda value: 1 <= value <= 1024)]


def _split(names: str) -> tuple[str, ...]:
    """`" .cap, alt"` => `("cap", "alt")`."""
    return tuple(name.strip().lstrip(".") for name in names.split(","))


def _are_names(value: str) -> bool:
    names = _split(value)
    return all(names) and len(set(names)) == len(names)


Names = Annotated[str, Rule("different names separated by commas", _are_names)]


@record
class SizeLimits:
    """Smallest shorter side of an image in pixels, and largest aspect ratio; None: any."""

    min_side: PositiveInt
    max_aspect_ratio: AspectRatio | None

    def refuse(self, width: int, height: int) -> str:
        """Give the reason why an image of this size is left out; empty if it is not."""
        shorter, longer = sorted((width, height))
        size = f"{width} x {height} pixels"
        if shorter < self.min_side:
            least = self.min_side
            return f"{size}: the shorter side has fewer than {least}; {SIZE_FLAGS[0]} allows less"
        if longer > shorter * (self.max_aspect_ratio or math.inf):
            ratio = f"{self.max_aspect_ratio:g}"
            return f"{size}: the aspect ratio is above {ratio}; {SIZE_FLAGS[1]} allows more"
        return ""

    def leave_out_more_than(self, other: "SizeLimits") -> bool:
        """Whether these limits leave out an image that the other ones admit."""
        ratio, other_ratio = (each.max_aspect_ratio or math.inf for each in (self, other))
        return self.min_side > other.min_side or ratio < other_ratio


@record
class EncodeConfig:
    """Encode captioned images as shards of latents and caption embeddings; rerun to continue."""

    source: str = "coco"
    """Kind of image set: coco, folder, captioned_folder, webdataset, table, parquet, or your own
    package.module:Class."""
    allow_plugins: bool = field(default=False, metadata=FLAG_ONLY)
    """Import and run the code of your own source. Only a flag may set this, no YAML file."""
    images: str
    """Folder or s3:// prefix of the images; for webdataset and parquet a folder or a pattern."""
    captions: str | None = None
    """Captions: the captions_*.json of COCO, or the CSV, JSONL or Parquet file of a table."""
    caption_key: Names | None = None
    """Where the captions are if not in the usual place: columns of a table or of Parquet files,
    suffixes or JSON keys in tars, suffixes of text files. Separate several by commas; the shards
    then hold which one each caption comes from."""
    output: str
    """Folder or s3:// prefix of the shards; the manifest is written last."""
    vae: str
    """Autoencoder: hub name, local folder, or scenes/vae."""
    text_encoder: str | None = None
    """Text encoder, such as CLIP, T5, Gemma or Qwen: hub name, local folder, or scenes/clip. Class
    labels need none."""
    text: TextOptions = field(default_factory=TextOptions)
    """How the text encoder makes contexts."""
    image_encoder: str | None = None
    """DINOv2 or CLIP whose features of image patches are stored, for representation alignment in
    training (REPA): hub name, local folder, or scenes/clip. Unset: no features."""
    image_size: Side = 256
    """Side of the square images in pixels; they are centre-cropped and resized with LANCZOS."""
    samples_per_shard: PositiveInt = 1000
    """Images per shard. A killed job loses only the shards that it was writing."""
    batch_size: PositiveInt = 32
    """Images that the encoders process at once. A rerun may use another batch size, because the
    batch size only changes how results are rounded."""
    context: Literal["stored", "computed"] = "stored"
    """Whether contexts of captions are stored, or computed while training; then the shards hold
    the captions only, and no text_encoder is needed here."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format in the shards."""
    int8_context: bool = False
    """Store context tokens as 8-bit integers and a scale for each token: half of float16."""
    precision: Precision = "fp32"
    """Number format in which the encoders compute; see text.precision for text."""
    flip: bool = False
    """Also store the moments, and the features, of every image's horizontal flip."""
    tolerate: NonNegativeInt = 0
    """Number of unreadable images that the finished dataset may leave out."""
    max_megapixels: PositiveFloat = 100.0
    """Largest area of an image in millions of pixels; its file may have 4 bytes per such pixel. A
    worker uses up to 24 bytes of memory per pixel."""
    min_side: PositiveInt | None = None
    """Leave out images whose shorter side has fewer pixels. Default: half of image_size."""
    max_aspect_ratio: AspectRatio | None = None
    """Leave out images whose longer side exceeds the shorter one by this factor. Default: none."""
    image_rules: ImageRules = field(default_factory=ImageRules)
    """What becomes of transparency, EXIF orientation and colour profiles."""
    allow_links: bool = False
    """Also read images that symbolic links in the image folder lead to outside of it."""
    allow_blank_captions: bool = False
    """Encode images that have blank captions only; otherwise they count as unreadable."""
    tar_keys: Literal["first_dot", "last_dot"] = "first_dot"
    """Where the key of a tar's member ends in its file name: WebDataset's rule is the first dot."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoders; auto uses a GPU if there is one."""
    num_workers: NumThreads = 4
    """Threads that read and resize images ahead of the encoders."""
    num_tasks: PositiveInt | None = None
    """Number of tasks that share the work. Default: the length of the SLURM array, or 1."""
    task: NonNegativeInt | None = None
    """Number of this task, from 0. Default: the position in the SLURM array."""

    @property
    def caption_names(self) -> tuple[str, ...]:
        """Columns, suffixes or keys of captions; () for the usual ones."""
        return _split(self.caption_key) if self.caption_key is not None else ()

    @property
    def caption_sources(self) -> tuple[str, ...]:
        """Names of the sources that captions come from; () for a single one."""
        return self.caption_names if len(self.caption_names) > 1 else ()

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Columns of captions in a table or in Parquet files."""
        return self.caption_names or ("caption",)

    @property
    def max_image_bytes(self) -> int:
        """Size of the largest image file that is read."""
        return int(4 * self.max_megapixels * 1_000_000)

    @property
    def size_limits(self) -> SizeLimits:
        """The sizes that images must have."""
        least = self.min_side or -(-self.image_size // 2)
        return SizeLimits(min_side=least, max_aspect_ratio=self.max_aspect_ratio)


@record
class ShardsConfig:
    """Check every byte of a dataset."""

    url: str
    """Folder or s3:// prefix of the dataset, which holds manifest.json."""
    num_workers: NumThreads = 4
    """Shards or indexes that are read at once."""


@record
class StatsConfig(ShardsConfig):
    """Print counts, caption lengths, latent statistics and sizes of a dataset."""


@record
class MergeConfig:
    """Merge datasets that were encoded with the same encoders and settings into one dataset."""

    urls: list[str]
    """Folders or s3:// prefixes of the datasets, in the order of their shards."""
    output: str
    """Folder or s3:// prefix of the new dataset."""


@record
class InspectConfig:
    """Show the first samples of a dataset."""

    url: str
    """Folder or s3:// prefix of the dataset, which holds manifest.json."""
    num_samples: PositiveInt = 8
    """Number of samples to show."""
    grid: str | None = None
    """PNG file for the samples, decoded from their latents."""
    vae: str | None = None
    """Autoencoder for the PNG file. Default: the one that the manifest names."""
