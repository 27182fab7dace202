"""Order and choice depend on seed, epoch, step and position, and on nothing else."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import NUM_SAMPLES

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.shards import ShardReader
from ifvit.training.batches import Batch, Batches, BatchOrder
from ifvit.training.state import TrainState


def order(seed: int = 3, global_batch_size: int = 6, dropout: float = 0.3) -> BatchOrder:
    return BatchOrder(
        num_samples=NUM_SAMPLES,
        global_batch_size=global_batch_size,
        seed=seed,
        caption_dropout=dropout,
    )


def read_step(shards: str, step: int, size: int, micro: int, threads: int = 2) -> dict[int, Batch]:
    """One global batch as `size` processes read it: position => its row."""
    state = TrainState(step=step, samples_seen=6 * step)
    by_position: dict[int, Batch] = {}
    for rank in range(size):
        world = World(rank=rank, size=size, local_rank=rank)
        batches = Batches(ShardReader(shards), order(), micro, world, threads)
        for batch in islice(batches.from_state(state), batches.num_micro_batches):
            for row, position in enumerate(batch.positions.tolist()):
                assert position not in by_position
                by_position[position] = Batch(
                    moments=batch.moments[row],
                    context=batch.context[row],
                    positions=batch.positions[row],
                )
    return by_position


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 3), (2, 3), (2, 1), (3, 2), (6, 1)])
@pytest.mark.parametrize("step", [0, 3, 50])
def test_global_batch_is_the_same_for_every_world_and_micro_batch(
    shards: str, size: int, micro: int, step: int
) -> None:
    whole = read_step(shards, step, 1, 6, threads=1)
    split = read_step(shards, step, size, micro)
    assert sorted(split) == sorted(whole) == list(range(6))
    for position, row in whole.items():
        assert torch.equal(split[position].moments, row.moments)
        assert torch.equal(split[position].context, row.context)


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**40 + 7])
def test_every_epoch_holds_every_sample_once_in_a_new_order(seed: int) -> None:
    seen = order(seed).sample_indices(0, torch.arange(3 * NUM_SAMPLES)).view(3, NUM_SAMPLES)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(NUM_SAMPLES))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_batches_cross_the_end_of_an_epoch_without_a_gap() -> None:
    straight = order().sample_indices(0, torch.arange(60))
    batched = [order().sample_indices(6 * step, torch.arange(6)) for step in range(10)]
    assert torch.equal(torch.cat(batched), straight)


def test_captions_are_chosen_uniformly_and_dropped_at_the_given_rate() -> None:
    positions = torch.arange(30_000)
    chosen = order().caption_indices(7, positions, torch.full((30_000,), 5))
    share = np.bincount(chosen.numpy() + 1, minlength=6) / 30_000
    assert share[0] == pytest.approx(0.3, abs=0.01)
    assert share[1:] == pytest.approx(0.14, abs=0.01)


def test_a_dropped_caption_becomes_the_null_context(shards: str) -> None:
    world = World(rank=0, size=1, local_rank=0)
    batches = Batches(ShardReader(shards), order(dropout=1.0), 6, world, 1)
    batch = next(batches.from_state(TrainState()))
    assert torch.count_nonzero(batch.context) == 0
    assert torch.count_nonzero(batch.moments) > 0


def test_a_batch_that_cannot_be_split_is_refused(shards: str) -> None:
    world = World(rank=0, size=4, local_rank=0)
    with pytest.raises(UserError, match="global_batch_size 6 is not a multiple of"):
        Batches(ShardReader(shards), order(), 1, world, 1)
