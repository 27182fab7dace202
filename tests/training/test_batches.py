"""Batches hold what the order says, whoever reads them; damage stops before it is trained on."""

import functools
import os
import queue
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
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
from ifvit.shards import CacheConfig, LatentSample, ShardError, ShardReader
from ifvit.training.data import Batch, Batches, BatchOrder, HostMemory, _FetchAhead
from ifvit.training.state import TrainState

CPU = torch.device("cpu")
GLOBAL_BATCH = 24
SIZES = (12, 1, 9, 8)


@pytest.fixture(scope="module")
def samples() -> list[LatentSample]:
    return make_samples(sum(SIZES), flipped=True)


@pytest.fixture(scope="module")
def mirrored_shards(tmp_path_factory: pytest.TempPathFactory, samples: list[LatentSample]) -> str:
    """Four shards that also hold the mirrored images."""
    folder = tmp_path_factory.mktemp("mirrored")
    write_shards(folder, samples, SIZES)
    return str(folder)


open_reader = functools.cache(ShardReader)


@pytest.fixture
def remote(mirrored_shards: str) -> Iterator[str]:
    """The same dataset in an object store that lives in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    for path in Path(mirrored_shards).iterdir():
        storage.upload(path, f"{url}/{path.name}")
    yield url
    storage.remove(url)


def make_batches(
    url: str,
    rank: int = 0,
    size: int = 1,
    micro: int = GLOBAL_BATCH,
    cache: CacheConfig | None = None,
    **fields: object,
) -> Batches:
    reader = open_reader(url, cache)
    values: dict[str, object] = {
        "shard_sizes": reader.shard_sizes,
        "global_batch_size": GLOBAL_BATCH,
        "seed": 3,
        "caption_dropout": 0.3,
        **fields,
    }
    world = World(rank=rank, size=size, local_rank=rank)
    order = BatchOrder(**values)  # type: ignore[arg-type]
    return Batches(reader, order, micro, world, 2)


def read_step(
    batches_of: Callable[[int], Batches], size: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and context of one global batch, put together from all processes."""
    parts: list[Batch] = []
    for rank in range(size):
        batches = batches_of(rank)
        state = TrainState(step=step, samples_seen=GLOBAL_BATCH * step)
        with closing(batches.from_state(state, CPU)) as stream:
            parts.extend(islice(stream, batches.num_micro_batches))
    positions = torch.cat([part.positions for part in parts])
    assert sorted(positions.tolist()) == list(range(GLOBAL_BATCH))
    places = torch.argsort(positions)
    moments = torch.cat([part.moments for part in parts])[places]
    return moments, torch.cat([part.condition for part in parts])[places]


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize(
    ("size", "micro"), [(1, 1), (1, 8), (2, 12), (3, 4), (4, 6), (4, 2), (8, 3), (8, 1)]
)
def test_global_batch_is_the_same_for_every_world_and_micro_batch(
    mirrored_shards: str, size: int, micro: int, window: int | None
) -> None:
    fields = {"shuffle_window": window, "random_flip": True}
    for step in (0, 50):
        whole = read_step(lambda _: make_batches(mirrored_shards, **fields), 1, step)
        split = read_step(
            lambda rank: make_batches(mirrored_shards, rank, size, micro, **fields), size, step
        )
        assert torch.equal(split[0], whole[0])
        assert torch.equal(split[1], whole[1])


@pytest.mark.parametrize("window", [None, 2])
def test_a_batch_holds_what_the_order_names(
    mirrored_shards: str, samples: list[LatentSample], window: int | None
) -> None:
    batches = make_batches(mirrored_shards, shuffle_window=window, random_flip=True)
    order, positions = batches._order, np.arange(GLOBAL_BATCH)
    kinds = set()
    # A run may have begun from another whose batches were of another size.
    state = TrainState(step=7, samples_seen=1000)
    with closing(batches.from_state(state, CPU)) as stream:
        for step, batch in enumerate(islice(stream, 6), state.step):
            seen = state.samples_seen + GLOBAL_BATCH * (step - state.step)
            chosen = order.sample_indices(seen, positions).tolist()
            counts = np.array([len(samples[i].metadata.captions) for i in chosen])
            captions = order.caption_indices(step, positions, counts).tolist()
            flips = order.mirrored(step, positions).tolist()  # type: ignore[union-attr]
            for row, (i, caption, flip) in enumerate(zip(chosen, captions, flips, strict=True)):
                moments = samples[i].flipped if flip else samples[i].moments
                context = samples[i].context[caption] if caption >= 0 else np.ones((5, 12))  # type: ignore[index]
                np.testing.assert_array_equal(batch.moments[row], moments)
                np.testing.assert_array_equal(batch.condition[row], context)
                kinds.add((flip, caption))
    assert kinds == {(flip, caption) for flip in (True, False) for caption in (-1, 0, 1, 2)}


@pytest.mark.parametrize("window", [1, 2, 100])
def test_an_object_store_gives_the_batches_of_a_local_folder(
    mirrored_shards: str, remote: str, tmp_path: Path, window: int
) -> None:
    cache = CacheConfig(folder=str(tmp_path), gigabytes=1.0)
    streams = [
        make_batches(mirrored_shards, shuffle_window=window).from_state(TrainState(), CPU),
        make_batches(remote, cache=cache, shuffle_window=window).from_state(TrainState(), CPU),
    ]
    with closing(streams[0]), closing(streams[1]):
        for local_batch, remote_batch in islice(zip(*streams, strict=True), 6):
            assert torch.equal(local_batch.moments, remote_batch.moments)
            assert torch.equal(local_batch.condition, remote_batch.condition)


def test_shards_are_fetched_once_and_before_they_are_used() -> None:
    fetched: queue.Queue[int] = queue.Queue()
    reader = SimpleNamespace(is_remote=True, fetch=fetched.put)
    order = BatchOrder(
        shard_sizes=np.full(4, 8),
        global_batch_size=8,
        seed=3,
        caption_dropout=0.0,
        shuffle_window=1,
    )
    with _FetchAhead(cast(ShardReader, reader), order) as ahead:
        for samples_seen, num_new in ((0, 2), (8, 1), (16, 1)):
            ahead.move_to(samples_seen)
            new = {fetched.get(timeout=60) for _ in range(num_new)}
            assert new <= set(order.coming_shards(samples_seen))
    assert fetched.empty()


@pytest.mark.parametrize(
    ("gigabytes", "window", "message"),
    [
        (1.0, None, "shards of an object store need shuffle_window"),
        (1e-4, 2, "cache.gigabytes has room for 1 shards, two windows are 4; raise it or lower"),
    ],
)
def test_a_remote_dataset_needs_a_window_that_fits_twice_into_the_cache(
    remote: str, tmp_path: Path, gigabytes: float, window: int | None, message: str
) -> None:
    cache = CacheConfig(folder=str(tmp_path), gigabytes=gigabytes)
    with pytest.raises(UserError, match=message):
        make_batches(remote, cache=cache, shuffle_window=window)


def test_a_batch_keeps_its_content_while_others_are_read(shards: str) -> None:
    with closing(make_batches(shards).from_state(TrainState(), CPU)) as stream:
        kept = list(islice(stream, 5))
        copies = [batch.moments.clone() for batch in kept]
        views = [batch.condition[3:4] for batch in kept]
        contexts = [view.clone() for view in views]
        moments = [batch.moments for batch in kept]
        del kept
        for _ in islice(stream, 20):
            pass
    assert all(map(torch.equal, moments, copies))
    assert all(map(torch.equal, views, contexts))


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = HostMemory()
    dtype = np.dtype(np.float16)
    first, second = memory.empty((2, 3), dtype), memory.empty((2, 3), dtype)
    place = first.data_ptr()
    assert second.data_ptr() != place
    view = first[1]
    del first
    assert memory.empty((2, 3), dtype).data_ptr() != place
    del view
    assert memory.empty((2, 3), dtype).data_ptr() == place


def test_a_shard_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, make_samples(30), SIZES)
    with closing(make_batches(str(tmp_path)).from_state(TrainState(), CPU)) as stream:
        next(stream)
        os.truncate(tmp_path / "shard-00002.tar", 10_000)
        with pytest.raises(ShardError, match=r"shard-00002\.tar: 0+\d+\.\w+ is damaged"):
            for _ in islice(stream, 20):
                pass


def test_damage_is_an_error_and_not_a_batch(tmp_path: Path) -> None:
    write_shards(tmp_path, make_samples(30), SIZES)
    path = tmp_path / "shard-00003.tar"
    data = bytearray(path.read_bytes())
    start = data.index(make_samples(30)[25].moments.tobytes())
    data[start + 100] ^= 4
    path.write_bytes(data)
    with (
        closing(make_batches(str(tmp_path)).from_state(TrainState(), CPU)) as stream,
        pytest.raises(ShardError, match=r"shard-00003\.tar: 000000000025\.moments is damaged"),
    ):
        for _ in islice(stream, 5):
            pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4, "micro": 5}, "global_batch_size 24 is not a multiple of micro_batch_size 5"),
        ({"random_flip": True}, "holds no mirrored images; encode with flip: true"),
    ],
)
def test_what_does_not_fit_is_refused(shards: str, fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_batches(shards, **fields)


def test_batches_of_labelled_shards_hold_class_numbers_some_dropped(tmp_path: Path) -> None:
    samples = make_samples(10, labelled=True)
    write_shards(tmp_path, samples, (6, 4))
    batches = make_batches(str(tmp_path))
    order = batches._order
    with closing(batches.from_state(TrainState(), CPU)) as stream:
        batch = next(stream)
    positions = batch.positions.numpy()
    numbers = order.sample_indices(0, positions)
    dropped = order.caption_indices(0, positions, np.zeros(len(positions), int)) < 0
    assert 0 < dropped.sum() < len(dropped)
    wanted = [
        len(CLASSES) if d else samples[n].label for n, d in zip(numbers, dropped, strict=True)
    ]
    assert batch.condition.tolist() == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_host(shards: str) -> None:
    streams = [
        make_batches(shards, micro=6).from_state(TrainState(), device)
        for device in (CPU, torch.device("cuda", 0))
    ]
    for host, device in islice(zip(*streams, strict=True), 40):
        assert device.moments.is_cuda
        assert torch.equal(device.moments.cpu(), host.moments)
        assert torch.equal(device.condition.cpu(), host.condition)
        assert torch.equal(device.positions.cpu(), host.positions)
