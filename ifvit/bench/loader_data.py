"""Made-up samples of the paper's size, in memory and in the layouts that are compared."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.write import npy_bytes, write_shard
from ifvit.shards import (
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    TextEncoding,
    write_manifest,
)
from ifvit.shards.records import NULL_CONTEXT, Array
from ifvit.training.batch import empty_aligned

MOMENTS_SHAPE = (8, 32, 32)
CONTEXT_SHAPE = (77, 768)
NUM_CAPTIONS = 5
NUM_SHARDS = 16
_MADE_UP = EncoderIdentity(name="made-up", sha256="0" * 64)


@dataclass(frozen=True, kw_only=True)
class Content:
    """`moments` (N, 8, 32, 32) and `contexts` (N, 5, 77, 768) of N images, float16."""

    moments: Array
    contexts: Array


def make_content(num_samples: int) -> Content:
    """Random values in [0, 1), in memory from which copies are fastest."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        values = empty_aligned((num_samples, *shape), np.dtype(np.float16))
        for sample in values:
            # Bit patterns below that of 1.0; drawing real numbers would take minutes.
            sample[...] = generator.integers(0, 0x3C00, shape, np.uint16).view(np.float16)
        return values

    return Content(moments=draw(*MOMENTS_SHAPE), contexts=draw(NUM_CAPTIONS, *CONTEXT_SHAPE))


def write_shards(folder: Path, content: Content) -> None:
    """As the encode job writes them, in 16 shards."""
    cuts = np.array_split(np.arange(len(content.moments)), NUM_SHARDS)
    shards = tuple(
        write_shard(folder, f"shard-{k:05d}", (_sample(content, n) for n in cut.tolist()))
        for k, cut in enumerate(cuts)
    )
    null_context = npy_bytes(np.zeros(CONTEXT_SHAPE, np.float16))
    (folder / NULL_CONTEXT).write_bytes(null_context)
    manifest = Manifest(
        vae=_MADE_UP,
        text=TextEncoding(
            encoder=_MADE_UP,
            context_shape=CONTEXT_SHAPE,
            null_context_sha256=hashlib.sha256(null_context).hexdigest(),
        ),
        image_size=256,
        dtype="float16",
        moments_shape=MOMENTS_SHAPE,
        num_samples=len(content.moments),
        num_captions=NUM_CAPTIONS * len(content.moments),
        latent_mean=0.0,
        latent_std=1.0,
        shards=shards,
    )
    write_manifest(str(folder), manifest)


def write_files(folder: Path, content: Content) -> None:
    """U-ViT's layout: N.npy holds an image's moments, N_K.npy its caption K's embedding."""
    folder.mkdir()
    for n, (moments, contexts) in enumerate(zip(content.moments, content.contexts, strict=True)):
        np.save(folder / f"{n}.npy", moments)
        for k, context in enumerate(contexts):
            np.save(folder / f"{n}_{k}.npy", context)


def _sample(content: Content, number: int) -> LatentSample:
    captions = tuple(f"caption {k} of image {number}" for k in range(NUM_CAPTIONS))
    return LatentSample(
        key=f"{number:012d}",
        moments=content.moments[number],
        context=content.contexts[number],
        metadata=SampleMetadata(image_id=number, captions=captions, width=640, height=480),
    )
