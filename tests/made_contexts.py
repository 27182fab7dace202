"""Small datasets of captions of mixed lengths, with the contexts of a text encoder or without."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from made_shards import make_samples, write_shards

from data_pipeline.shard_io import to_int8, to_stored
from ifvit.arrays import npy_bytes
from ifvit.conditions import rows_of
from ifvit.models.text_encoders import TextEncoder
from ifvit.shards.format import LatentSample, TextEncoding, write_manifest

SOURCES = ("original", "short", "long")
WORDS = "two red circles above a blue square left of three small yellow stars"


def make_captioned(count: int, seed: int = 0, num_captions: int = 3) -> list[LatentSample]:
    """Random samples without contexts; each caption has 1 to 60 words and a source."""
    generator = np.random.default_rng(seed)

    def caption() -> str:
        return " ".join(generator.choice(WORDS.split(), generator.choice([1, 3, 8, 20, 60])))

    def with_captions(sample: LatentSample) -> LatentSample:
        number = generator.integers(1, num_captions + 1)
        captions = tuple(caption() for _ in range(number))
        sources = tuple(generator.integers(0, len(SOURCES), number).tolist())
        metadata = replace(sample.metadata, captions=captions, sources=sources)
        return replace(sample, context=None, context_lengths=None, metadata=metadata)

    return list(map(with_captions, make_samples(count, seed=seed)))


def write_contexts(
    folder: Path,
    samples: Sequence[LatentSample],
    sizes: Sequence[int],
    encoder: TextEncoder | None,
    dtype: str = "float16",
) -> str:
    """Write shards with contexts in this dtype; without an encoder, captions alone.

    The captions of each sample are encoded together, unlike in training.
    """
    values = "float32" if dtype == "float32" else "float16"

    def encoded(sample: LatentSample) -> LatentSample:
        sample = replace(sample, moments=sample.moments.astype(values))
        if encoder is None:
            return sample
        contexts = rows_of(encoder.encode(list(sample.metadata.captions)))
        tokens = np.concatenate([to_stored(one, values, "context") for one in contexts])
        scale = None
        if dtype == "int8":
            tokens, scale = to_int8(tokens)
        lengths = np.array([len(one) for one in contexts], np.int32)
        return replace(sample, context=tokens, context_lengths=lengths, context_scale=scale)

    folder.mkdir()
    written = write_shards(folder, list(map(encoded, samples)), sizes)
    text = None
    if encoder is not None:
        data = npy_bytes(to_stored(encoder.null_context(), values, "null context"))
        (folder / "null_context.npy").write_bytes(data)
        text = TextEncoding(
            encoder=encoder.identity,
            context_shape=encoder.context_shape,
            dtype=dtype,  # type: ignore[arg-type]
            null_context_sha256=hashlib.sha256(data).hexdigest(),
        )
    manifest = replace(written, text=text, dtype=values, caption_sources=SOURCES)  # type: ignore[arg-type]
    write_manifest(str(folder), manifest)
    return str(folder)
