"""Random access to a dataset of shards on the local file system."""

import os
from pathlib import Path

import numpy as np

from ifvit import storage
from ifvit.shards.index import ABSENT, ShardIndex, checksum, parse_index
from ifvit.shards.records import (
    MANIFEST,
    NULL_CONTEXT,
    Array,
    Manifest,
    SampleMetadata,
    ShardEntry,
    ShardError,
    TextEncoding,
    parse_metadata,
    read_manifest,
    remedy_for,
)


class ShardReader:
    """Random access to a dataset by global sample number; a read touches only what it returns.

    Opening checks every file's presence and size, every index's hash and the null context's; each
    read checks the bytes it returns. Raises ShardError naming shard, key and remedy.
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
        self._descriptors: dict[int, int] = {}
        self._null_context = read_null_context(url, self.manifest) if self.manifest.text else None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[str]]:
        return ShardReader, (self.url,)  # a worker process reopens the files, it copies none

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    @property
    def text(self) -> TextEncoding:
        """How the captions were embedded. Raises ShardError for a set that has labels instead."""
        return require_text(self.manifest, self.url)

    @property
    def null_context(self) -> Array:
        """(M, D) embedding of the empty caption."""
        assert self._null_context is not None, self.text
        return self._null_context

    def num_captions(self, sample: int) -> int:
        """How many captions the sample's image has."""
        shard, row = self._locate(sample)
        return int(self._indexes[shard].num_captions[row])

    def moments(self, sample: int) -> Array:
        """(2C, H, W) mean above logvar of the VAE posterior, unscaled."""
        shard, row = self._locate(sample)
        return self._read_array(shard, row, "moments", self.manifest.moments_shape)

    def flipped(self, sample: int) -> Array:
        """The moments of the mirrored image, in a set that holds them."""
        shard, row = self._locate(sample)
        return self._read_array(shard, row, "flipped", self.manifest.moments_shape)

    def context(self, sample: int, caption: int) -> Array:
        """(M, D) embedding of one caption; the sample's other captions are not read."""
        shard, row = self._locate(sample)
        count = int(self._indexes[shard].num_captions[row])
        if not 0 <= caption < count:
            raise IndexError(f"sample {sample} has {count} captions, asked for number {caption}")
        caption_row = int(self._indexes[shard].first_caption[row]) + caption
        return self._read_array(shard, row, "context", self.text.context_shape, caption_row)

    def label(self, sample: int) -> int:
        """Number of the sample's class in `manifest.classes`. Raises ShardError without labels."""
        shard, row = self._locate(sample)
        label = int(self._indexes[shard].label[row])
        if label == ABSENT:
            raise ShardError(f"{self.url}: holds captions, not class labels")
        return label

    def metadata(self, sample: int) -> SampleMetadata:
        """The sample's image id, captions and original size."""
        shard, row = self._locate(sample)
        offset, length, expected = self._indexes[shard].metadata[row].tolist()
        data = self._read(shard, row, "json", offset, length, expected).tobytes()
        return parse_metadata(data, f"{self.manifest.shards[shard].name} sample {sample}")

    def json_bytes(self, sample: int) -> int:
        """Length of the sample's metadata as stored."""
        shard, row = self._locate(sample)
        return int(self._indexes[shard].metadata[row][1])

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.url} has {len(self)} samples, asked for number {sample}")
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def _read_array(
        self, shard: int, row: int, field: str, shape: tuple[int, ...], index_row: int | None = None
    ) -> Array:
        table: Array = getattr(self._indexes[shard], field)
        offset, expected = table[row if index_row is None else index_row].tolist()
        num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        data = self._read(shard, row, field, offset, num_bytes, expected)
        return data.view(self._dtype).reshape(shape)

    def _read(
        self, shard: int, row: int, field: str, offset: int, num_bytes: int, expected: int
    ) -> Array:
        # Not by memory map: reading a file that was cut short would kill the process (SIGBUS).
        data = np.empty(num_bytes, dtype=np.uint8)
        found = os.preadv(self._descriptor(shard), [data.data], offset)
        if found != num_bytes or checksum(data.data) != expected:
            entry = self.manifest.shards[shard]
            key = self._indexes[shard].keys[row].decode()
            raise ShardError(
                f"{self._folder / entry.name}.tar: {key}.{field} is damaged; {remedy_for(entry)}"
            )
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            path = self._folder / f"{self.manifest.shards[shard].name}.tar"
            self._descriptors[shard] = os.open(path, os.O_RDONLY)
        return self._descriptors[shard]

    def _open_index(self, entry: ShardEntry) -> ShardIndex:
        check_shard_files(self._folder, entry)
        return read_index(self._folder, entry)


def require_text(manifest: Manifest, url: str) -> TextEncoding:
    """How captions were embedded. Raises ShardError for a dataset that has labels instead."""
    if manifest.text is None:
        raise ShardError(f"{url}: holds class labels, not captions; this needs captions")
    return manifest.text


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


def read_index(folder: Path, entry: ShardEntry) -> ShardIndex:
    """Raise ShardError unless the index is the one that was written."""
    path = folder / f"{entry.name}.index.npz"
    if not path.is_file():
        raise ShardError(f"{path}: no such index; {remedy_for(entry)}")
    if storage.sha256_of(path) != entry.index_sha256:
        raise ShardError(f"{path}: index does not match the manifest's hash; {remedy_for(entry)}")
    index = parse_index(path.read_bytes(), str(path))
    if (len(index), len(index.context)) != (entry.num_samples, entry.num_captions):
        raise ShardError(f"{path}: index of {len(index)} samples; {remedy_for(entry)}")
    return index


def read_null_context(url: str, manifest: Manifest) -> Array:
    """(M, D) embedding of the empty caption. Raises ShardError unless hash and shape match."""
    text, path = require_text(manifest, url), Path(url) / NULL_CONTEXT
    if not path.is_file() or storage.sha256_of(path) != text.null_context_sha256:
        raise ShardError(f"{path}: missing or damaged null context; run the encode again")
    context: Array = np.load(path, allow_pickle=False)
    if context.shape != text.context_shape:
        raise ShardError(f"{path}: null context has shape {context.shape}; encode again")
    return context
