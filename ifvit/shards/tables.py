"""The indexes of all shards as one table, by global sample number; filled shard by shard."""

from collections.abc import Sequence

import numpy as np

from ifvit.shards.index import ShardIndex
from ifvit.shards.records import Array, ShardEntry


class IndexTables:
    """Arrays as in `ShardIndex`, over the N samples and T captions of a whole dataset.

    The manifest says where each shard's rows go. Rows of a shard that is not `filled` are memory
    that the system has not even handed out (zeros), so a lazily read dataset costs what it uses.
    """

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self.starts = _bounds([entry.num_samples for entry in entries])
        self._caption_starts = _bounds([entry.num_captions for entry in entries])
        num_samples, num_captions = int(self.starts[-1]), int(self._caption_starts[-1])
        self.filled = np.zeros(len(entries), dtype=np.bool_)
        self.moments = np.zeros((num_samples, 2), dtype=np.int64)
        self.flipped = np.zeros((num_samples, 2), dtype=np.int64)
        self.metadata = np.zeros((num_samples, 3), dtype=np.int64)
        self.label = np.zeros(num_samples, dtype=np.int64)
        self.context = np.zeros((num_captions, 2), dtype=np.int64)
        self.first_caption = np.zeros(num_samples + 1, dtype=np.int64)
        self._keys: list[Array | None] = [None] * len(entries)

    def fill(self, shard: int, index: ShardIndex) -> None:
        """Enter one shard's index; threads may do it twice, to the same effect."""
        start, end = self.starts[shard : shard + 2]
        first, last = self._caption_starts[shard : shard + 2]
        for name in ("moments", "flipped", "metadata", "label"):
            getattr(self, name)[start:end] = getattr(index, name)
        self.context[first:last] = index.context
        self.first_caption[start : end + 1] = first + index.first_caption
        self._keys[shard] = index.keys
        self.filled[shard] = True

    def shards_of(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) shard numbers."""
        shards: Array = np.searchsorted(self.starts, samples, side="right") - 1
        return shards

    def key(self, sample: int) -> str:
        """The sample's key in its tar."""
        shard = int(self.shards_of(np.array(sample)))
        keys = self._keys[shard]
        assert keys is not None, shard
        return str(keys[sample - self.starts[shard]].decode())


def _bounds(counts: list[int]) -> Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
