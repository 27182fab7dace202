"""Small datasets of random content, written as real shards by the writer of the encode job."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.shard_io import write_shard
from ifvit.arrays import npy_bytes
from ifvit.shards.format import (
    EncoderIdentity,
    FeatureEncoding,
    LatentSample,
    Manifest,
    SampleMetadata,
    TextEncoderIdentity,
    TextEncoding,
    write_manifest,
)

CLASSES = ("cat", "dog")


def make_samples(
    count: int,
    *,
    moments_shape: tuple[int, int, int] = (8, 8, 8),
    context_shape: tuple[int, int] = (5, 12),
    flipped: bool = False,
    feature_shape: tuple[int, int] | None = None,
    labelled: bool = False,
    seed: int = 0,
) -> list[LatentSample]:
    """Random samples with one to three captions each, or with labels; (G * G, F) of features."""
    generator, (length, width) = np.random.default_rng(seed), context_shape

    def sample_values(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float16)

    def sample(number: int) -> LatentSample:
        captions = tuple(f"Käse {number}, caption {k}" for k in range(number % 3 + 1))
        return LatentSample(
            key=f"{number:012d}",
            moments=sample_values(*moments_shape),
            context=None if labelled else sample_values(len(captions) * length, width),
            context_lengths=None if labelled else np.full(len(captions), length, np.int32),
            label=number % len(CLASSES) if labelled else None,
            flipped=sample_values(*moments_shape) if flipped else None,
            features=sample_values(*feature_shape) if feature_shape else None,
            flipped_features=sample_values(*feature_shape) if feature_shape and flipped else None,
            metadata=SampleMetadata(
                image_id=number, captions=() if labelled else captions, width=9, height=8
            ),
        )

    return [sample(number) for number in range(count)]


def write_shards(
    folder: Path,
    samples: Sequence[LatentSample],
    sizes: Sequence[int],
    *,
    deterministic: bool = False,
) -> Manifest:
    """Write the samples as shards of these sizes; the null context is all ones."""
    starts = np.cumsum([0, *sizes])
    shards = tuple(
        write_shard(str(folder), f"shard-{k:05d}", samples[starts[k] : starts[k + 1]])
        for k in range(len(sizes))
    )
    channels, *size = samples[0].moments.shape
    channels = channels if deterministic else channels // 2
    manifest = Manifest(
        vae=EncoderIdentity(name="made-up", sha256="0" * 64),
        text=_write_null_context(folder, samples[0]),
        classes=() if samples[0].label is None else CLASSES,
        image_size=64,
        flipped=samples[0].flipped is not None,
        dtype="float16",
        latent_shape=(channels, *size),
        deterministic=deterministic,
        features=_feature_encoding(samples[0]),
        num_samples=len(samples),
        num_captions=sum(entry.num_captions for entry in shards),
        latent_mean=0.0,
        latent_std=1.5,
        channel_mean=(0.0,) * channels,
        channel_std=(1.5,) * channels,
        shards=shards,
    )
    write_manifest(str(folder), manifest)
    return manifest


def repeat_shard(folder: Path, manifest: Manifest, count: int) -> Manifest:
    """Make a dataset of one shard hold `count` equal ones through links, on little disk space."""
    (entry,) = manifest.shards
    names = [f"shard-{k:05d}" for k in range(count)]
    for name in names[1:]:
        for suffix in (".tar", ".index.npz"):
            (folder / f"{name}{suffix}").symlink_to(f"{entry.name}{suffix}")
    many = replace(
        manifest,
        num_samples=count * entry.num_samples,
        num_captions=count * entry.num_captions,
        shards=tuple(replace(entry, name=name) for name in names),
    )
    write_manifest(str(folder), many)
    return many


def _feature_encoding(sample: LatentSample) -> FeatureEncoding | None:
    if sample.features is None:
        return None
    num_tokens, width = sample.features.shape
    encoder = EncoderIdentity(name="made-up", sha256="2" * 64)
    return FeatureEncoding(encoder=encoder, grid=math.isqrt(num_tokens), width=width)


def _write_null_context(folder: Path, sample: LatentSample) -> TextEncoding | None:
    if sample.context is None:
        return None
    shape = sample.contexts[0].shape
    data = npy_bytes(np.ones(shape, np.float16))
    (folder / "null_context.npy").write_bytes(data)
    return TextEncoding(
        encoder=TextEncoderIdentity(name="made-up", sha256="1" * 64),
        context_shape=shape,
        dtype="float16",
        null_context_sha256=hashlib.sha256(data).hexdigest(),
    )
