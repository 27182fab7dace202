"""The verb `bench loader`: samples per second of the training loader and of two peers.

All read the same random samples. The peers are the pipeline of webdataset, and torch's DataLoader
over the layout of U-ViT (one file per array). With `--store` the loader reads an epoch from an
object store and is compared with downloading the shards.
"""

import hashlib
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
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
    TextEncoding,
    write_manifest,
)
from ifvit.shards.reader import ShardReader
from ifvit.training.data import Batch, Batches, BatchOrder

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
        compare = compare_with_peers if config.store is None else compare_with_download
        print_result(compare(Path(folder), config), config.json)


def compare_with_peers(folder: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of the loader, and its speed relative to each peer."""
    content = make_content(config.num_images)
    write_shards(folder / "shards", content)
    write_files(folder / "files", content)
    streams: dict[str, Callable[[], Stream]] = {
        "loader": partial(read_shards, folder / "shards", config),
        "webdataset": partial(read_webdataset, folder / "shards", config),
        "npy": partial(read_files, folder / "files", config),
    }
    measures = {name: partial(samples_per_second, stream) for name, stream in streams.items()}
    rates = measure_rounds(measures, config.rounds)
    loader = rates.pop("loader")
    ratios = {f"vs_{name}": median_ratio(loader, others) for name, others in rates.items()}
    return {"samples_per_s": statistics.median(loader), **ratios}


def compare_with_download(folder: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Measure the samples per second of an epoch with an empty cache, and relative to downloads."""
    assert config.store is not None
    shards, url = folder / "shards", storage.join(config.store, f"bench-{uuid.uuid4().hex}")
    write_shards(shards, make_content(config.num_images))
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


@dataclass(frozen=True, kw_only=True)
class Content:
    """Arrays of N images: `moments` (N, 8, 32, 32) and `contexts` (N, 5, 77, 768), float16."""

    moments: Array
    contexts: Array


def make_content(num_samples: int) -> Content:
    """Sample random values in [0, 1); integers below the bit pattern of 1.0 are fast to sample."""
    generator = np.random.default_rng(0)
    moments, contexts = (
        generator.integers(0, 0x3C00, (num_samples, *shape), np.uint16).view(np.float16)
        for shape in (MOMENTS_SHAPE, (NUM_CAPTIONS, *CONTEXT_SHAPE))
    )
    return Content(moments=moments, contexts=contexts)


def write_shards(folder: Path, content: Content) -> None:
    """Write a dataset of 16 shards with the writer of the encode job."""
    parts = np.array_split(np.arange(len(content.moments)), NUM_SHARDS)
    shards = tuple(
        write_shard(str(folder), f"shard-{k:05d}", (_sample(content, n) for n in part.tolist()))
        for k, part in enumerate(parts)
    )
    null_context = npy_bytes(np.zeros(CONTEXT_SHAPE, np.float16))
    (folder / NULL_CONTEXT).write_bytes(null_context)
    encoder = EncoderIdentity(name="made-up", sha256="0" * 64)
    manifest = Manifest(
        vae=encoder,
        text=TextEncoding(
            encoder=encoder,
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


def _sample(content: Content, number: int) -> LatentSample:
    captions = tuple(f"caption {k} of image {number}" for k in range(NUM_CAPTIONS))
    return LatentSample(
        key=f"{number:012d}",
        moments=content.moments[number],
        context=content.contexts[number],
        metadata=SampleMetadata(image_id=number, captions=captions, width=640, height=480),
    )


def write_files(folder: Path, content: Content) -> None:
    """Write the layout of U-ViT: N.npy holds the moments of image N, N_K.npy its K-th context."""
    folder.mkdir()
    for n, (moments, contexts) in enumerate(zip(content.moments, content.contexts, strict=True)):
        np.save(folder / f"{n}.npy", moments)
        for k, context in enumerate(contexts):
            np.save(folder / f"{n}_{k}.npy", context)


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
        .to_tuple("moments.npy", "context.npy")
        .map(_choose_caption)
        .batched(config.batch_size)
    )
    for moments, _ in WebLoader(samples, batch_size=None, num_workers=config.num_workers):
        yield len(moments)


def _choose_caption(sample: tuple[Array, Array]) -> tuple[Array, Array]:
    moments, contexts = sample
    return moments, contexts[random.randrange(len(contexts))]


def read_files(folder: Path, config: BenchLoaderConfig) -> Stream:
    """Read U-ViT's layout with torch's DataLoader: two small files for each sample."""
    loader = DataLoader(
        _NpyFiles(folder, config.num_images),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.num_workers,
        persistent_workers=True,
    )
    while True:
        for moments, _ in loader:
            yield len(moments)


class _NpyFiles(Dataset[tuple[Array, Array]]):
    """Dataset of N.npy and a randomly chosen N_K.npy."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self._folder, self._num_samples = folder, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, number: int) -> tuple[Array, Array]:
        caption = random.randrange(NUM_CAPTIONS)
        moments = np.load(self._folder / f"{number}.npy")
        return moments, np.load(self._folder / f"{number}_{caption}.npy")


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
