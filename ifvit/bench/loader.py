"""The verb `bench loader`: samples per second, against three others on the same samples."""

import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from ifvit import storage
from ifvit.bench import loader_peers
from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.loader_data import make_content, write_files, write_shards
from ifvit.bench.timing import measure_rounds, median_ratio, print_result
from ifvit.distributed import World
from ifvit.shards import CacheConfig, ShardReader
from ifvit.training.batch import Batch
from ifvit.training.batches import Batches
from ifvit.training.order import BatchOrder
from ifvit.training.state import TrainState

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
