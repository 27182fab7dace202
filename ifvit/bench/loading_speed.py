"""The verb `bench loader`: samples per second, against three others on the same samples."""

import hashlib
import random
import statistics
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset import WebDataset, WebLoader

from data_pipeline.shard_io import npy_bytes, write_shard
from ifvit import storage
from ifvit.bench import loading_speed as loader_peers
from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.timing import measure_rounds, median_ratio, print_result
from ifvit.distributed import World
from ifvit.shards import (
    CacheConfig,
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    ShardReader,
    TextEncoding,
    write_manifest,
)
from ifvit.shards.format import NULL_CONTEXT, Array
from ifvit.training.data import Batch, Batches, BatchOrder, HostMemory, empty_aligned
from ifvit.training.state import TrainState

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


SHUFFLE_BUFFER = 1000


def read_webdataset(folder: Path, config: BenchLoaderConfig) -> Generator[int]:
    """The shards by webdataset's own pipeline: shuffled, decoded, batched by worker processes."""
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


def read_files(folder: Path, config: BenchLoaderConfig) -> Generator[int]:
    """U-ViT's layout by torch's DataLoader: two small files for each sample."""
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


def copy_memory(content: Content, config: BenchLoaderConfig) -> Generator[int]:
    """The bare cost: rows that are in memory copied into batches, by as many threads.

    The batches' memory is used again, as the loader's is.
    """
    memory = HostMemory()
    contexts = content.contexts.reshape(-1, *CONTEXT_SHAPE)

    def take(samples: Array, captions: Array) -> tuple[Tensor, Tensor]:
        rows = samples * NUM_CAPTIONS + captions
        return _take(memory, content.moments, samples), _take(memory, contexts, rows)

    with ThreadPoolExecutor(config.num_workers) as pool:
        pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for chosen in cycle(_choices(config)):
            pending.append(pool.submit(take, *chosen))
            if len(pending) > 2 * config.num_workers:
                yield len(pending.popleft().result()[0])


def _choices(config: BenchLoaderConfig) -> list[tuple[Array, Array]]:
    """Samples and captions of the batches of an epoch, as the loader reads them."""
    order = BatchOrder(
        shard_sizes=np.array([config.num_images]),
        global_batch_size=config.batch_size,
        seed=0,
        caption_dropout=0.0,
    )
    positions = np.arange(config.batch_size)
    counts = np.full(config.batch_size, NUM_CAPTIONS)
    return [
        (
            order.sample_indices(step * config.batch_size, positions),
            order.caption_indices(step, positions, counts),
        )
        for step in range(config.num_images // config.batch_size)
    ]


def _take(memory: HostMemory, source: Array, rows: Array) -> Tensor:
    out = memory.empty((len(rows), *source.shape[1:]), source.dtype)
    np.take(source, rows, axis=0, out=out.numpy(), mode="clip")  # any other mode copies twice
    return out


class _NpyFiles(Dataset[tuple[Array, Array]]):
    """N.npy and one of N_K.npy."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self._folder, self._num_samples = folder, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, number: int) -> tuple[Array, Array]:
        caption = random.randrange(NUM_CAPTIONS)
        moments = np.load(self._folder / f"{number}.npy")
        return moments, np.load(self._folder / f"{number}_{caption}.npy")


def _choose_caption(sample: tuple[Array, Array]) -> tuple[Array, Array]:
    moments, contexts = sample
    return moments, contexts[random.randrange(len(contexts))]


SHUFFLE_WINDOW = 4
WARM_UP_BATCHES = 2

Stream = Generator[int]
"""Reads batches without end and says how many samples each one held."""


def bench_loader(config: BenchLoaderConfig) -> None:
    """Write the samples, measure, print ratios, remove everything."""
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as folder:
        if config.store is None:
            result = compare_with_peers(Path(folder), config)
        else:
            result = compare_with_download(Path(folder), config, config.store)
    print_result(result, config.json)


def compare_with_peers(folder: Path, config: BenchLoaderConfig) -> dict[str, float]:
    """Samples a second, and their ratio to those of each of the others."""
    content = make_content(config.num_images)
    shards, files = folder / "shards", folder / "files"
    write_shards(shards, content)
    write_files(files, content)
    streams: dict[str, Callable[[], Stream]] = {
        "loader": partial(read_shards, str(shards), config),
        "webdataset": partial(loader_peers.read_webdataset, shards, config),
        "npy": partial(loader_peers.read_files, files, config),
        "copy": partial(loader_peers.copy_memory, content, config),
    }
    measures = {
        name: partial(samples_per_second, stream, config.seconds)
        for name, stream in streams.items()
    }
    rates = measure_rounds(measures, config.rounds)
    loader = rates.pop("loader")
    ratios = {f"vs_{name}": median_ratio(loader, others) for name, others in rates.items()}
    return {"samples_per_s": statistics.median(loader), **ratios}


def samples_per_second(start: Callable[[], Stream], seconds: float) -> float:
    """The rate once everything runs; starting workers and the first batches are not counted."""
    with closing(start()) as stream:
        for _ in islice(stream, WARM_UP_BATCHES):
            pass
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            count += next(stream)
    return count / elapsed


def read_shards(url: str, config: BenchLoaderConfig) -> Stream:
    """The loader of the verb `train`."""
    reader = ShardReader(url)
    with closing(_open_batches(reader, config, None)) as batches:
        for batch in batches:
            yield len(batch.moments)


def compare_with_download(folder: Path, config: BenchLoaderConfig, store: str) -> dict[str, float]:
    """Rate of an epoch from an empty cache, and its ratio to downloading the tars one by one."""
    shards, url = folder / "shards", storage.join(store, f"bench-{uuid.uuid4().hex}")
    write_shards(shards, make_content(config.num_images))
    try:
        for path in tqdm(sorted(shards.iterdir()), desc="upload", leave=False):
            storage.upload(path, storage.join(url, path.name))
        seconds = measure_rounds(
            {
                "epoch": partial(_seconds_of_epoch, url, folder, config),
                "download": partial(_seconds_of_downloads, url, folder),
            },
            config.rounds,
        )
    finally:
        storage.remove(url)
    return {
        "samples_per_s": config.num_images / statistics.median(seconds["epoch"]),
        "vs_download": median_ratio(seconds["download"], seconds["epoch"]),
    }


def _seconds_of_epoch(url: str, parent: Path, config: BenchLoaderConfig) -> float:
    with tempfile.TemporaryDirectory(dir=parent) as cache:
        began = time.perf_counter()
        reader = ShardReader(url, CacheConfig(folder=cache))
        with closing(_open_batches(reader, config, SHUFFLE_WINDOW)) as batches:
            for _ in islice(batches, len(reader) // config.batch_size):
                pass
            return time.perf_counter() - began


def _seconds_of_downloads(url: str, parent: Path) -> float:
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
    return batches.from_state(TrainState(), torch.device("cpu"))
