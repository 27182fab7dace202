"""Random access to a dataset of shards: whole batches for training, single samples for the rest.

A read looks up offset and checksum of each sample in the index of its shard, reads the bytes by one
`preadv` into the memory of the batch, and compares their XXH3 checksum. Memory does not grow with
the dataset: the reader keeps the indexes of the shards that were used last, and of each shard its
entry in the manifest.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ifvit import connections
from ifvit.arrays import Array
from ifvit.records import shorten
from ifvit.shards import CacheConfig
from ifvit.shards.cache import ShardFiles, read_index, read_null_context
from ifvit.shards.format import (
    FeatureEncoding,
    SampleMetadata,
    ShardError,
    TextEncoding,
    parse_metadata,
    read_manifest,
)
from ifvit.shards.index import ABSENT, ShardIndex, checksum

MAX_INDEX_ROWS = 1 << 23
"""Samples and captions of all indexes that a reader keeps in memory, about 60 bytes each."""


class ShardReader:
    """Random access to a dataset by global sample number; a read touches only what it returns.

    Opening a dataset lists its files and checks their names and the sizes of the tars. The first
    read of a shard checks its index, and, in an object store, the tar as it arrives in the cache.
    Each read checks the bytes that it returns. Raises ShardError, which names shard, key and
    remedy. Threads may share a reader.
    """

    def __init__(self, url: str, cache: CacheConfig | None = None) -> None:
        self.url = url
        self.manifest = read_manifest(url)
        self.dtype = np.dtype(self.manifest.dtype)
        self.shard_sizes: Array = np.array([entry.num_samples for entry in self.manifest.shards])
        captions = np.array([entry.num_captions for entry in self.manifest.shards])
        self.index_rows: Array = self.shard_sizes + captions
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])
        self._cache = cache or CacheConfig()
        self._files = ShardFiles(url, self.manifest, self._cache)
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()  # the last one was used last
        self._num_rows = 0  # of the indexes above
        self._lock = threading.Lock()
        # Caching a method of `self` would make a reference cycle and keep the files open.
        self._open = lru_cache(self._files.max_open)(self._files.open_tar)
        self._null_context = read_null_context(url, self.manifest)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[str, CacheConfig]]:
        return ShardReader, (self.url, self._cache)  # a worker process opens the dataset again

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded before they are read."""
        return connections.is_remote(self.url)

    @property
    def max_open(self) -> int:
        """Largest number of shards that are open at a time."""
        return self._files.max_open

    @property
    def text(self) -> TextEncoding:
        """How the captions were embedded. Raises ShardError for a dataset without contexts."""
        if self.manifest.classes:
            raise ShardError(f"{self.url}: holds class labels, not captions; use another dataset")
        if self.manifest.text is None:
            raise ShardError(f"{self.url}: holds captions without contexts; set context: computed")
        return self.manifest.text

    @property
    def features(self) -> FeatureEncoding:
        """How the features of images were made. Raises ShardError for a dataset without them."""
        if self.manifest.features is None:
            raise ShardError(f"{self.url}: holds no features; encode with --image_encoder")
        return self.manifest.features

    @property
    def null_context(self) -> Array:
        """(M, D) context of the empty caption. Raises ShardError for a dataset without contexts."""
        assert self.text
        assert self._null_context is not None
        return self._null_context

    def fetch(self, shard: int) -> None:
        """Download a shard into the cache, unless it is there, and open it."""
        self._index(shard)
        self._open(self.manifest.shards[shard])

    def caption_counts(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) number of captions of each."""
        captions = [index.captions(row) for _, row, index in self._locate(samples)]
        return np.array([len(numbers) for numbers in captions], dtype=np.int64)

    def caption_sources(self, samples: Array) -> list[Array]:
        """Number of the source of each caption, an array for each of the samples."""
        return [index.source[index.captions(row)] for _, row, index in self._locate(samples)]

    def read_moments(self, samples: Array, out: Array, hflip: Array | None = None) -> None:
        """Fill `out` (B, 2C, H, W) with the unscaled mean and logvar of the VAE posteriors.

        `hflip` (B,) is true where the moments of the horizontally flipped image are wanted.
        Raises ShardError for damaged bytes and for a dataset without flipped moments.
        """
        self._read_images(samples, ("moments", "flipped"), out, hflip)

    def read_features(self, samples: Array, out: Array, hflip: Array | None = None) -> None:
        """Fill `out` (B, T, F) float16 with the features of the images' patches.

        `hflip` is that of `read_moments`. Raises ShardError as it does, and without features.
        """
        assert out.shape[1:] == self.features.shape
        self._read_images(samples, ("features", "flipped_features"), out, hflip)

    def _read_images(
        self, samples: Array, fields: tuple[str, str], out: Array, hflip: Array | None
    ) -> None:
        """Fill `out` (B, ...) with an array of each image, or, where `hflip`, of its flip."""
        if hflip is None:
            hflip = np.zeros(len(samples), dtype=np.bool_)
        elif not self.manifest.flipped:
            raise ShardError(f"{self.url}: holds no horizontally flipped images; use --flip")
        memory = _bytes_of(out)
        for n, (shard, row, index) in enumerate(self._locate(samples)):
            field = fields[bool(hflip[n])]
            self._read(shard, row, field, getattr(index, field)[row], memory[n])

    def context_lengths(self, samples: Array, captions: Array) -> Array:
        """(B,) numbers of tokens of one caption of each sample; number -1 is the null context."""
        lengths = np.full(len(samples), len(self.null_context), np.int64)
        rows = np.flatnonzero(captions >= 0)
        for n, (_, row, index) in zip(rows, self._locate(samples[rows]), strict=True):
            lengths[n] = index.context[index.captions(row)[captions[n]], 1]
        return lengths

    def read_contexts(self, samples: Array, captions: Array, out: Array) -> None:
        """Fill `out` (B, M, D) with the context of one caption of each sample, then zeros.

        Caption number -1 gives the null context. M is at least the largest of `context_lengths`.
        Raises ShardError for damaged bytes.
        """
        null, is_int8 = self.null_context, self.text.dtype == "int8"
        memory, bytes_per_token = _bytes_of(out), out[0, 0].nbytes
        for n, (shard, row, index) in enumerate(self._locate(samples)):
            if captions[n] < 0:
                length, out[n, : len(null)] = len(null), null
            else:
                caption = index.captions(row)[captions[n]]
                offset, length, expected = index.context[caption].tolist()
                place = offset, expected
                if is_int8:
                    scale = index.context_scale[caption]
                    self._read_int8(shard, row, place, scale, out[n, :length])
                else:
                    self._read(shard, row, "context", place, memory[n, : length * bytes_per_token])
            if length < out.shape[1]:
                out[n, length:] = 0

    def _read_int8(
        self, shard: int, row: int, place: tuple[int, int], scale: Array, out: Array
    ) -> None:
        """Fill `out` (M, D) with a context of 8 bits; `place` and `scale` are index entries."""
        values, factors = np.empty(out.shape, np.int8), np.empty((len(out), 1), np.float32)
        self._read(shard, row, "context", place, _bytes_of(values[None])[0])
        self._read(shard, row, "context_scale", scale, _bytes_of(factors[None])[0])
        # torch converts to float16 ten times faster than numpy.
        torch.from_numpy(out).copy_(torch.from_numpy(values) * torch.from_numpy(factors))

    def read_labels(self, samples: Array, dropped: Array, out: Array) -> None:
        """Fill `out` (B,) with class numbers, and with the number of classes where `dropped`."""
        labels = [index.label[row] for _, row, index in self._locate(samples)]
        out[:] = np.where(dropped, len(self.manifest.classes), labels)

    def num_captions(self, sample: int) -> int:
        """Number of captions of the sample."""
        return int(self.caption_counts(np.array([sample]))[0])

    def moments(self, sample: int, *, hflip: bool = False) -> Array:
        """(2C, H, W) unscaled mean and logvar of the VAE posterior; see `read_moments`."""
        out = np.empty((1, *self.manifest.moments_shape), self.dtype)
        self.read_moments(np.array([sample]), out, np.array([True]) if hflip else None)
        return out.squeeze(0)

    def context(self, sample: int, caption: int) -> Array:
        """(M, D) context of one caption. Raises IndexError when there is no such caption."""
        width, count = self.text.context_shape[1], self.num_captions(sample)
        if not 0 <= caption < count:
            raise IndexError(f"sample {sample} has {count} captions, asked for number {caption}")
        samples, captions = np.array([sample]), np.array([caption])
        length = self.context_lengths(samples, captions)[0]
        out = np.empty((1, length, width), self.dtype)
        self.read_contexts(samples, captions, out)
        return out.squeeze(0)

    def label(self, sample: int) -> int:
        """Class number in `manifest.classes`. Raises ShardError for a dataset with captions."""
        ((_, row, index),) = self._locate(np.array([sample]))
        label = int(index.label[row])
        if label == ABSENT:
            raise ShardError(f"{self.url}: holds captions, not class labels")
        return label

    def metadata(self, sample: int) -> SampleMetadata:
        """Image id, captions and original size of the sample. Raises ShardError for damage."""
        ((shard, row, index),) = self._locate(np.array([sample]))
        offset, length, expected = index.metadata[row]
        out = np.empty(length, np.uint8)
        self._read(shard, row, "json", (offset, expected), out)
        return parse_metadata(out.tobytes(), f"{self.manifest.shards[shard].name} sample {sample}")

    def _locate(self, samples: Array) -> Iterator[tuple[int, int, ShardIndex]]:
        """Yield shard number, row in the shard, and index of the shard for each sample.

        Raises IndexError for a number outside the dataset.
        """
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"{self.url} has {len(self)} samples, asked for number {outside[0]}")
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        rows = samples - self._starts[shards]
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            yield shard, row, self._index(shard)

    def _index(self, shard: int) -> ShardIndex:
        """Index of a shard, read at its first use and after it was evicted."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = read_index(self.url, self.manifest, self.manifest.shards[shard])
        with self._lock:
            if shard not in self._indexes:  # otherwise another thread has read it, too
                self._indexes[shard] = index
                self._num_rows += index.num_rows
            while self._num_rows > MAX_INDEX_ROWS and len(self._indexes) > 1:
                self._num_rows -= self._indexes.popitem(last=False)[1].num_rows
        return index

    def _read(
        self, shard: int, row: int, field: str, place: Sequence[int] | Array, out: Array
    ) -> None:
        """Read one array into `out`, contiguous bytes; `place` is its offset and checksum.

        A second try follows a first failure: a signal may cut a read short on a network file
        system.
        """
        offset, expected = int(place[0]), int(place[1])
        entry, memory = self.manifest.shards[shard], out.data
        file = self._open(entry)
        for _ in range(2):
            # No memory map: a process that reads a mapped file dies (SIGBUS) if it was truncated.
            num_bytes = os.preadv(file.descriptor, [memory], max(offset, 0))
            if num_bytes == len(memory) and checksum(memory) == expected:
                return
        key = shorten(self._index(shard).keys[row].decode(errors="replace"))
        raise self._files.damaged(entry, f"{key}.{field}")


def _bytes_of(out: Array) -> Array:
    """(B, ...) contiguous array => its memory as bytes (B, size). Raises ValueError for gaps."""
    return out.reshape(len(out), -1, copy=False).view(np.uint8)
