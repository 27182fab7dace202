"""Configuration of the verbs `encode` and `shards`; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from ifvit.errors import UserError, require_positive


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode captioned images as shards of latents and caption embeddings; rerun to continue."""

    source: str = "coco"
    """Kind of image set: coco, folder, webdataset, table, or your own package.module:Class."""
    images: str
    """Folder or s3:// prefix of the images; for webdataset a folder or a pattern of tars."""
    captions: str | None = None
    """Captions: the captions_*.json of COCO, or the CSV, JSONL or Parquet file of a table."""
    output: str
    """Folder or s3:// prefix of the shards; the manifest is written last."""
    vae: str
    """Autoencoder: hub name, local folder, or scenes/vae."""
    text_encoder: str | None = None
    """CLIP text encoder: hub name, local folder, or scenes/clip. Class labels need none."""
    image_size: int = 256
    """Side of the square images in pixels; they are centre-cropped and resized with LANCZOS."""
    samples_per_shard: int = 1000
    """Images per shard. A killed job loses only the shards that it was writing."""
    batch_size: int = 32
    """Images that the encoders process at once. A rerun may use another batch size, because the
    batch size only changes how results are rounded."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format in the shards."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format in which the encoders compute."""
    flip: bool = False
    """Also store the moments of every image's horizontal flip."""
    tolerate: int = 0
    """Number of unreadable images that the finished dataset may leave out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoders; auto uses a GPU if there is one."""
    num_workers: int = 4
    """Threads that read and resize images ahead of the encoders."""
    num_tasks: int | None = None
    """Number of tasks that share the work. Default: the length of the SLURM array, or 1."""
    task: int | None = None
    """Number of this task, from 0. Default: the position in the SLURM array."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "samples_per_shard", "batch_size")
        require_positive(self, "num_workers", "num_tasks")
        if self.tolerate < 0:
            raise UserError(f"tolerate is {self.tolerate}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Check every byte of a dataset."""

    url: str
    """Folder or s3:// prefix of the dataset, which holds manifest.json."""
    num_workers: int = 4
    """Shards or indexes that are read at once."""

    def __post_init__(self) -> None:
        require_positive(self, "num_workers")


@dataclass(frozen=True, kw_only=True)
class StatsConfig(ShardsConfig):
    """Print counts, caption lengths, latent statistics and sizes of a dataset."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge datasets that were encoded with the same encoders and settings into one dataset."""

    urls: list[str]
    """Folders or s3:// prefixes of the datasets, in the order of their shards."""
    output: str
    """Folder or s3:// prefix of the new dataset."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show the first samples of a dataset."""

    url: str
    """Folder or s3:// prefix of the dataset, which holds manifest.json."""
    num_samples: int = 8
    """Number of samples to show."""
    grid: str | None = None
    """PNG file for the samples, decoded from their latents."""
    vae: str | None = None
    """Autoencoder for the PNG file. Default: the one that the manifest names."""

    def __post_init__(self) -> None:
        require_positive(self, "num_samples")
