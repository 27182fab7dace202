"""The order of training: sample, caption, dropout and flip at each position of each global batch.

All of them are functions of (seed, step, position) alone. Shapes: B positions, S shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ifvit.arrays import Array
from ifvit.diffusion.config import RepresentationConfig
from ifvit.errors import UserError
from ifvit.records import shorten
from ifvit.rng import Stream, permutation, uniform_array
from ifvit.shards.reader import ShardReader
from ifvit.training.config import CaptionConfig


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
