"""What the loader is compared with; each reads one random caption with every image."""

import random
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from webdataset import WebDataset, WebLoader

from ifvit.bench.config import BenchLoaderConfig
from ifvit.bench.loader_data import CONTEXT_SHAPE, NUM_CAPTIONS, Content
from ifvit.shards.records import Array
from ifvit.training.batch import HostMemory
from ifvit.training.order import BatchOrder

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
