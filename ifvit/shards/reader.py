"""Random access to a dataset of shards on the local file system."""

from pathlib import Path

import numpy as np

from ifvit import storage
from ifvit.shards.records import (
    INDEX_COLUMNS,
    MANIFEST,
    Array,
    Manifest,
    SampleMetadata,
    ShardEntry,
    ShardError,
    parse_metadata,
    read_manifest,
    remedy_for,
)


class ShardReader:
    """Random access to a dataset by global sample number; a read touches only what it returns.

    Arrays are read-only views of memory-mapped files. Opening checks every file's presence and
    size, every index's hash and the null context's; the tars' hashes are `ifvit shards verify`.
    Raises ShardError naming shard, field and remedy.
    """

    def __init__(self, url: str) -> None:
        if storage.is_remote(url):
            raise ShardError(f"{url}: shards are read from a local folder; copy them to one first")
        self.url = url
        self.manifest = read_manifest(url)
        counts = [entry.num_samples for entry in self.manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if self._starts[-1] != self.manifest.num_samples:
            raise ShardError(f"{url}/{MANIFEST}: num_samples is not the sum over its shards")
        self._folder = Path(url)
        self._dtype = np.dtype(self.manifest.dtype)
        self._indexes = [self._open_index(entry) for entry in self.manifest.shards]
        self._bytes: dict[int, Array] = {}
        self.null_context = read_null_context(url, self.manifest)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[str]]:
        return ShardReader, (self.url,)  # a worker process reopens the files, it copies none

    def num_captions(self, sample: int) -> int:
        """How many captions the sample's image has."""
        return int(self._row(sample)[1][2])

    def moments(self, sample: int) -> Array:
        """(2C, H, W) mean above logvar of the VAE posterior, unscaled."""
        shard, row = self._row(sample)
        return self._view(shard, int(row[0]), self.manifest.moments_shape)

    def context(self, sample: int, caption: int) -> Array:
        """(M, D) embedding of one caption; the sample's other captions are not read."""
        shard, row = self._row(sample)
        if not 0 <= caption < row[2]:
            raise IndexError(f"sample {sample} has {row[2]} captions, asked for number {caption}")
        shape = self.manifest.context_shape
        num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        return self._view(shard, int(row[1]) + caption * num_bytes, shape)

    def metadata(self, sample: int) -> SampleMetadata:
        """The sample's image id, captions and original size."""
        shard, row = self._row(sample)
        data = self._shard(shard)[row[3] : row[3] + row[4]].tobytes()
        return parse_metadata(data, f"{self.manifest.shards[shard].name} sample {sample}")

    def json_bytes(self, sample: int) -> int:
        """Length of the sample's metadata as stored."""
        return int(self._row(sample)[1][4])

    def _row(self, sample: int) -> tuple[int, Array]:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.url} has {len(self)} samples, asked for number {sample}")
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, self._indexes[shard][sample - self._starts[shard]]

    def _view(self, shard: int, offset: int, shape: tuple[int, ...]) -> Array:
        num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        return self._shard(shard)[offset : offset + num_bytes].view(self._dtype).reshape(shape)

    def _shard(self, shard: int) -> Array:
        if shard not in self._bytes:
            path = self._folder / f"{self.manifest.shards[shard].name}.tar"
            self._bytes[shard] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        return self._bytes[shard]

    def _open_index(self, entry: ShardEntry) -> Array:
        check_shard_files(self._folder, entry)
        return read_index(self._folder, entry)


def check_shard_files(folder: Path, entry: ShardEntry) -> None:
    """Raise ShardError unless the shard's tar is there with the size the manifest promises."""
    path = folder / f"{entry.name}.tar"
    if not path.is_file():
        raise ShardError(f"{path}: no such shard; {remedy_for(entry)}")
    if path.stat().st_size != entry.num_bytes:
        raise ShardError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry.num_bytes}; "
            f"{remedy_for(entry)}"
        )


def read_index(folder: Path, entry: ShardEntry) -> Array:
    """(num_samples, 5) int64, see INDEX_COLUMNS. Raises ShardError unless it is the one written."""
    path = folder / f"{entry.name}.index.npy"
    if not path.is_file():
        raise ShardError(f"{path}: no such index; {remedy_for(entry)}")
    if storage.sha256_of(path) != entry.index_sha256:
        raise ShardError(f"{path}: index does not match the manifest's hash; {remedy_for(entry)}")
    index: Array = np.load(path, allow_pickle=False)
    if index.shape != (entry.num_samples, len(INDEX_COLUMNS)):
        raise ShardError(f"{path}: index has shape {index.shape}; {remedy_for(entry)}")
    return index


def read_null_context(url: str, manifest: Manifest) -> Array:
    """(M, D) embedding of the empty caption. Raises ShardError unless hash and shape match."""
    path = Path(url) / manifest.null_context
    if not path.is_file() or storage.sha256_of(path) != manifest.null_context_sha256:
        raise ShardError(f"{path}: missing or damaged null context; run the encode again")
    context: Array = np.load(path, allow_pickle=False)
    if context.shape != manifest.context_shape:
        raise ShardError(f"{path}: null context has shape {context.shape}; encode again")
    return context
