"""Which sample stands where: an order that depends on seed, epoch and the manifest alone.

The order of samples is a function of (seed, epoch); caption, dropout and mirroring are functions of
(seed, step, position in the global batch). None knows the number of processes, the size of a
micro-batch or the number of reading threads, so `samples_seen` is the loader's whole state, and
going on at step k reads nothing of the steps before it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ifvit.randomness import Stream, draw, permutation
from ifvit.shards.records import Array


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
        chosen = draw(self.seed, step, positions, Stream.CAPTION)
        captions: Array = (chosen * num_captions).astype(np.int64)
        dropped = draw(self.seed, step, positions, Stream.DROPOUT) < self.caption_dropout
        captions[dropped] = -1
        return captions

    def mirrored(self, step: int, positions: Array) -> Array | None:
        """(B,) whether the mirrored image is read, for half of all visits; None: never."""
        if not self.random_flip:
            return None
        flips: Array = draw(self.seed, step, positions, Stream.FLIP) < 0.5
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
