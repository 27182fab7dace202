"""Shards => batches: the order of samples, and micro-batches that threads read ahead.

Shapes: B samples of a micro-batch, S shards, C latent channels, H, W latent size, M context tokens,
D context width.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ifvit.arrays import Array
from ifvit.conditions import Condition, PaddedContext, padded_lengths, tokens_of
from ifvit.diffusion.config import RepresentationConfig
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.conditioning import DatasetConditions, empty
from ifvit.records import shorten
from ifvit.rng import Stream, permutation, uniform_array
from ifvit.shards.format import FEATURE_DTYPE
from ifvit.shards.reader import MAX_INDEX_ROWS, ShardReader
from ifvit.training.config import CaptionConfig


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


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionWeights:
    """Chances of the sources of captions, by the number of the source."""

    names: tuple[str, ...]
    weights: Array
    """(sources,) float64."""
    dropout: Array
    """(sources,) fraction of the captions of each source that is dropped."""

    def choose(self, chosen: Array, sources: Sequence[Array]) -> Array:
        """Uniform numbers (B,) and each image's sources of captions => (B,) caption numbers.

        Caption c of n_s captions of source s has the chance w_s / n_s, over the sum of the weights
        of the image's sources. Raises UserError for an image whose sources all have no weight.
        """
        captions = np.empty(len(chosen), np.int64)
        for n, numbers in enumerate(sources):
            counts = np.bincount(numbers, minlength=len(self.weights))
            chances = np.cumsum(self.weights[numbers] / counts[numbers])
            if not chances[-1]:
                names = ", ".join(self.names[number] for number in np.flatnonzero(counts))
                raise UserError(
                    f"captions: an image has captions of {names} only, which have no weight; give "
                    "one of these sources a weight, which may be small"
                )
            captions[n] = np.searchsorted(chances, chosen[n] * chances[-1], side="right")
        return captions


def weigh_captions(
    captions: Mapping[str, CaptionConfig], reader: ShardReader, caption_dropout: float
) -> CaptionWeights | None:
    """Look up the sources of a recipe in a dataset; None for a recipe without them.

    Raises UserError for a source that the dataset does not have.
    """
    names = reader.manifest.caption_sources
    for name in captions:
        if name not in names:
            known = f"it has {', '.join(names)}" if names else "remove captions"
            raise UserError(f"captions.{shorten(name)}: {reader.url} has no such source; {known}")
    if not captions:
        return None
    chosen = [captions.get(name, CaptionConfig(weight=0.0)) for name in names]
    dropouts = [caption_dropout if one.dropout is None else one.dropout for one in chosen]
    return CaptionWeights(
        names=names,
        weights=np.array([one.weight for one in chosen]),
        dropout=np.array(dropouts),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchOrder:
    """Sample, caption, dropout and flip at each position of each global batch.

    An epoch is divided into blocks. A block holds the samples of `shuffle_window` shards in random
    order, and the shards themselves come in random order. Without a window, the whole dataset is
    one block. Blocks are numbered consecutively through all epochs.
    """

    shard_sizes: Array
    """(S,) number of samples in each shard, as the manifest lists them."""
    global_batch_size: int
    seed: int
    caption_dropout: float
    caption_weights: CaptionWeights | None = None
    """None: all captions of an image are equally likely."""
    shuffle_window: int | None = None
    random_flip: bool = False
    representation: RepresentationConfig | None = None
    """Tells which steps need features of the images; None: no step does."""

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return int(self.shard_sizes.sum())

    @property
    def _window(self) -> int:
        return self.shuffle_window or len(self.shard_sizes)

    @property
    def _num_blocks(self) -> int:
        return -(-len(self.shard_sizes) // self._window)

    def sample_indices(self, samples_seen: int, positions: Array) -> Array:
        """(B,) positions => (B,) sample numbers in the dataset; epochs follow without a gap."""
        offsets = samples_seen + positions
        blocks = self._block_numbers(offsets)
        indices = np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            epoch, index = divmod(block, self._num_blocks)
            start = epoch * self.num_samples + _epoch(self, epoch).starts[index]
            chosen = blocks == block
            indices[chosen] = _block_samples(self, epoch, index)[offsets[chosen] - start]
        return indices

    def upcoming_shards(self, samples_seen: int) -> list[int]:
        """Shards of the next global batch and of the block that follows it, in order of use."""
        ends = np.array([samples_seen, samples_seen + self.global_batch_size - 1])
        first, last = self._block_numbers(ends).tolist()
        shards = []
        for block in range(first, last + 2):
            epoch, index = divmod(block, self._num_blocks)
            shards += _epoch(self, epoch).shards[index * self._window :][: self._window]
        return shards

    def caption_indices(
        self, step: int, positions: Array, num_captions: Array, sources: Sequence[Array] = ()
    ) -> Array:
        """(B,) caption numbers; -1 where dropped.

        All captions of an image are equally likely unless sources have weights; `sources` are then
        the source numbers of each image's captions.
        """
        chosen = uniform_array(self.seed, step, positions, Stream.CAPTION)
        dropout: Array | float = self.caption_dropout
        if self.caption_weights is None:
            captions: Array = (chosen * num_captions).astype(np.int64)
        else:
            captions = self.caption_weights.choose(chosen, sources)
            drawn = [numbers[c] for numbers, c in zip(sources, captions, strict=True)]
            dropout = self.caption_weights.dropout[drawn]
        captions[uniform_array(self.seed, step, positions, Stream.DROPOUT) < dropout] = -1
        return captions

    def hflip(self, step: int, positions: Array) -> Array | None:
        """(B,) bool, true where the flipped image is read: half of all visits. None: never."""
        if not self.random_flip:
            return None
        flips: Array = uniform_array(self.seed, step, positions, Stream.FLIP) < 0.5
        return flips

    def _block_numbers(self, offsets: Array) -> Array:
        """(B,) offsets in the endless sequence of samples => (B,) numbers of their blocks."""
        epochs, within = np.divmod(offsets, self.num_samples)
        numbers = epochs * self._num_blocks
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            starts = _epoch(self, epoch).starts
            numbers[chosen] += np.searchsorted(starts, within[chosen], side="right") - 1
        return numbers


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    shards: list[int]
    """Shard numbers in order of use."""
    starts: Array
    """(number of blocks + 1,) offset of each block within the epoch."""


@lru_cache(maxsize=3)
def _epoch(order: BatchOrder, epoch: int) -> _Epoch:
    num_shards, window = len(order.shard_sizes), order._window
    if order.shuffle_window is None:
        shards = np.arange(num_shards)
    else:
        shards = permutation(order.seed, epoch, num_shards, Stream.SHARD_ORDER).numpy()
    sizes = np.add.reduceat(order.shard_sizes[shards], np.arange(0, num_shards, window))
    return _Epoch(shards=shards.tolist(), starts=np.concatenate([[0], np.cumsum(sizes)]))


@lru_cache(maxsize=3)
def _block_samples(order: BatchOrder, epoch: int, index: int) -> Array:
    """Sample numbers of a block in order of use."""
    window, ends = order._window, np.cumsum(order.shard_sizes)
    shards = _epoch(order, epoch).shards[index * window :][:window]
    members = np.concatenate([np.arange(ends[s] - order.shard_sizes[s], ends[s]) for s in shards])
    start = int(_epoch(order, epoch).starts[index])
    samples: Array = members[permutation(order.seed, epoch, len(members), start=start).numpy()]
    return samples


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
