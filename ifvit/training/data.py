"""Shards => batches: the micro-batches of one process, which threads read ahead.

Shapes: B samples of a micro-batch, C latent channels, H, W latent size, M context tokens.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ifvit.conditions import Condition, PaddedContext, padded_lengths, tokens_of
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.conditioning import DatasetConditions, empty
from ifvit.shards.format import FEATURE_DTYPE
from ifvit.shards.reader import MAX_INDEX_ROWS, ShardReader
from ifvit.training.order import BatchOrder


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process.

    `moments` (B, 2C, H, W) in the dtype of the shards; `condition` is contexts of at most M tokens
    in that dtype or class numbers (B,) int64; `positions` (B,) int64 in the global batch;
    `features` (B, G * G, F) float16 of the images' patches, if the step needs them.
    """

    moments: Tensor
    condition: Condition
    positions: Tensor
    features: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: also the lengths of contexts, but no features that were not read."""
        tensors = vars(self) | {
            "condition": tokens_of(self.condition),
            _LENGTHS: padded_lengths(self.condition),
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The batch of these tensors by name, as `tensors` gives them."""
        fields: dict[str, Any] = dict(tensors)
        if (lengths := fields.pop(_LENGTHS, None)) is not None:
            fields["condition"] = PaddedContext(tokens=fields["condition"], lengths=lengths)
        return cls(**fields)


_LENGTHS = "context_lengths"
BATCH_TENSORS = (*Batch.__dataclass_fields__, _LENGTHS)
"""Names of the tensors that a batch may have."""


class Batches:
    """The micro-batches of one process, read ahead by threads.

    Raises UserError when the global batch cannot be divided among the processes, or when the
    dataset does not fit the order.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: BatchOrder,
        micro_batch_size: int,
        world: World,
        num_threads: int,
        conditions: DatasetConditions | None = None,
    ) -> None:
        per_pass = micro_batch_size * world.size
        if order.global_batch_size % per_pass:
            raise UserError(
                f"global_batch_size {order.global_batch_size} is not a multiple of micro_batch_size"
                f" {micro_batch_size} x {world.size} processes; change one of them"
            )
        _check_dataset(reader, order)
        self._reader, self._order, self._num_threads = reader, order, num_threads
        self._micro_batch_size, self._world = micro_batch_size, world
        self._conditions = conditions or DatasetConditions(reader)
        self._ordering = threading.Lock()
        self.global_batch_size = order.global_batch_size
        self.num_micro_batches = order.global_batch_size // per_pass

    def stream(self, step: int, samples_seen: int, device: torch.device) -> Generator[Batch]:
        """Yield micro-batches on `device` without end, `num_micro_batches` for each step.

        The first one belongs to `step`, whose global batch begins at sample `samples_seen`.

        For a GPU, the reading threads also copy each batch, on CUDA streams of their own.
        """
        read: Callable[..., Batch] = self._read
        if device.type == "cuda":
            read = _GpuReader(self._read, device, torch.cuda.current_stream(device)).read
        pending: deque[tuple[int, Future[Batch]]] = deque()
        with (
            ThreadPoolExecutor(self._num_threads) as pool,
            prefetch_shards(self._reader, self._order) as move_to,
        ):
            move_to(samples_seen)
            for micro_batch in count():
                ahead, micro_step = divmod(micro_batch, self.num_micro_batches)
                seen = samples_seen + ahead * self.global_batch_size
                batch = pool.submit(read, step + ahead, seen, micro_step)
                pending.append((seen, batch))
                if len(pending) > 2 * self._num_threads:
                    seen, batch = pending.popleft()
                    move_to(seen)
                    yield batch.result()

    def image_ids(self, samples_seen: int, positions: Tensor) -> list[int | str]:
        """Image ids at these positions of the global batch that starts at `samples_seen`."""
        samples = self._order.sample_indices(samples_seen, positions.numpy()).tolist()
        return [self._reader.metadata(sample).image_id for sample in samples]

    def _read(
        self, step: int, samples_seen: int, micro_step: int, *, pinned: bool = False
    ) -> Batch:
        reader, order, size = self._reader, self._order, self._micro_batch_size
        first = (micro_step * self._world.size + self._world.rank) * size
        positions = np.arange(first, first + size)
        with self._ordering:  # otherwise each thread would order the samples of a new block
            samples = order.sample_indices(samples_seen, positions)
        sources = reader.caption_sources(samples) if order.caption_weights else ()
        counts = reader.caption_counts(samples)
        captions = order.caption_indices(step, positions, counts, sources)
        moments = empty((size, *reader.manifest.moments_shape), reader.dtype, pinned=pinned)
        hflip = order.hflip(step, positions)
        reader.read_moments(samples, moments.numpy(), hflip)
        condition = self._conditions.read(samples, captions, pinned=pinned)
        features = None
        if order.representation and order.representation.is_on(step):
            shape, dtype = (size, *reader.features.shape), np.dtype(FEATURE_DTYPE)
            features = empty(shape, dtype, pinned=pinned)
            reader.read_features(samples, features.numpy(), hflip)
        return Batch(
            moments=moments,
            condition=condition,
            positions=torch.from_numpy(positions),
            features=features,
        )


class _GpuReader(threading.local):
    """Reads batches and copies them to a GPU, beside the computation.

    Each reading thread has a CUDA stream, which a text encoder uses, too; one thread that encodes
    does not delay the copies of the others.
    """

    def __init__(
        self, read: Callable[..., Batch], device: torch.device, compute: torch.cuda.Stream
    ) -> None:
        self._read, self._device, self._compute = read, device, compute
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def read(self, *place: int) -> Batch:
        """Read a batch and copy it from pinned memory; only the calling thread waits for this."""
        with torch.cuda.stream(self._stream):
            batch = self._read(*place, pinned=True)
            tensors = {
                name: tensor.to(self._device, non_blocking=True)
                for name, tensor in batch.tensors.items()
            }
        self._stream.synchronize()
        for tensor in tensors.values():
            tensor.record_stream(self._compute)  # its memory is reused only after the computation
        return Batch.of(tensors)


@contextmanager
def prefetch_shards(reader: ShardReader, order: BatchOrder) -> Iterator[Callable[[int], None]]:
    """Fetch remote shards in order of use: those of the current blocks and of the next one.

    Yields a function that takes the samples seen before the current global batch.
    """
    requested: set[int] = set()

    def move_to(samples_seen: int) -> None:
        nonlocal requested
        upcoming = order.upcoming_shards(samples_seen) if reader.is_remote else []
        for shard in upcoming:
            if shard not in requested:
                pool.submit(reader.fetch, shard)  # an error is raised where the shard is first read
        requested = set(upcoming)

    pool = ThreadPoolExecutor(4)
    try:
        yield move_to
    finally:
        pool.shutdown(cancel_futures=True)


def _check_dataset(reader: ShardReader, order: BatchOrder) -> None:
    if not len(reader):
        raise UserError(f"{reader.url}: holds no samples; encode again")
    if order.random_flip and not reader.manifest.flipped:
        raise UserError(
            f"random_flip: {reader.url} holds no flipped images; encode with flip: true, "
            "or set random_flip: false"
        )
    _check_block(reader, order)
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
            f"{reader.url}: {reader.max_open} shards may be open, by cache.gigabytes and a quarter "
            f"of ulimit -n, but two windows take {num_shards}; raise these or lower shuffle_window"
        )


def _check_block(reader: ShardReader, order: BatchOrder) -> None:
    """Raise UserError if the indexes of one block may exceed the memory that the reader keeps."""
    rows = np.cumsum(np.sort(reader.index_rows)[::-1])  # the largest shards may come together
    num_shards = min(order.shuffle_window or len(rows), len(rows))
    if num_shards > 1 and rows[num_shards - 1] > MAX_INDEX_ROWS:
        most = max(1, int(np.searchsorted(rows, MAX_INDEX_ROWS, side="right")))
        raise UserError(
            f"shuffle_window: {reader.url} would shuffle {rows[num_shards - 1]:,} images and "
            f"captions together, and memory holds {MAX_INDEX_ROWS:,}; set it to at most {most} "
            "shards"
        )
