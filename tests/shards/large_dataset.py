"""Measure opening time and memory of a dataset of many samples, which needs little disk space.

    PYTHONPATH=.:tests python tests/shards/large_dataset.py FOLDER NUM_SHARDS SAMPLES_PER_SHARD

One real shard is written; all others are links to it. Memory is the growth of the peak (VmHWM).
"""

import resource
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from made_shards import make_samples, repeat_shard, write_shards

from ifvit.distributed import World
from ifvit.shards.reader import ShardReader
from ifvit.training.data import Batches
from ifvit.training.order import BatchOrder

NUM_BATCHES = 5000
BATCH_SIZE = 256


def main(folder: Path, num_shards: int, shard_size: int) -> None:
    """Write the dataset unless it is there, open it, and read batches from many windows."""
    if not folder.exists():
        samples = make_samples(shard_size, moments_shape=(2, 2, 2), context_shape=(1, 2))
        repeat_shard(folder, write_shards(folder, samples, [shard_size]), num_shards)
        return
    reader = report("open", lambda: ShardReader(str(folder)))
    sys.stdout.write(f"{reader.manifest.contents}\n")
    order = BatchOrder(
        shard_sizes=reader.shard_sizes,
        global_batch_size=BATCH_SIZE,
        seed=0,
        caption_dropout=0.1,
        shuffle_window=16,
    )
    batches = Batches(reader, order, BATCH_SIZE, World(rank=0, size=1, local_rank=0), 4)

    def read(num_batches: int, samples_seen: int) -> None:
        with closing(batches.stream(0, samples_seen, torch.device("cpu"))) as stream:
            for _, _ in zip(range(num_batches), stream, strict=False):
                pass

    report(f"{NUM_BATCHES} batches of {BATCH_SIZE}", lambda: read(NUM_BATCHES, 0))
    block = 16 * shard_size
    for first in (0, 100, 200):
        numbers = range(first, first + 100)
        report("100 windows, 2 batches each", lambda r=numbers: [read(2, n * block) for n in r])


def report(what, action):
    """Run and print seconds and the growth of the peak memory."""
    before, start = peak(), time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{what}: {seconds:.1f} s, peak {before:.0f} -> {peak():.0f} MiB\n")
    return result


def peak() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
