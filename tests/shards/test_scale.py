"""Memory does not grow with the dataset, and a dataset of many shards opens by one listing."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made_shards import make_samples, repeat_shard, write_shards

from ifvit.arrays import Array
from ifvit.shards.cache import read_index
from ifvit.shards.format import Manifest, ShardEntry
from ifvit.shards.index import ShardIndex
from ifvit.shards.reader import MAX_INDEX_ROWS, ShardReader
from ifvit.training.order import BatchOrder

NUM_SHARDS = 200
SHARD_SIZE = 8
ROWS_OF_A_SHARD = SHARD_SIZE + 15
"""Samples and captions."""


@pytest.fixture
def many_shards(tmp_path: Path) -> str:
    samples = make_samples(SHARD_SIZE, moments_shape=(2, 1, 1), context_shape=(1, 2))
    repeat_shard(tmp_path, write_shards(tmp_path, samples, [SHARD_SIZE]), NUM_SHARDS)
    return str(tmp_path)


def test_only_the_indexes_that_were_used_last_stay_in_memory(
    many_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes: list[weakref.ref[ShardIndex]] = []

    def read(url: str, manifest: Manifest, entry: ShardEntry) -> ShardIndex:
        index = read_index(url, manifest, entry)
        indexes.append(weakref.ref(index))
        return index

    def num_rows_in_memory() -> int:
        gc.collect()
        return sum(index.num_rows for ref in indexes if (index := ref()) is not None)

    monkeypatch.setattr("ifvit.shards.reader.MAX_INDEX_ROWS", 5 * ROWS_OF_A_SHARD + 3)
    monkeypatch.setattr("ifvit.shards.reader.read_index", read)
    reader = ShardReader(many_shards)
    assert not indexes  # opening reads no index
    expected = np.array([reader.num_captions(row) for row in range(SHARD_SIZE)])
    assert num_rows_in_memory() == ROWS_OF_A_SHARD
    generator = np.random.default_rng(0)
    batches = generator.integers(0, NUM_SHARDS * SHARD_SIZE, (300, 16))

    def check(samples: Array) -> None:
        assert (reader.caption_counts(samples) == expected[samples % SHARD_SIZE]).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, batches))
    assert len(indexes) > NUM_SHARDS
    assert num_rows_in_memory() == 5 * ROWS_OF_A_SHARD


def test_an_index_in_use_is_not_read_again(
    many_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.shards.reader.MAX_INDEX_ROWS", 2 * ROWS_OF_A_SHARD)
    reader = ShardReader(many_shards)
    reader.num_captions(0)
    Path(many_shards, "shard-00000.index.npz").rename(Path(many_shards, "moved"))
    Path(many_shards, "shard-00001.index.npz").unlink()
    for shard in range(2, 9):
        link = Path(many_shards, f"shard-{shard:05d}.index.npz")
        link.unlink()
        link.symlink_to("moved")
        reader.num_captions(shard * SHARD_SIZE)
        assert reader.num_captions(0) == 1


def test_the_order_of_a_billion_samples_is_computed_by_blocks() -> None:
    sizes = np.full(100_000, 10_000)
    assert MAX_INDEX_ROWS > 16 * 20_000
    order = BatchOrder(
        shard_sizes=sizes,
        global_batch_size=2048,
        seed=0,
        caption_dropout=0.1,
        shuffle_window=16,
    )
    positions = np.arange(2048)
    for samples_seen in (0, 10**6, 10**9 - 100, 3 * 10**9 + 7):
        samples = order.sample_indices(samples_seen, positions)
        assert len(np.unique(samples)) == 2048
        assert set(samples // 10_000) <= set(order.upcoming_shards(samples_seen))
