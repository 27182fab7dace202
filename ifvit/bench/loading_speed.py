"""The verb `bench loader`: samples per second of the training loader and of webdataset's pipeline.

Both read the same random samples, and the loader also reads them in other layouts of the contexts.
With `--store` the loader reads an epoch from an object store and is compared with downloading the
shards.
"""

import hashlib
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from webdataset import WebDataset, WebLoader

from data_pipeline.shard_io import to_int8, write_shard
from ifvit import storage
from ifvit.arrays import Array, npy_bytes
from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.measurement import median_ratio, print_result
from ifvit.distributed import World
from ifvit.shards import CacheConfig
from ifvit.shards.format import (
    NULL_CONTEXT,
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    TextEncoderIdentity,
    TextEncoding,
    TextSettings,
    write_manifest,
)
from ifvit.shards.reader import ShardReader
from ifvit.studies.step_time import measure_rounds
from ifvit.training.data import Batch, Batches
from ifvit.training.order import BatchOrder

LATENT_SHAPE = (4, 32, 32)
MOMENTS_SHAPE = (8, 32, 32)
NUM_CAPTIONS = 5
NUM_SHARDS = 16
SHUFFLE_BUFFER = 1000
"""Samples that webdataset shuffles."""
SHUFFLE_WINDOW = 4
"""Shards that the loader shuffles when it reads from a store."""
WARM_UP_BATCHES = 2
SECONDS = 3.0
"""Length of one measurement."""


@dataclass(frozen=True, kw_only=True)
class ContextLayout:
    """Size of the contexts of a text encoder, and how they are stored."""

    max_length: int
    width: int
    keeps_padding: bool = False
    dtype: Literal["float16", "int8"] = "float16"


CONTEXTS = {
    "clip": ContextLayout(max_length=77, width=768, keeps_padding=True),
    "gemma": ContextLayout(max_length=256, width=2304),
    "t5": ContextLayout(max_length=256, width=4096),
}

Stream = Generator[int]
"""Reads batches without end and yields the number of samples in each batch."""


def bench_loader(config: BenchLoaderConfig) -> None:
    """Write random samples to a temporary folder, measure all readers, print the ratios."""
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as folder:
        compare = compare_layouts if config.store is None else compare_with_download
        print_result(compare(Path(folder), config), config.json)


def compare_layouts(folder: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of the loader, and its ratio to other layouts and webdataset.

    The same samples are stored in float16 as the encode job does it, in int8, and, if the encoder
    masks padding, in float16 with padding.
    """
    float16 = CONTEXTS[config.context]
    layouts = {"float16": float16, "int8": replace(float16, dtype="int8")}
    if not float16.keeps_padding:
        layouts["padded"] = replace(float16, keeps_padding=True)
    num_bytes, measures = {}, {}
    for name, layout in layouts.items():
        num_bytes[name] = write_shards(folder / name, config.num_images, layout)
        stream = partial(read_shards, folder / name, config)
        measures[name] = partial(samples_per_second, stream)
    stream = partial(read_webdataset, folder / "float16", config)
    rates = measure_rounds(
        measures | {"webdataset": partial(samples_per_second, stream)}, config.rounds
    )
    ours = rates.pop("float16")
    return {
        "samples_per_s": statistics.median(ours),
        **{f"vs_{name}": median_ratio(ours, others) for name, others in rates.items()},
        "bytes_per_caption": num_bytes.pop("float16"),
        **{f"bytes_per_caption_{name}": size for name, size in num_bytes.items()},
    }


def compare_with_download(folder: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of an epoch with an empty cache, and relative to downloads."""
    assert config.store is not None
    shards = folder / "shards"
    write_shards(shards, config.num_images, CONTEXTS[config.context])
    url = storage.join(config.store, f"bench-{uuid.uuid4().hex}")
    try:
        for path in sorted(shards.iterdir()):
            storage.upload(path, storage.join(url, path.name))
        contenders = {
            "epoch": partial(seconds_of_epoch, url, folder, config),
            "download": partial(seconds_of_downloads, url, folder),
        }
        seconds = measure_rounds(contenders, config.rounds)
    finally:
        storage.remove(url)
    return {
        "samples_per_s": config.num_images / statistics.median(seconds["epoch"]),
        "vs_download": median_ratio(seconds["download"], seconds["epoch"]),
    }


def write_shards(folder: Path, num_samples: int, layout: ContextLayout) -> float:
    """Write a dataset of 16 shards with the writer of the encode job => bytes per caption."""
    parts = np.array_split(np.arange(num_samples), NUM_SHARDS)
    shards = tuple(
        write_shard(str(folder), f"shard-{k:05d}", (_sample(n, layout) for n in part.tolist()))
        for k, part in enumerate(parts)
    )
    null_context = npy_bytes(np.zeros((layout.max_length, layout.width), np.float16))
    (folder / NULL_CONTEXT).write_bytes(null_context)
    settings = TextSettings(max_length=layout.max_length, keeps_padding=layout.keeps_padding)
    text = TextEncoding(
        encoder=TextEncoderIdentity(name="made-up", sha256="0" * 64, settings=settings),
        context_shape=(layout.max_length, layout.width),
        dtype=layout.dtype,
        null_context_sha256=hashlib.sha256(null_context).hexdigest(),
    )
    manifest = Manifest(
        vae=EncoderIdentity(name="made-up", sha256="0" * 64),
        text=text,
        image_size=256,
        dtype="float16",
        latent_shape=LATENT_SHAPE,
        num_samples=num_samples,
        num_captions=NUM_CAPTIONS * num_samples,
        latent_mean=0.0,
        latent_std=1.0,
        channel_mean=(0.0,) * LATENT_SHAPE[0],
        channel_std=(1.0,) * LATENT_SHAPE[0],
        shards=shards,
    )
    write_manifest(str(folder), manifest)
    num_tokens = sum(int(_lengths(n, layout).sum()) for n in range(num_samples))
    return text.bytes_per_token * num_tokens / manifest.num_captions


def _lengths(number: int, layout: ContextLayout) -> Array:
    """Tokens of the captions of a sample: 8 + Binomial(17, 0.3), about as for COCO."""
    if layout.keeps_padding:
        return np.full(NUM_CAPTIONS, layout.max_length, np.int32)
    return 8 + np.random.default_rng(number).binomial(17, 0.3, NUM_CAPTIONS).astype(np.int32)


def _sample(number: int, layout: ContextLayout) -> LatentSample:
    """Sample random values in [0, 1); integers below the bit pattern of 1.0 are fast to sample."""
    generator, lengths = np.random.default_rng(number), _lengths(number, layout)
    moments, tokens = (
        generator.integers(0, 0x3C00, shape, np.uint16).view(np.float16)
        for shape in (MOMENTS_SHAPE, (lengths.sum(), layout.width))
    )
    scale = None
    if layout.dtype == "int8":
        tokens, scale = to_int8(tokens)
    captions = tuple(f"caption {k} of image {number}" for k in range(NUM_CAPTIONS))
    return LatentSample(
        key=f"{number:012d}",
        moments=moments,
        context=tokens,
        context_lengths=lengths,
        context_scale=scale,
        metadata=SampleMetadata(image_id=number, captions=captions, width=640, height=480),
    )


def samples_per_second(start: Callable[[], Stream]) -> float:
    """Measure the rate of a stream, without the start of its workers and the first batches."""
    with closing(start()) as stream:
        for _ in islice(stream, WARM_UP_BATCHES):
            pass
        num_samples, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < SECONDS:
            num_samples += next(stream)
    return num_samples / elapsed


def read_shards(folder: Path, config: BenchLoaderConfig) -> Stream:
    """Read with the loader of the verb `train`."""
    with closing(_open_batches(ShardReader(str(folder)), config, None)) as batches:
        for batch in batches:
            yield len(batch.moments)


def read_webdataset(folder: Path, config: BenchLoaderConfig) -> Stream:
    """Read with webdataset's pipeline: shuffled, decoded and batched by worker processes."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = (
        WebDataset(urls, shardshuffle=len(urls))
        .repeat()
        .shuffle(SHUFFLE_BUFFER)
        .decode()
        .to_tuple("moments.npy", "context.npy", "context_lengths.npy")
        .map(_choose_caption)
        .batched(config.batch_size, collation_fn=_collate)
    )
    for moments, _ in WebLoader(samples, batch_size=None, num_workers=config.num_workers):
        yield len(moments)


def _choose_caption(sample: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    moments, tokens, lengths = sample
    contexts = np.split(tokens, np.cumsum(lengths)[:-1])
    return moments, contexts[random.randrange(len(contexts))]


def _collate(samples: list[tuple[Array, Array]]) -> tuple[Tensor, Tensor]:
    """Stack moments, and contexts padded to the longest one of the batch."""
    moments, contexts = zip(*samples, strict=True)
    padded = pad_sequence([torch.from_numpy(tokens) for tokens in contexts], batch_first=True)
    return torch.from_numpy(np.stack(moments)), padded


def seconds_of_epoch(url: str, parent: Path, config: BenchLoaderConfig) -> float:
    """Measure how long the loader takes to read an epoch from a store with an empty cache."""
    with tempfile.TemporaryDirectory(dir=parent) as cache:
        began = time.perf_counter()
        reader = ShardReader(url, CacheConfig(folder=cache))
        with closing(_open_batches(reader, config, SHUFFLE_WINDOW)) as batches:
            for _ in islice(batches, len(reader) // config.batch_size):
                pass
            return time.perf_counter() - began


def seconds_of_downloads(url: str, parent: Path) -> float:
    """Measure how long downloading the same shards one by one takes."""
    names = [name for name in storage.list_names(url) if name.endswith(".tar")]
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        began = time.perf_counter()
        for name in names:
            storage.download(storage.join(url, name), Path(folder, name))
        return time.perf_counter() - began


def _open_batches(
    reader: ShardReader, config: BenchLoaderConfig, window: int | None
) -> Generator[Batch]:
    order = BatchOrder(
        shard_sizes=reader.shard_sizes,
        global_batch_size=config.batch_size,
        seed=0,
        caption_dropout=0.0,
        shuffle_window=window,
    )
    alone = World(rank=0, size=1, local_rank=0)
    batches = Batches(reader, order, config.batch_size, alone, config.num_workers)
    return batches.stream(0, 0, torch.device("cpu"))
