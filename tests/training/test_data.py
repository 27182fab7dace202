"""Order and content of batches depend on seed, epoch, step and position, and on nothing else."""

import functools
import queue
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from made_shards import CLASSES, make_samples, write_shards

from ifvit import storage
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import NullContext
from ifvit.rng import Stream, uniform
from ifvit.shards import CacheConfig
from ifvit.shards.format import LatentSample, ShardError
from ifvit.shards.reader import ShardReader
from ifvit.training.config import CaptionConfig
from ifvit.training.data import Batch, Batches, prefetch_shards
from ifvit.training.order import BatchOrder, CaptionWeights, weigh_captions

SIZES = {"some empty": [5, 1, 0, 8, 3, 4], "one": [9], "equal": [4, 4, 4, 4]}
SEEDS = [0, 2**40 + 7]
over_orders = pytest.mark.parametrize(
    ("sizes", "window", "seed"),
    [(sizes, window, seed) for sizes in SIZES for window in (None, 1, 3, 100) for seed in SEEDS],
)


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


def all_samples(order: BatchOrder, num_epochs: int) -> list[int]:
    """The samples of the first epochs, requested at once."""
    return order.sample_indices(0, np.arange(num_epochs * order.num_samples)).tolist()


@over_orders
def test_every_epoch_holds_every_sample_once_in_a_new_order(
    sizes: str, window: int | None, seed: int
) -> None:
    order = make_order(sizes, window, seed)
    epochs = np.reshape(all_samples(order, 4), (4, order.num_samples)).tolist()
    assert all(sorted(epoch) == list(range(order.num_samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@over_orders
def test_any_step_and_any_partition_agree_with_the_whole_sequence(
    sizes: str, window: int | None, seed: int
) -> None:
    expected = all_samples(make_order(sizes, window, seed), 8)
    for batch_size in (6, 24, 72):
        for step in range(len(expected) // batch_size):
            start = step * batch_size
            # A new object each time: nothing is carried from step to step.
            order = make_order(sizes, window, seed, global_batch_size=batch_size)
            for positions in np.array_split(np.arange(batch_size), 1 + step % 3):
                found = order.sample_indices(start, positions).tolist()
                assert found == [expected[start + position] for position in positions]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_of_shards_is_used_up_before_the_next_begins(window: int, seed: int) -> None:
    order = make_order("equal", window, seed)
    shards = np.repeat(np.arange(4), SIZES["equal"])
    for epoch in np.reshape(all_samples(order, 3), (3, order.num_samples)):
        used: list[set[int]] = [set()]
        for shard in shards[epoch].tolist():
            if shard not in used[-1] and len(used[-1]) == window:
                used.append(set())
            used[-1].add(shard)
        assert sum(map(len, used)) == 4


@pytest.mark.parametrize(
    ("window", "batch_size"), [(1, 2), (2, 2), (3, 2), (100, 2), (1, 10), (1, 4)]
)
def test_shards_are_announced_a_window_before_they_are_used(window: int, batch_size: int) -> None:
    order = make_order("equal", window, global_batch_size=batch_size)
    announced = order.upcoming_shards(0)
    for samples_seen in range(0, 5 * order.num_samples, batch_size):
        positions = np.arange(batch_size)
        used = set((order.sample_indices(samples_seen, positions) // 4).tolist())
        if batch_size <= 4:
            assert used <= set(announced)
        announced = order.upcoming_shards(samples_seen)
        assert used <= set(announced)
        if batch_size == 2:
            assert used <= set(announced[:window])
        if batch_size == 4:  # a batch is a block, and one block more is announced
            assert len(announced) == 2


def test_blocks_epochs_and_seeds_are_shuffled_differently() -> None:
    def blocks(seed: int) -> list[np.ndarray]:
        order = make_order(window=1, seed=seed, shard_sizes=np.full(8, 50))
        return np.split(np.array(all_samples(order, 2)), 16)

    first, other = blocks(3), blocks(4)
    assert len({tuple(block % 50) for block in (*first, *other)}) == 32
    shards = [[int(block[0]) // 50 for block in row] for row in (first, other)]
    assert len({tuple(row[start : start + 8]) for row in shards for start in (0, 8)}) == 4
    whole = [all_samples(make_order("equal", seed=seed), 1) for seed in (3, 4)]
    assert whole[0] != whole[1]


def test_without_a_window_the_order_does_not_depend_on_the_shards() -> None:
    one_shard = make_order("equal", shard_sizes=np.array([16]))
    assert all_samples(one_shard, 2) == all_samples(make_order("equal"), 2)


def test_captions_are_chosen_uniformly_and_dropped_at_the_given_rate() -> None:
    positions, counts = np.arange(30_000), np.full(30_000, 5)
    chosen = make_order().caption_indices(7, positions, counts)
    rates = np.bincount(chosen + 1, minlength=6) / 30_000
    assert rates[0] == pytest.approx(0.3, abs=0.01)
    assert rates[1:] == pytest.approx(0.14, abs=0.01)
    # Another step or another seed chooses and drops independently.
    for again in (
        make_order().caption_indices(8, positions, counts),
        make_order(seed=4).caption_indices(7, positions, counts),
    ):
        assert ((chosen < 0) & (again < 0)).mean() == pytest.approx(0.3**2, abs=0.01)
        kept = (chosen >= 0) & (again >= 0)
        assert (chosen == again)[kept].mean() == pytest.approx(1 / 5, abs=0.01)


WEIGHTS = CaptionWeights(
    names=("original", "short", "long", "unused"),
    weights=np.array([1.0, 3.0, 0.5, 0.0]),
    dropout=np.array([0.3, 0.0, 0.6, 0.3]),
)
SOURCES = [np.array(numbers) for numbers in ([0, 1, 1, 2], [2, 0, 3], [1], [3, 2, 2, 2])]


def test_weighted_captions_are_those_of_a_plain_reference() -> None:
    num = 10_000
    order, sources = make_order(caption_weights=WEIGHTS), SOURCES * (num // 4)
    parts = np.array_split(np.arange(num), 7)
    counts = np.array([len(numbers) for numbers in sources])
    found = np.concatenate(
        [order.caption_indices(5, part, counts[part], [sources[n] for n in part]) for part in parts]
    )
    drawn, dropped = (
        uniform(3, 5, torch.arange(num), stream, 1)[:, 0].tolist()
        for stream in (Stream.CAPTION, Stream.DROPOUT)
    )
    for n, numbers in enumerate(source.tolist() for source in sources):
        chances = [Fraction(WEIGHTS.weights[one]) / numbers.count(one) for one in numbers]
        rest, caption = Fraction(drawn[n]) * sum(chances), 0
        while rest >= chances[caption]:
            rest, caption = rest - chances[caption], caption + 1
        is_dropped = dropped[n] < WEIGHTS.dropout[numbers[caption]]
        assert found[n] == (-1 if is_dropped else caption)


def test_sources_are_drawn_by_weight_and_dropped_at_their_own_rates() -> None:
    positions, numbers = np.arange(60_000), SOURCES[0]
    order, sources = make_order(caption_weights=WEIGHTS), [numbers] * len(positions)
    chosen = order.caption_indices(7, positions, np.full(len(positions), 4), sources)
    rates = np.bincount(chosen + 1, minlength=5) / len(positions)
    # Weights 1, 3 and 0.5 of 4.5; two short captions; 30 % of original and 60 % of long dropped.
    assert rates[1:] == pytest.approx([0.7 / 4.5, 1.5 / 4.5, 1.5 / 4.5, 0.2 / 4.5], abs=0.01)
    assert rates[0] == pytest.approx((0.3 + 0.3) / 4.5, abs=0.01)


def test_an_image_without_a_weighted_source_is_an_error() -> None:
    order = make_order(caption_weights=WEIGHTS)
    with pytest.raises(UserError, match=r"captions of unused only.* give one of these sources a"):
        order.caption_indices(0, np.arange(1), np.array([2]), [np.array([3, 3])])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("original", "long"), r"captions\.short: .* has no such source; it has original, long"),
        ((), r"captions\.short: .* has no such source; remove captions"),
    ],
)
def test_a_source_that_the_shards_do_not_have_is_an_error(
    names: tuple[str, ...], message: str
) -> None:
    reader = SimpleNamespace(url="shards", manifest=SimpleNamespace(caption_sources=names))
    with pytest.raises(UserError, match=message):
        weigh_captions({"short": CaptionConfig()}, cast(ShardReader, reader), 0.1)


def test_half_of_all_visits_are_flipped_whatever_the_partition() -> None:
    order, positions = make_order(random_flip=True), np.arange(30_000)
    flips = order.hflip(7, positions)
    assert flips is not None
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    parts = [order.hflip(7, part) for part in np.array_split(positions, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), flips)  # type: ignore[arg-type]
    for again in (
        order.hflip(8, positions),
        make_order(seed=4, random_flip=True).hflip(7, positions),
    ):
        assert (again != flips).mean() == pytest.approx(0.5, abs=0.01)
    assert make_order().hflip(7, positions) is None


CPU = torch.device("cpu")
GLOBAL_BATCH = 24
SHARDS = (12, 1, 9, 8)
open_reader = functools.cache(ShardReader)


@pytest.fixture(scope="module")
def samples() -> list[LatentSample]:
    return make_samples(sum(SHARDS), flipped=True)


@pytest.fixture(scope="module")
def flipped_shards(tmp_path_factory: pytest.TempPathFactory, samples: list[LatentSample]) -> str:
    """Four shards that also hold the flipped images."""
    folder = tmp_path_factory.mktemp("flipped")
    write_shards(folder, samples, SHARDS)
    return str(folder)


@pytest.fixture
def remote(flipped_shards: str) -> Iterator[str]:
    """The same dataset in an object store in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    for path in Path(flipped_shards).iterdir():
        storage.upload(path, f"{url}/{path.name}")
    yield url
    storage.remove(url)


def order_of(url: str, **fields: object) -> BatchOrder:
    sizes = open_reader(url, None).shard_sizes
    return make_order(shard_sizes=sizes, global_batch_size=GLOBAL_BATCH, **fields)  # type: ignore[arg-type]


def make_batches(
    url: str,
    rank: int = 0,
    size: int = 1,
    micro: int = GLOBAL_BATCH,
    cache: CacheConfig | None = None,
    null_context: NullContext = "empty_caption",
    **fields: object,
) -> Batches:
    reader, world = open_reader(url, cache), World(rank=rank, size=size, local_rank=rank)
    conditions = DatasetConditions(reader, null_context)
    order = make_order(shard_sizes=reader.shard_sizes, global_batch_size=GLOBAL_BATCH, **fields)  # type: ignore[arg-type]
    return Batches(reader, order, micro, world, 2, conditions)


def read_step(
    batches_of: Callable[[int], Batches], size: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and contexts of one global batch, put together from all processes."""
    parts: list[Batch] = []
    for rank in range(size):
        batches = batches_of(rank)
        with closing(batches.stream(step, GLOBAL_BATCH * step, CPU)) as stream:
            parts.extend(islice(stream, batches.num_micro_batches))
    positions = torch.cat([part.positions for part in parts])
    assert sorted(positions.tolist()) == list(range(GLOBAL_BATCH))
    rows = torch.argsort(positions)
    moments = torch.cat([part.moments for part in parts])[rows]
    return moments, torch.cat([part.condition for part in parts])[rows]


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize(("size", "micro"), [(1, 1), (2, 12), (3, 4), (8, 1)])
def test_the_global_batch_is_the_same_for_every_world_and_micro_batch_size(
    flipped_shards: str, size: int, micro: int, window: int | None
) -> None:
    fields = {"window": window, "random_flip": True}
    for step in (0, 50):
        whole = read_step(lambda _: make_batches(flipped_shards, **fields), 1, step)
        split = read_step(
            lambda rank: make_batches(flipped_shards, rank, size, micro, **fields), size, step
        )
        assert all(map(torch.equal, split, whole))


@pytest.mark.parametrize(("window", "null_context"), [(None, "empty_caption"), (2, "zeros")])
def test_a_batch_holds_what_the_order_names(
    flipped_shards: str,
    samples: list[LatentSample],
    window: int | None,
    null_context: NullContext,
) -> None:
    null = np.full((5, 12), float(null_context == "empty_caption"))
    order = order_of(flipped_shards, window=window, random_flip=True)
    batches = make_batches(
        flipped_shards, window=window, random_flip=True, null_context=null_context
    )
    positions = np.arange(GLOBAL_BATCH)
    kinds = set()
    first_step, samples_seen = 7, 1000  # the steps before had batches of another size
    with closing(batches.stream(first_step, samples_seen, CPU)) as stream:
        for step, batch in enumerate(islice(stream, 6), first_step):
            seen = samples_seen + GLOBAL_BATCH * (step - first_step)
            chosen = order.sample_indices(seen, positions).tolist()
            counts = np.array([len(samples[i].metadata.captions) for i in chosen])
            captions = order.caption_indices(step, positions, counts).tolist()
            flips = order.hflip(step, positions).tolist()  # type: ignore[union-attr]
            for row, (i, caption, flip) in enumerate(zip(chosen, captions, flips, strict=True)):
                moments = samples[i].flipped if flip else samples[i].moments
                context = samples[i].contexts[caption] if caption >= 0 else null
                np.testing.assert_array_equal(batch.moments[row], moments)
                np.testing.assert_array_equal(batch.condition[row], context)
                kinds.add((flip, caption))
    assert kinds == {(flip, caption) for flip in (True, False) for caption in (-1, 0, 1, 2)}


def test_batches_of_labelled_shards_hold_class_numbers_some_dropped(tmp_path: Path) -> None:
    samples = make_samples(10, labelled=True)
    write_shards(tmp_path, samples, (6, 4))
    order, positions = order_of(str(tmp_path)), np.arange(GLOBAL_BATCH)
    with closing(make_batches(str(tmp_path)).stream(0, 0, CPU)) as stream:
        batch = next(stream)
    dropped = order.caption_indices(0, positions, np.zeros(GLOBAL_BATCH, int)) < 0
    assert 0 < dropped.sum() < len(dropped)
    labels = [samples[n].label for n in order.sample_indices(0, positions)]
    assert batch.condition.tolist() == np.where(dropped, len(CLASSES), labels).tolist()


@pytest.mark.parametrize("window", [1, 2, 100])
def test_an_object_store_gives_the_batches_of_a_local_folder(
    flipped_shards: str, remote: str, tmp_path: Path, window: int
) -> None:
    cache = CacheConfig(folder=str(tmp_path), gigabytes=1.0)
    streams = [
        make_batches(flipped_shards, window=window).stream(0, 0, CPU),
        make_batches(remote, cache=cache, window=window).stream(0, 0, CPU),
    ]
    with closing(streams[0]), closing(streams[1]):
        for local_batch, remote_batch in islice(zip(*streams, strict=True), 6):
            assert torch.equal(local_batch.moments, remote_batch.moments)
            assert torch.equal(local_batch.condition, remote_batch.condition)


def test_shards_are_fetched_once_and_before_they_are_used() -> None:
    fetched: queue.Queue[int] = queue.Queue()
    reader = SimpleNamespace(is_remote=True, fetch=fetched.put)
    order = make_order(shard_sizes=np.full(4, 8), global_batch_size=8, window=1)
    with prefetch_shards(cast(ShardReader, reader), order) as move_to:
        for samples_seen, num_new in ((0, 2), (8, 1), (16, 1)):
            move_to(samples_seen)
            new = {fetched.get(timeout=60) for _ in range(num_new)}
            assert new <= set(order.upcoming_shards(samples_seen))
    assert fetched.empty()


@pytest.mark.parametrize(
    ("gigabytes", "window", "message"),
    [
        (1.0, None, "shards of an object store need shuffle_window"),
        (1e-4, 2, "1 shards may be open, by cache.gigabytes .* 4; raise these or lower"),
    ],
)
def test_a_remote_dataset_needs_a_window_that_fits_twice_into_the_cache(
    remote: str, tmp_path: Path, gigabytes: float, window: int | None, message: str
) -> None:
    cache = CacheConfig(folder=str(tmp_path), gigabytes=gigabytes)
    with pytest.raises(UserError, match=message):
        make_batches(remote, cache=cache, window=window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4, "micro": 5}, "global_batch_size 24 is not a multiple of micro_batch_size 5"),
        ({"random_flip": True}, "holds no flipped images; encode with flip: true"),
    ],
)
def test_a_recipe_that_does_not_fit_the_dataset_is_an_error(
    shards: str, fields: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_batches(shards, **fields)


@pytest.mark.parametrize(
    ("window", "limit", "most"), [(None, 62, 1), (2, 62, 1), (3, 87, 2), (3, 88, 0)]
)
def test_a_block_that_is_too_large_for_the_memory_is_an_error(
    flipped_shards: str, window: int | None, limit: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.training.data.MAX_INDEX_ROWS", limit)
    if not most:
        make_batches(flipped_shards, window=window)
        return
    with pytest.raises(UserError, match=rf"^shuffle_window: .* set it to at most {most} shards"):
        make_batches(flipped_shards, window=window)
    make_batches(flipped_shards, window=most)


def test_a_batch_keeps_its_content_while_others_are_read(shards: str) -> None:
    with closing(make_batches(shards).stream(0, 0, CPU)) as stream:
        kept = [(batch.moments, batch.condition[3:4]) for batch in islice(stream, 5)]
        copies = [(moments.clone(), view.clone()) for moments, view in kept]
        for _ in islice(stream, 20):
            pass
    for tensors, expected in zip(kept, copies, strict=True):
        assert all(map(torch.equal, tensors, expected))


def test_a_flipped_bit_in_a_shard_is_an_error_and_not_a_batch(tmp_path: Path) -> None:
    write_shards(tmp_path, make_samples(30), SHARDS)
    path = tmp_path / "shard-00003.tar"
    data = bytearray(path.read_bytes())
    data[data.index(make_samples(30)[25].moments.tobytes()) + 100] ^= 4
    path.write_bytes(data)
    with (
        closing(make_batches(str(tmp_path)).stream(0, 0, CPU)) as stream,
        pytest.raises(ShardError, match=r"shard-00003\.tar: 000000000025\.moments is damaged"),
    ):
        for _ in islice(stream, 5):
            pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_host(shards: str) -> None:
    streams = [
        make_batches(shards, micro=6).stream(0, 0, device)
        for device in (CPU, torch.device("cuda", 0))
    ]
    for host, device in islice(zip(*streams, strict=True), 40):
        assert device.moments.is_cuda
        assert torch.equal(device.moments.cpu(), host.moments)
        assert torch.equal(device.condition.cpu(), host.condition)
        assert torch.equal(device.positions.cpu(), host.positions)
