"""Datasets of latents and caption embeddings: file formats, reader and disk cache."""

from ifvit.shards.config import CacheConfig
from ifvit.shards.format import (
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    ShardEntry,
    ShardError,
    TextEncoding,
    read_manifest,
    write_manifest,
)
from ifvit.shards.reader import ShardReader

__all__ = [
    "CacheConfig",
    "EncoderIdentity",
    "LatentSample",
    "Manifest",
    "SampleMetadata",
    "ShardEntry",
    "ShardError",
    "ShardReader",
    "TextEncoding",
    "read_manifest",
    "write_manifest",
]
