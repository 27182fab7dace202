"""Order and choice depend on seed, epoch, step and position, and on nothing else."""

import numpy as np
import pytest

from ifvit.training.data import BatchOrder

SIZES = {"some empty": [5, 1, 0, 8, 3, 4], "one": [9], "equal": [4, 4, 4, 4]}
WINDOWS = [None, 1, 3, 100]
SEEDS = [0, 2**40 + 7]


def make_order(
    sizes: str = "some empty", window: int | None = None, seed: int = 3, **fields: object
) -> BatchOrder:
    values: dict[str, object] = {
        "shard_sizes": np.array(SIZES[sizes]),
        "global_batch_size": 6,
        "seed": seed,
        "caption_dropout": 0.3,
        "shuffle_window": window,
        **fields,
    }
    return BatchOrder(**values)  # type: ignore[arg-type]


def straight(order: BatchOrder, epochs: int) -> list[int]:
    """The samples of the first epochs, asked for at once."""
    return order.sample_indices(0, np.arange(epochs * order.num_samples)).tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_epoch_holds_every_sample_once_in_a_new_order(
    sizes: str, window: int | None, seed: int
) -> None:
    order = make_order(sizes, window, seed)
    epochs = np.reshape(straight(order, 4), (4, order.num_samples)).tolist()
    assert all(sorted(epoch) == list(range(order.num_samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch_size", [6, 24, 72])
def test_any_step_and_any_split_agree_with_the_straight_order(
    sizes: str, window: int | None, seed: int, batch_size: int
) -> None:
    expected = straight(make_order(sizes, window, seed), 8)
    for step in range(len(expected) // batch_size):
        start = step * batch_size
        # A new object each time: nothing is carried from step to step.
        order = make_order(sizes, window, seed, global_batch_size=batch_size)
        for share in np.array_split(np.arange(batch_size), 1 + step % 3):
            found = order.sample_indices(start, share).tolist()
            assert found == [expected[start + position] for position in share]


def test_another_seed_chooses_other_captions_drops_and_flips() -> None:
    positions, counts = np.arange(300), np.full(300, 5)
    one, other = (make_order(seed=seed, random_flip=True) for seed in (3, 4))
    chosen, others = (order.caption_indices(7, positions, counts) for order in (one, other))
    assert not np.array_equal(chosen < 0, others < 0)
    kept = (chosen >= 0) & (others >= 0)
    assert not np.array_equal(chosen[kept], others[kept])
    assert not np.array_equal(one.mirrored(7, positions), other.mirrored(7, positions))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_of_shards_is_used_up_before_the_next(window: int, seed: int) -> None:
    order = make_order("equal", window, seed)
    shards = np.repeat(np.arange(4), SIZES["equal"])
    for epoch in np.reshape(straight(order, 3), (3, order.num_samples)):
        used: list[set[int]] = [set()]
        for shard in shards[epoch].tolist():
            if shard not in used[-1] and len(used[-1]) == window:
                used.append(set())
            used[-1].add(shard)
        assert sum(map(len, used)) == 4


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_shards_are_announced_a_window_before_they_are_used(window: int) -> None:
    order = make_order("equal", window, global_batch_size=2)
    announced = order.coming_shards(0)
    for samples_seen in range(0, 5 * order.num_samples, 2):
        used = {sample // 4 for sample in order.sample_indices(samples_seen, np.arange(2)).tolist()}
        assert used <= set(announced)
        announced = order.coming_shards(samples_seen)
        assert used <= set(announced[:window])


def test_all_shards_of_a_batch_that_spans_blocks_are_announced() -> None:
    order = make_order("equal", 1, global_batch_size=10)
    for samples_seen in range(0, 80, 10):
        used = order.sample_indices(samples_seen, np.arange(10)) // 4
        assert set(used.tolist()) <= set(order.coming_shards(samples_seen))


def test_no_more_than_the_block_after_the_next_batch_is_announced() -> None:
    order = make_order("equal", 1, global_batch_size=4)  # a batch is a block
    assert [len(order.coming_shards(seen)) for seen in range(0, 12, 4)] == [2, 2, 2]


def test_blocks_epochs_and_seeds_are_shuffled_apart() -> None:
    def blocks(seed: int) -> list[np.ndarray]:
        order = make_order(window=1, seed=seed, shard_sizes=np.full(8, 50))
        return np.split(np.array(straight(order, 2)), 16)

    first, other = blocks(3), blocks(4)
    within = {tuple(block % 50) for block in (*first, *other)}
    assert len(within) == 32
    shards = [[int(block[0]) // 50 for block in row] for row in (first, other)]
    in_epochs = {tuple(row[start : start + 8]) for row in shards for start in (0, 8)}
    assert len(in_epochs) == 4
    whole = [straight(make_order("equal", seed=seed), 1) for seed in (3, 4)]
    assert whole[0] != whole[1]


def test_without_a_window_shards_do_not_show() -> None:
    cut = straight(make_order("equal"), 2)
    whole = make_order("equal", shard_sizes=np.array([16]))
    assert straight(whole, 2) == cut


def test_captions_are_chosen_uniformly_and_dropped_at_the_given_rate() -> None:
    positions = np.arange(30_000)
    chosen = make_order().caption_indices(7, positions, np.full(30_000, 5))
    share = np.bincount(chosen + 1, minlength=6) / 30_000
    assert share[0] == pytest.approx(0.3, abs=0.01)
    assert share[1:] == pytest.approx(0.14, abs=0.01)
    again = make_order().caption_indices(8, positions, np.full(30_000, 5))
    # Chosen and dropped anew at every step.
    assert ((chosen < 0) & (again < 0)).mean() == pytest.approx(0.3**2, abs=0.01)
    kept = (chosen >= 0) & (again >= 0)
    assert (chosen == again)[kept].mean() == pytest.approx(1 / 5, abs=0.01)


def test_half_of_all_visits_are_mirrored_whatever_the_split() -> None:
    order, positions = make_order(random_flip=True), np.arange(30_000)
    flips = order.mirrored(7, positions)
    assert flips is not None
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    parts = [order.mirrored(7, part) for part in np.array_split(positions, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), flips)  # type: ignore[arg-type]
    assert (order.mirrored(8, positions) != flips).mean() == pytest.approx(0.5, abs=0.01)
    assert make_order().mirrored(7, positions) is None
