"""Random access to a dataset of shards: whole batches for training, single samples for the rest.

A read goes from `ShardReader.read_moments` to offsets of the index and to `read_checked`: for each
row one `preadv` into the memory of the batch and one XXH3 checksum.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from ifvit import storage
from ifvit.shards.cache import OpenFile, ShardFiles, open_files, read_null_context, require_text
from ifvit.shards.config import CacheConfig
from ifvit.shards.format import (
    ABSENT,
    MANIFEST,
    Array,
    SampleMetadata,
    ShardEntry,
    ShardError,
    ShardIndex,
    TextEncoding,
    checksum,
    parse_metadata,
    read_manifest,
)


class IndexTables:
    """The arrays of `ShardIndex`, joined over the N samples and T captions of a dataset.

    The rows of a shard stay zero until `fill`. The system allocates such memory only when it is
    written, so a dataset that is read in part costs what is used.
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
        """Enter the index of one shard; two threads that do it at once write the same values."""
        start, end = self.starts[shard : shard + 2]
        first, last = self._caption_starts[shard : shard + 2]
        for name in ("moments", "flipped", "metadata", "label"):
            getattr(self, name)[start:end] = getattr(index, name)
        self.context[first:last] = index.context
        self.first_caption[start : end + 1] = first + index.first_caption
        self._keys[shard] = index.keys
        self.filled[shard] = True  # last, because other threads read the rows from then on

    def shards_of(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) shard numbers."""
        shards: Array = np.searchsorted(self.starts, samples, side="right") - 1
        return shards

    def key(self, sample: int) -> str:
        """Key of the sample in its tar."""
        shard = int(self.shards_of(np.array(sample)))
        keys = self._keys[shard]
        assert keys is not None, shard
        return str(keys[sample - self.starts[shard]].decode())


def _bounds(counts: list[int]) -> Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class ShardReader:
    """Random access to a dataset by global sample number; a read touches only what it returns.

    Opening a local dataset checks the size of every tar and the hash of every index. Opening one
    in an object store checks the names; the rest is checked when a shard arrives in the cache.
    Each read checks the bytes that it returns. Raises ShardError, which names shard, key and
    remedy. Threads may share a reader.
    """

    def __init__(self, url: str, cache: CacheConfig | None = None) -> None:
        self.url = url
        self.manifest = read_manifest(url)
        self._cache = cache or CacheConfig()
        entries = self.manifest.shards
        self._tables = IndexTables(entries)
        if self._tables.starts[-1] != self.manifest.num_samples:
            raise ShardError(f"{url}/{MANIFEST}: num_samples is not the sum over its shards")
        self.dtype = np.dtype(self.manifest.dtype)
        self._files = open_files(url, self.manifest, self._cache)
        if not self.is_remote:
            for shard, entry in enumerate(entries):
                self._tables.fill(shard, self._files.read_index(entry))
        # A bound method would hold `self` in a cycle and keep files open until the cycle is found.
        open_shard = partial(_open_shard, self._files, self._tables, entries)
        self._open: Callable[[int], OpenFile] = lru_cache(self._files.max_open)(open_shard)
        self._null_context = read_null_context(url, self.manifest) if self.manifest.text else None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[str, CacheConfig]]:
        return ShardReader, (self.url, self._cache)  # a worker process opens the dataset again

    @property
    def shard_sizes(self) -> Array:
        """(S,) number of samples in each shard."""
        return np.diff(self._tables.starts)

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded before they are read."""
        return storage.is_remote(self.url)

    @property
    def max_open(self) -> int:
        """Largest number of shards that are open at a time."""
        return self._files.max_open

    @property
    def text(self) -> TextEncoding:
        """How the captions were embedded. Raises ShardError for a dataset with class labels."""
        return require_text(self.manifest, self.url)

    @property
    def null_context(self) -> Array:
        """(M, D) embedding of the empty caption."""
        assert self._null_context is not None, self.text
        return self._null_context

    def fetch(self, shard: int) -> None:
        """Download a shard into the cache, unless it is there, and open it."""
        self._open(shard)

    def caption_counts(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) number of captions of each."""
        samples, first = self._checked(samples), self._tables.first_caption
        counts: Array = first[samples + 1] - first[samples]
        return counts

    def read_moments(self, samples: Array, out: Array, hflip: Array | None = None) -> None:
        """Fill `out` (B, 2C, H, W) with the VAE posteriors: mean above logvar, unscaled.

        `hflip` (B,) is true where the moments of the horizontally flipped image are wanted.
        Raises ShardError for damaged bytes and for a dataset without flipped moments.
        """
        places = self._tables.moments[self._checked(samples)]
        if hflip is not None:
            if not self.manifest.flipped:
                raise ShardError(
                    f"{self.url}: holds no horizontally flipped images; encode with flip: true"
                )
            places[hflip] = self._tables.flipped[samples[hflip]]
        self._read("moments", samples, places, np.arange(len(out)), out)

    def read_contexts(self, samples: Array, captions: Array, out: Array) -> None:
        """Fill `out` (B, M, D) with the embedding of one caption of each sample.

        Caption number -1 gives the null context. Raises ShardError for damaged bytes.
        """
        out[captions < 0] = self.null_context
        rows = np.flatnonzero(captions >= 0)
        chosen = self._checked(samples[rows])
        places = self._tables.context[self._tables.first_caption[chosen] + captions[rows]]
        self._read("context", chosen, places, rows, out)

    def read_labels(self, samples: Array, dropped: Array, out: Array) -> None:
        """Fill `out` (B,) with class numbers, and with the number of classes where `dropped`."""
        labels = self._tables.label[self._checked(samples)]
        out[:] = np.where(dropped, len(self.manifest.classes), labels)

    def num_captions(self, sample: int) -> int:
        """Number of captions of the sample."""
        return int(self.caption_counts(np.array([sample]))[0])

    def moments(self, sample: int, *, hflip: bool = False) -> Array:
        """(2C, H, W) mean above logvar of the VAE posterior, unscaled; see `read_moments`."""
        out = np.empty((1, *self.manifest.moments_shape), self.dtype)
        self.read_moments(np.array([sample]), out, np.array([True]) if hflip else None)
        return out.squeeze(0)

    def context(self, sample: int, caption: int) -> Array:
        """(M, D) embedding of one caption. Raises IndexError when there is no such caption."""
        shape, count = self.text.context_shape, self.num_captions(sample)
        if not 0 <= caption < count:
            raise IndexError(f"sample {sample} has {count} captions, asked for number {caption}")
        out = np.empty((1, *shape), self.dtype)
        self.read_contexts(np.array([sample]), np.array([caption]), out)
        return out.squeeze(0)

    def label(self, sample: int) -> int:
        """Class number in `manifest.classes`. Raises ShardError for a dataset with captions."""
        label = int(self._tables.label[self._checked(np.array([sample]))].item())
        if label == ABSENT:
            raise ShardError(f"{self.url}: holds captions, not class labels")
        return label

    def metadata(self, sample: int) -> SampleMetadata:
        """Image id, captions and original size of the sample. Raises ShardError for damage."""
        samples = self._checked(np.array([sample]))
        place = self._tables.metadata[samples]
        out = np.empty((1, int(place[0, 1])), np.uint8)
        self._read("json", samples, place[:, [0, 2]], np.array([0]), out)
        entry = self.manifest.shards[int(self._tables.shards_of(samples)[0])]
        return parse_metadata(out.tobytes(), f"{entry.name} sample {sample}")

    def _checked(self, samples: Array) -> Array:
        """Return `samples` (B,) once their indexes are in the tables.

        Raises IndexError for a number outside the dataset.
        """
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"{self.url} has {len(self)} samples, asked for number {outside[0]}")
        shards = self._tables.shards_of(samples)
        for shard in np.unique(shards[~self._tables.filled[shards]]).tolist():
            self.fetch(shard)
        return samples

    def _read(self, field: str, samples: Array, places: Array, rows: Array, out: Array) -> None:
        """Read one array of each sample into `out[rows]`; `places` (B, 2) offset and checksum."""
        row_bytes = out[:1].nbytes
        memory = out.reshape(-1, copy=False).view(np.uint8).data
        shards = self._tables.shards_of(samples)
        columns = (samples.tolist(), shards.tolist(), rows.tolist(), places.tolist())
        for sample, shard, row, (offset, expected) in zip(*columns, strict=True):
            file = self._open(shard)
            target = memory[row * row_bytes : (row + 1) * row_bytes]
            if not read_checked(file.descriptor, offset, expected, target):
                member = f"{self._tables.key(sample)}.{field}"
                raise self._files.damaged(self.manifest.shards[shard], member)


def read_checked(descriptor: int, offset: int, expected: int, out: memoryview) -> bool:
    """Fill `out` with the file's bytes from `offset` => whether their checksum is `expected`.

    A second try follows a first failure: a signal may cut a read short on a network file system.
    """
    for _ in range(2):
        # No memory map: a process that reads a mapped file dies (SIGBUS) when it was truncated.
        if os.preadv(descriptor, [out], offset) == len(out) and checksum(out) == expected:
            return True
    return False


def _open_shard(
    files: ShardFiles, tables: IndexTables, entries: tuple[ShardEntry, ...], shard: int
) -> OpenFile:
    if not tables.filled[shard]:
        tables.fill(shard, files.read_index(entries[shard]))
    return files.open_tar(entries[shard])
