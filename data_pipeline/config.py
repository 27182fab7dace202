"""Recipes of the encode job and of `ifvit shards`; imports no torch, so `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from ifvit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Turn captioned images into shards of latents and caption embeddings; rerun to continue."""

    source: str = "coco"
    """Kind of image set: coco, folder, webdataset, table, or your own package.module:Class."""
    images: str
    """Folder or s3:// prefix of the images; for webdataset, of the tars, or their pattern."""
    captions: str | None = None
    """COCO's captions_*.json, or a table's CSV, JSONL or Parquet; other sources have none."""
    output: str
    """Folder or s3:// prefix for the shards and, when all is done, the manifest."""
    vae: str
    """Autoencoder: hub name, local folder, or scenes/vae."""
    text_encoder: str | None = None
    """CLIP text encoder: hub name, local folder, or scenes/clip; classes need none."""
    image_size: int = 256
    """Side in pixels of the centre-cropped, LANCZOS-resized square."""
    samples_per_shard: int = 1000
    """Images in one shard, which is also what a killed job may lose."""
    batch_size: int = 32
    """Images that go through the encoders at once; a job may go on with another number, since it
    decides the last bits of rounding alone."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format in the shards."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format in which the encoders compute."""
    flip: bool = False
    """Store the moments of every mirrored image too."""
    tolerate: int = 0
    """How many unreadable images the finished dataset may leave out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoders run; auto takes a GPU when there is one."""
    num_workers: int = 4
    """Threads that read and resize images ahead of the encoders."""
    num_tasks: int | None = None
    """Jobs that share the work; by default the length of the SLURM array, or 1."""
    task: int | None = None
    """Which of them this is, from 0; by default the place in the SLURM array."""

    def __post_init__(self) -> None:
        for key in ("image_size", "samples_per_shard", "batch_size", "num_workers", "num_tasks"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key} is {value}; it must be at least 1")
        if self.tolerate < 0:
            raise UserError(f"tolerate is {self.tolerate}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Check every byte of a dataset (verify) or tell what is in it (stats)."""

    url: str
    """Folder of the dataset, the one with manifest.json."""
    num_workers: int = 4
    """Shards that are read, and from an object store downloaded, at once."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UserError(f"num_workers is {self.num_workers}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Make one dataset of several that the same encoders made."""

    urls: list[str]
    """Folders or s3:// prefixes of the datasets, in the order their shards shall have."""
    output: str
    """Folder or s3:// prefix of the new dataset."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show the first samples of a dataset."""

    url: str
    """Folder of the dataset, the one with manifest.json."""
    num_samples: int = 8
    """How many samples to show."""
    grid: str | None = None
    """PNG file to draw the samples into, decoded from their latents."""
    vae: str | None = None
    """Where the autoencoder is now, if it is not where the manifest says."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}; it must be at least 1")
