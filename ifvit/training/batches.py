"""Shards => batches: each process's share of every global batch, assembled ahead by threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.shards import ShardReader
from ifvit.training.batch import Batch, BatchMemory, CudaMemory, HostMemory
from ifvit.training.order import BatchOrder
from ifvit.training.state import TrainState

FETCHERS = 4
"""Shards that a process downloads at a time."""


class Batches:
    """Reads one process's micro-batches, some of them ahead, and fetches their shards before.

    Raises UserError when the global batch cannot be split or the dataset does not fit the order.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: BatchOrder,
        micro_batch_size: int,
        world: World,
        threads: int,
    ) -> None:
        per_pass = micro_batch_size * world.size
        if order.global_batch_size % per_pass:
            raise UserError(
                f"global_batch_size {order.global_batch_size} is not a multiple of micro_batch_size"
                f" {micro_batch_size} x {world.size} processes"
            )
        _check_fit(reader, order)
        self._reader, self._order, self._threads = reader, order, threads
        self._micro, self._world = micro_batch_size, world
        self.num_micro_batches = order.global_batch_size // per_pass

    def from_state(self, state: TrainState, device: torch.device) -> Generator[Batch]:
        """Endless micro-batches on `device`, `num_micro_batches` for every step from the state on.

        To a GPU they are copied while those before them are trained on.
        """
        memory = CudaMemory(device) if device.type == "cuda" else HostMemory()
        pending: deque[tuple[int, Future[Callable[[], Batch]]]] = deque()
        with (
            ThreadPoolExecutor(self._threads) as pool,
            _FetchAhead(self._reader, self._order) as ahead,
        ):
            ahead.move_to(state.samples_seen)
            for step, samples_seen, first in self._shares(state):
                read = pool.submit(self._read, memory, step, samples_seen, first)
                pending.append((samples_seen, read))
                if len(pending) > 2 * self._threads:
                    oldest, read = pending.popleft()
                    ahead.move_to(oldest)
                    yield read.result()()

    def image_ids(self, state: TrainState, positions: Tensor) -> list[int | str]:
        """Which images stand at `positions` of the global batch that follows `state`."""
        samples = self._order.sample_indices(state.samples_seen, positions.numpy()).tolist()
        return [self._reader.metadata(sample).image_id for sample in samples]

    def _shares(self, state: TrainState) -> Iterator[tuple[int, int, int]]:
        """Step, samples seen before it, and first position of each of our micro-batches."""
        for step in count(state.step):
            samples_seen = state.samples_seen + (step - state.step) * self._order.global_batch_size
            for micro_step in range(self.num_micro_batches):
                share = micro_step * self._world.size + self._world.rank
                yield step, samples_seen, share * self._micro

    def _read(
        self, memory: BatchMemory, step: int, samples_seen: int, first: int
    ) -> Callable[[], Batch]:
        reader, order = self._reader, self._order
        positions = np.arange(first, first + self._micro)
        samples = order.sample_indices(samples_seen, positions)
        captions = order.caption_indices(step, positions, reader.caption_counts(samples))
        moments = memory.empty((self._micro, *reader.manifest.moments_shape), reader.dtype)
        reader.read_moments(samples, moments.numpy(), order.mirrored(step, positions))
        if reader.manifest.classes:
            condition = memory.empty((self._micro,), np.dtype(np.int64))
            reader.read_labels(samples, captions < 0, condition.numpy())
        else:
            condition = memory.empty((self._micro, *reader.text.context_shape), reader.dtype)
            reader.read_contexts(samples, captions, condition.numpy())
        return memory.send(
            Batch(moments=moments, condition=condition, positions=torch.from_numpy(positions))
        )


class _FetchAhead:
    """Threads that fetch the shards of the blocks in use and of the next, in order of use."""

    def __init__(self, reader: ShardReader, order: BatchOrder) -> None:
        self._reader, self._order = reader, order
        self._pool = ThreadPoolExecutor(FETCHERS)
        self._asked: set[int] = set()

    def __enter__(self) -> "_FetchAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def move_to(self, samples_seen: int) -> None:
        """Training has come to this global batch; what lies before it is needed no more."""
        if not self._reader.is_remote:
            return
        coming = self._order.coming_shards(samples_seen)
        for shard in coming:
            if shard not in self._asked:
                self._pool.submit(self._reader.fetch, shard)  # who needs it meets its error
        self._asked = set(coming)


def _check_fit(reader: ShardReader, order: BatchOrder) -> None:
    if not len(reader):
        raise UserError(f"{reader.url}: holds no samples; encode again")
    if order.random_flip and not reader.manifest.flipped:
        raise UserError(
            f"random_flip: {reader.url} holds no mirrored images; encode with flip: true, "
            "or leave random_flip out"
        )
    if not reader.is_remote:
        return
    if order.shuffle_window is None:
        raise UserError(
            f"{reader.url}: shards of an object store need shuffle_window, the number of shards "
            "that are shuffled together, for example 16"
        )
    num_shards = min(2 * order.shuffle_window, len(order.shard_sizes))
    if num_shards > reader.max_open:
        raise UserError(
            f"{reader.url}: cache.gigabytes has room for {reader.max_open} shards, two windows are "
            f"{num_shards}; raise it or lower shuffle_window"
        )
