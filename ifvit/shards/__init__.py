"""Latents and caption embeddings on disk: records, manifest and reader."""

from ifvit.shards.config import CacheConfig
from ifvit.shards.reader import ShardReader
from ifvit.shards.records import (
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
