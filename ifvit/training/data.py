"""Shards => batches: the order of samples, and micro-batches read ahead by threads."""

import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.rng import Stream, permutation, uniform_array
from ifvit.shards import ShardReader
from ifvit.shards.format import Array
from ifvit.training.state import TrainState

CACHE_LINE = 64
"""Bytes; the kernel reads a fifth faster into memory that starts with one."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process.

    `moments` (B, 2C, H, W) in the shards' dtype, `condition` contexts (B, M, D) likewise or class
    numbers (B,) int64, `positions` (B,) int64 in the global batch.
    """

    moments: Tensor
    condition: Tensor
    positions: Tensor


class BatchMemory(Protocol):
    """Where reading threads assemble batches, and how these reach the device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """Host memory to fill."""

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """Start the batch on its way to the device; the result waits for it to arrive."""


class HostMemory:
    """Batches stay where they are assembled.

    Their memory is used again once nobody holds it: fresh pages from the system would cost more
    than all the reading.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, ...], list[Array]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """As `BatchMemory` says."""
        free = self._free[shape]
        try:
            owner = free.pop()
        except IndexError:
            owner = empty_aligned(shape, dtype)
        lent = owner.view()
        weakref.finalize(lent, free.append, owner)  # every tensor upon it keeps `lent` alive
        return torch.from_numpy(lent)

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """As `BatchMemory` says."""
        return lambda: batch


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that starts with a cache line, which NumPy's own do not."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


class CudaMemory:
    """Batches are assembled in pinned memory and copied on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """As `BatchMemory` says; torch's allocator keeps pinned memory and uses it again."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True)

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """As `BatchMemory` says."""
        with torch.cuda.stream(self._stream):
            copies = {name: self._copy(tensor) for name, tensor in vars(batch).items()}
            copied = self._stream.record_event()

        def receive() -> Batch:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(copied)
            for copy in copies.values():
                copy.record_stream(compute)  # its memory is not to be reused before that is done
            return Batch(**copies)

        return receive

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchOrder:
    """Sample, caption, dropout and flip at each position of each global batch.

    An epoch is a row of blocks. A block holds the samples of `shuffle_window` shards, in random
    order; the shards follow one another in random order. Without a window the whole set is one
    block. Blocks are numbered on through all epochs.
    """

    shard_sizes: Array
    """(S,) samples of each shard, as the manifest lists them."""
    global_batch_size: int
    seed: int
    caption_dropout: float
    shuffle_window: int | None = None
    random_flip: bool = False

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return int(self.shard_sizes.sum())

    @property
    def _window(self) -> int:
        return self.shuffle_window or len(self.shard_sizes)

    @property
    def _num_blocks(self) -> int:
        return -(-len(self.shard_sizes) // self._window)

    def sample_indices(self, samples_seen: int, positions: Array) -> Array:
        """(B,) positions => (B,) indices into the shards; epochs follow without a gap."""
        places = samples_seen + positions
        numbers = self._blocks_at(places)
        indices = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            block = _block(self, number)
            indices[chosen] = block.samples[places[chosen] - block.start]
        return indices

    def coming_shards(self, samples_seen: int) -> list[int]:
        """Shards of the next global batch's blocks and of the block after, in order of use."""
        ends = np.array([samples_seen, samples_seen + self.global_batch_size - 1])
        first, last = self._blocks_at(ends).tolist()
        return [shard for number in range(first, last + 2) for shard in self._shards_of(number)]

    def caption_indices(self, step: int, positions: Array, num_captions: Array) -> Array:
        """(B,) caption numbers, uniform over each image's captions; -1 where dropped."""
        chosen = uniform_array(self.seed, step, positions, Stream.CAPTION)
        captions: Array = (chosen * num_captions).astype(np.int64)
        dropped = uniform_array(self.seed, step, positions, Stream.DROPOUT) < self.caption_dropout
        captions[dropped] = -1
        return captions

    def mirrored(self, step: int, positions: Array) -> Array | None:
        """(B,) whether the mirrored image is read, for half of all visits; None: never."""
        if not self.random_flip:
            return None
        flips: Array = uniform_array(self.seed, step, positions, Stream.FLIP) < 0.5
        return flips

    def _blocks_at(self, places: Array) -> Array:
        """(B,) places in the endless row of samples => (B,) numbers of their blocks."""
        epochs, offsets = np.divmod(places, self.num_samples)
        numbers = epochs * self._num_blocks
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            starts = _epoch(self, epoch).starts
            numbers[chosen] += np.searchsorted(starts, offsets[chosen], side="right") - 1
        return numbers

    def _shards_of(self, number: int) -> list[int]:
        epoch, index = divmod(number, self._num_blocks)
        shards: list[int] = _epoch(self, epoch).shards[index * self._window :][: self._window]
        return shards


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    shards: list[int]
    """In order of use."""
    starts: Array
    """(blocks + 1,) where each block starts within the epoch."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    start: int
    """Its first place in the endless row of samples."""
    samples: Array
    """(n,) in order of use."""


@lru_cache(maxsize=3)
def _epoch(order: BatchOrder, epoch: int) -> _Epoch:
    count, window = len(order.shard_sizes), order._window
    if order.shuffle_window is None:
        shards = np.arange(count)
    else:
        shards = permutation(order.seed, epoch, count, Stream.SHARD_ORDER).numpy()
    sizes = np.add.reduceat(order.shard_sizes[shards], np.arange(0, count, window))
    return _Epoch(shards=shards.tolist(), starts=np.concatenate([[0], np.cumsum(sizes)]))


@lru_cache(maxsize=3)
def _block(order: BatchOrder, number: int) -> _Block:
    epoch, index = divmod(number, order._num_blocks)
    ends = np.cumsum(order.shard_sizes)
    members = np.concatenate(
        [np.arange(ends[s] - order.shard_sizes[s], ends[s]) for s in order._shards_of(number)]
    )
    start = int(_epoch(order, epoch).starts[index])
    shuffled = permutation(order.seed, epoch, len(members), start=start).numpy()
    return _Block(start=epoch * order.num_samples + start, samples=members[shuffled])


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
