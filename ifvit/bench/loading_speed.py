"""The verb `bench loader`: samples per second of the training loader and of webdataset's pipeline.

Both read the same random samples. With `--store` the loader reads an epoch from an object store and
is compared with downloading the shards.
"""

import hashlib
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from webdataset import WebDataset, WebLoader

from data_pipeline.shard_io import write_shard
from ifvit import storage
from ifvit.arrays import Array, npy_bytes
from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.measurement import measure_rounds, median_ratio, print_result
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
    write_manifest,
)
from ifvit.shards.reader import ShardReader
from ifvit.training.data import Batch, Batches, BatchOrder

LATENT_SHAPE = (4, 32, 32)
MOMENTS_SHAPE = (8, 32, 32)
CONTEXT_SHAPE = (77, 768)
NUM_CAPTIONS = 5
NUM_SHARDS = 16
SHUFFLE_BUFFER = 1000
"""Samples that webdataset shuffles."""
SHUFFLE_WINDOW = 4
"""Shards that the loader shuffles when it reads from a store."""
WARM_UP_BATCHES = 2
SECONDS = 3.0
"""Length of one measurement."""

Stream = Generator[int]
"""Reads batches without end and yields the number of samples in each batch."""


def bench_loader(config: BenchLoaderConfig) -> None:
    """Write random samples to a temporary folder, measure all readers, print the ratios."""
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as folder:
        shards = Path(folder, "shards")
        write_shards(shards, config.num_images)
        compare = compare_with_webdataset if config.store is None else compare_with_download
        print_result(compare(shards, config), config.json)


def compare_with_webdataset(shards: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of the loader, absolute and relative to webdataset."""
    streams = {"loader": read_shards, "webdataset": read_webdataset}
    measures = {
        name: partial(samples_per_second, partial(stream, shards, config))
        for name, stream in streams.items()
    }
    rates = measure_rounds(measures, config.rounds)
    return {
        "samples_per_s": statistics.median(rates["loader"]),
        "vs_webdataset": median_ratio(rates["loader"], rates["webdataset"]),
    }


def compare_with_download(shards: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of an epoch with an empty cache, and relative to downloads."""
    assert config.store is not None
    url = storage.join(config.store, f"bench-{uuid.uuid4().hex}")
    try:
        for path in sorted(shards.iterdir()):
            storage.upload(path, storage.join(url, path.name))
        contenders = {
            "epoch": partial(seconds_of_epoch, url, shards.parent, config),
            "download": partial(seconds_of_downloads, url, shards.parent),
        }
        seconds = measure_rounds(contenders, config.rounds)
    finally:
        storage.remove(url)
    return {
        "samples_per_s": config.num_images / statistics.median(seconds["epoch"]),
        "vs_download": median_ratio(seconds["download"], seconds["epoch"]),
    }


def write_shards(folder: Path, num_samples: int) -> None:
    """Write a dataset of 16 shards with the writer of the encode job."""
    parts = np.array_split(np.arange(num_samples), NUM_SHARDS)
    shards = tuple(
        write_shard(str(folder), f"shard-{k:05d}", map(_sample, part.tolist()))
        for k, part in enumerate(parts)
    )
    null_context = npy_bytes(np.zeros(CONTEXT_SHAPE, np.float16))
    (folder / NULL_CONTEXT).write_bytes(null_context)
    encoder = EncoderIdentity(name="made-up", sha256="0" * 64)
    manifest = Manifest(
        vae=encoder,
        text=TextEncoding(
            encoder=TextEncoderIdentity(name="made-up", sha256="0" * 64),
            context_shape=CONTEXT_SHAPE,
            dtype="float16",
            null_context_sha256=hashlib.sha256(null_context).hexdigest(),
        ),
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


def _sample(number: int) -> LatentSample:
    """Sample random values in [0, 1); integers below the bit pattern of 1.0 are fast to sample."""
    generator = np.random.default_rng(number)
    moments, contexts = (
        generator.integers(0, 0x3C00, shape, np.uint16).view(np.float16)
        for shape in (MOMENTS_SHAPE, (NUM_CAPTIONS * CONTEXT_SHAPE[0], CONTEXT_SHAPE[1]))
    )
    captions = tuple(f"caption {k} of image {number}" for k in range(NUM_CAPTIONS))
    return LatentSample(
        key=f"{number:012d}",
        moments=moments,
        context=contexts,
        context_lengths=np.full(NUM_CAPTIONS, CONTEXT_SHAPE[0], np.int32),
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
        .batched(config.batch_size)
    )
    for moments, _ in WebLoader(samples, batch_size=None, num_workers=config.num_workers):
        yield len(moments)


def _choose_caption(sample: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    moments, tokens, lengths = sample
    contexts = np.split(tokens, np.cumsum(lengths)[:-1])
    return moments, contexts[random.randrange(len(contexts))]


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
