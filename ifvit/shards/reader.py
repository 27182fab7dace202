"""Random access to a dataset of shards, one sample at a time or a batch in one go."""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial

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
    parse_metadata,
    read_manifest,
)

_Loop = Callable[[Array, Array, Array, Array, Array], int]


def read_rows(
    descriptors: list[int], offsets: Array, checksums: Array, rows: Array, out: Array
) -> int | None:
    """Fill `out[rows]` of a contiguous `out`; the B-th of them from the B-th file and offset.

    `descriptors`, `offsets`, `checksums`, `rows`: (B,) int64, checksums as the index has them.
    => the first number in B whose bytes are not as its checksum says, None: all are.
    """
    as_bytes = out.reshape(len(out), -1, copy=False).view(np.uint8)
    # The index holds XXH3's canonical bytes, the highest first, read as if the lowest were.
    expected = checksums.byteswap()
    done = _compiled()(np.array(descriptors), offsets, expected, rows, as_bytes)
    return done if done < len(rows) else None


@cache
def _compiled() -> _Loop:
    """Half a second, once a process that reads."""
    from numba import njit, types

    ints, matrix = types.int64[:], types.uint8[:, ::1]
    compiled: _Loop = njit(types.int64(ints, ints, ints, ints, matrix), nogil=True)(_read_rows)
    return compiled


def _read_rows(
    descriptors: Array, offsets: Array, checksums: Array, rows: Array, out: Array
) -> int:
    size = out.shape[1]
    for number in range(len(rows)):
        address = out[rows[number]].ctypes.data
        for attempt in range(2):  # a signal may cut a read short on file systems of the network
            # Not by memory map: reading a file that was cut short would kill the process (SIGBUS).
            found = _pread(descriptors[number], address, size, offsets[number])
            if found == size and _xxh3(address, size) == checksums[number]:
                break
            if attempt:
                return number
    return len(rows)


# Compiled code may call C functions, and of Python's xxhash only those in its library. The one
# that chooses the processor's widest instructions exists on x86 alone.
_library = importlib.util.find_spec("xxhash._xxhash")
assert _library is not None
_hashes = ctypes.CDLL(_library.origin)
_xxh3 = getattr(_hashes, "XXH3_64bits_dispatch", _hashes.XXH3_64bits)
_xxh3.argtypes, _xxh3.restype = (ctypes.c_size_t, ctypes.c_size_t), ctypes.c_int64
_pread = ctypes.CDLL(None).pread
_pread.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64)
_pread.restype = ctypes.c_ssize_t


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


ROWS_AT_ONCE = 64
"""Rows that a call reads where not all files may be open: it holds on to those it reads."""


class ShardReader:
    """Random access to a dataset by global sample number; a read touches only what it returns.

    Opening a local folder checks every file's presence and size and every index's hash; of an
    object store, presence, and the rest when a shard arrives in the cache. Each read checks the
    bytes it returns. Raises ShardError naming shard, key and remedy. Threads may share a reader.
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
        # The reader's own method would make a cycle, and files would stay open until it is found.
        open_shard = partial(_open_shard, self._files, self._tables, entries)
        self._open: Callable[[int], OpenFile] = lru_cache(self._files.max_open)(open_shard)
        self._null_context = read_null_context(url, self.manifest) if self.manifest.text else None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[str, CacheConfig]]:
        return ShardReader, (self.url, self._cache)  # a worker process reopens, it copies nothing

    @property
    def shard_sizes(self) -> Array:
        """(S,) samples of each shard."""
        return np.diff(self._tables.starts)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        return storage.is_remote(self.url)

    @property
    def max_open(self) -> int:
        """Shards that are at hand at a time."""
        return self._files.max_open

    @property
    def text(self) -> TextEncoding:
        """How the captions were embedded. Raises ShardError for a set that has labels instead."""
        return require_text(self.manifest, self.url)

    @property
    def null_context(self) -> Array:
        """(M, D) embedding of the empty caption."""
        assert self._null_context is not None, self.text
        return self._null_context

    def fetch(self, shard: int) -> None:
        """Wait until a shard is at hand: cached and open."""
        self._open(shard)

    def caption_counts(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) how many captions each one's image has."""
        self._shards_of(samples)
        first: Array = self._tables.first_caption
        counts: Array = first[samples + 1] - first[samples]
        return counts

    def read_moments(self, samples: Array, out: Array, mirrored: Array | None = None) -> None:
        """Fill `out` (B, 2C, H, W) with mean above logvar of the VAE posteriors, unscaled.

        Where `mirrored` (B,) is true, with those of the mirrored image.
        """
        shards = self._shards_of(samples)
        places = self._tables.moments[samples]
        if mirrored is not None:
            if not self.manifest.flipped:
                raise ShardError(f"{self.url}: holds no mirrored images; encode with flip: true")
            places[mirrored] = self._tables.flipped[samples[mirrored]]
        self._read("moments", samples, shards, places, np.arange(len(out)), out)

    def read_contexts(self, samples: Array, captions: Array, out: Array) -> None:
        """Fill `out` (B, M, D) with one caption's embedding each, of number -1 the empty one's.

        The samples' other captions are not read.
        """
        out[captions < 0] = self.null_context
        rows = np.flatnonzero(captions >= 0)
        chosen = samples[rows]
        shards = self._shards_of(chosen)
        places = self._tables.context[self._tables.first_caption[chosen] + captions[rows]]
        self._read("context", chosen, shards, places, rows, out)

    def read_labels(self, samples: Array, dropped: Array, out: Array) -> None:
        """Fill `out` (B,) with class numbers; where `dropped` (B,), with the number of classes."""
        self._shards_of(samples)
        out[:] = np.where(dropped, len(self.manifest.classes), self._tables.label[samples])

    def num_captions(self, sample: int) -> int:
        """How many captions the sample's image has."""
        return int(self.caption_counts(np.array([sample]))[0])

    def moments(self, sample: int) -> Array:
        """(2C, H, W) mean above logvar of the VAE posterior, unscaled."""
        out = np.empty((1, *self.manifest.moments_shape), self.dtype)
        self.read_moments(np.array([sample]), out)
        return out.squeeze(0)

    def flipped(self, sample: int) -> Array:
        """The moments of the mirrored image, in a set that holds them."""
        out = np.empty((1, *self.manifest.moments_shape), self.dtype)
        self.read_moments(np.array([sample]), out, np.array([True]))
        return out.squeeze(0)

    def context(self, sample: int, caption: int) -> Array:
        """(M, D) embedding of one caption; the sample's other captions are not read."""
        shape, count = self.text.context_shape, self.num_captions(sample)
        if not 0 <= caption < count:
            raise IndexError(f"sample {sample} has {count} captions, asked for number {caption}")
        out = np.empty((1, *shape), self.dtype)
        self.read_contexts(np.array([sample]), np.array([caption]), out)
        return out.squeeze(0)

    def label(self, sample: int) -> int:
        """Number of the sample's class in `manifest.classes`. Raises ShardError without labels."""
        self._shards_of(np.array([sample]))
        label = int(self._tables.label[sample])
        if label == ABSENT:
            raise ShardError(f"{self.url}: holds captions, not class labels")
        return label

    def metadata(self, sample: int) -> SampleMetadata:
        """The sample's image id, captions and original size."""
        shards = self._shards_of(np.array([sample]))
        place = self._tables.metadata[[sample]]
        out = np.empty((1, int(place[0, 1])), np.uint8)
        self._read("json", np.array([sample]), shards, place[:, [0, 2]], np.array([0]), out)
        entry = self.manifest.shards[int(shards[0])]
        return parse_metadata(out.tobytes(), f"{entry.name} sample {sample}")

    def _shards_of(self, samples: Array) -> Array:
        """(B,) sample numbers => (B,) shard numbers, whose indexes are there from now on."""
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"{self.url} has {len(self)} samples, asked for number {outside[0]}")
        shards = self._tables.shards_of(samples)
        for shard in np.unique(shards[~self._tables.filled[shards]]).tolist():
            self.fetch(shard)
        return shards

    def _read(
        self, field: str, samples: Array, shards: Array, places: Array, rows: Array, out: Array
    ) -> None:
        """Read one array of each sample into `out[rows]`; `places` (B, 2) offset and checksum."""
        at_once = ROWS_AT_ONCE if len(self.manifest.shards) > self.max_open else len(self)
        for start in range(0, len(samples), at_once):
            part = slice(start, start + at_once)
            files = [self._open(shard) for shard in shards[part].tolist()]
            offsets, checksums = places[part].T
            descriptors = [file.descriptor for file in files]
            bad = read_rows(descriptors, offsets, checksums, rows[part], out)
            if bad is not None:
                what = f"{self._tables.key(int(samples[start + bad]))}.{field}"
                raise self._files.damaged(self.manifest.shards[shards[start + bad]], what)


def _open_shard(
    files: ShardFiles, tables: IndexTables, entries: tuple[ShardEntry, ...], shard: int
) -> OpenFile:
    if not tables.filled[shard]:
        tables.fill(shard, files.read_index(entries[shard]))
    return files.open_tar(entries[shard])
