"""The verb `bench loader`: samples per second, against three others on the same samples."""

import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from ifvit import storage
from ifvit.bench import loader_peers
from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.loader_data import make_content, write_files, write_shards
from ifvit.bench.timing import median_of_rounds, print_result
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
    """Write the samples in both layouts, measure, print ratios, remove everything."""
    content = make_content(config.num_samples)
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as name:
        shards, files = Path(name, "shards"), Path(name, "files")
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
        rates = median_of_rounds(measures, config.rounds)
        result: dict[str, object] = {"samples_per_s": rates["loader"]}
        for name in ("webdataset", "npy", "copy"):
            result[f"vs_{name}"] = rates["loader"] / rates[name]
        if config.store is not None:
            result["vs_download"] = compare_with_download(shards, config, config.store)
    print_result(result, config.json)


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


def compare_with_download(folder: Path, config: BenchLoaderConfig, store: str) -> float:
    """Rate of reading an epoch from an empty cache / rate of downloading its tars one by one."""
    url = storage.join(store, f"bench-{uuid.uuid4().hex}")
    try:
        for path in sorted(folder.iterdir()):
            storage.upload(path, storage.join(url, path.name))
        seconds = median_of_rounds(
            {
                "epoch": partial(_seconds_of_epoch, url, folder.parent, config),
                "download": partial(_seconds_of_downloads, url, folder.parent),
            },
            config.rounds,
        )
    finally:
        storage.remove(url)
    return seconds["download"] / seconds["epoch"]


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
