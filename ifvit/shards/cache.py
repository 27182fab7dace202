"""Where the files of a dataset are: a local folder, or an object store behind a cache."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock

from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.config import CacheConfig
from ifvit.shards.format import (
    NULL_CONTEXT,
    Array,
    Manifest,
    ShardEntry,
    ShardError,
    ShardIndex,
    TextEncoding,
    parse_index,
    remedy_for,
)
from ifvit.storage import StoreError


@dataclass(frozen=True, kw_only=True, order=True)
class _CachedFile:
    """Sorts by time of last use, in nanoseconds."""

    used: int
    num_bytes: int
    path: Path


class FileCache:
    """Fetches files by URL and content; the least recently used make room for new ones.

    A file that is evicted while open stays readable until it is closed (POSIX): no process ever
    waits until another has done with a file.
    """

    def __init__(self, config: CacheConfig) -> None:
        default = Path(tempfile.gettempdir(), f"ifvit-cache-{os.getuid()}")
        self.folder = Path(config.folder) if config.folder else default
        self.num_bytes = int(config.gigabytes * 1e9)
        self._locks = self.folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def check_space(self, num_bytes: int) -> None:
        """Raise UserError unless the disk has room for `num_bytes`, the cached files included."""
        room = shutil.disk_usage(self.folder).free + sum(file.num_bytes for file in self._files())
        if room < min(num_bytes, self.num_bytes):
            raise UserError(
                f"{self.folder}: room for {room / 1e9:.1f} GB only; lower cache.gigabytes or set "
                "cache.folder to a larger disk"
            )

    def open(self, url: str, sha256: str, num_bytes: int) -> int:
        """A descriptor of the local copy of `url`, of that size, fetched unless it is here.

        Raises ContentError when the object has other content, UserError when there is none.
        """
        path = self.folder / sha256
        with FileLock(self._locks / sha256):
            while True:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    self._fetch(url, path, num_bytes)
                else:
                    os.utime(descriptor)
                    return descriptor

    def forget(self, sha256: str) -> None:
        """Remove a copy that has gone bad on this disk; the next `open` fetches it anew."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, num_bytes: int) -> None:
        for leftover in self.folder.glob(f".{path.name}.*"):  # of a killed process
            leftover.unlink()
        with FileLock(self._locks / "eviction"):
            self._make_room(num_bytes)
        storage.download(url, path, path.name)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted(self._files())
        excess = sum(file.num_bytes for file in files) + num_bytes - self.num_bytes
        for file in files:
            if excess <= 0:
                return
            if not file.path.name.startswith("."):  # those are just arriving
                file.path.unlink(missing_ok=True)
                excess -= file.num_bytes

    def _files(self) -> Iterator[_CachedFile]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # renamed or evicted just now
                    continue
                yield _CachedFile(
                    used=stat.st_mtime_ns, num_bytes=stat.st_size, path=Path(entry.path)
                )


_TRIES = 3
"""How often a small object is read before it counts as damaged, not as badly transferred."""
MAX_OPEN = 256
"""Tars that a reader keeps open; a quarter of the descriptors that a process usually may have."""


class OpenFile:
    """A descriptor that is closed when nobody holds this object any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles(Protocol):
    """Opens the files of shards. Raises ShardError where one is not what the manifest promises."""

    max_open: int
    """Tars that may be open at a time."""

    def read_index(self, entry: ShardEntry) -> ShardIndex:
        """The index of one shard, its hash checked."""

    def open_tar(self, entry: ShardEntry) -> OpenFile:
        """The tar of one shard; its content is checked where it is read."""

    def damaged(self, entry: ShardEntry, what: str) -> ShardError:
        """The error that says that `what` in a shard is damaged, and the remedy."""


class LocalFiles:
    """Shards in a folder of this machine; opening looks for every file and its size."""

    max_open = MAX_OPEN

    def __init__(self, url: str, manifest: Manifest) -> None:
        self._folder = Path(url)
        for entry in manifest.shards:
            check_shard_files(self._folder, entry)

    def read_index(self, entry: ShardEntry) -> ShardIndex:
        """As `ShardFiles` says."""
        return read_index(self._folder, entry)

    def open_tar(self, entry: ShardEntry) -> OpenFile:
        """As `ShardFiles` says."""
        return OpenFile(os.open(self._folder / f"{entry.name}.tar", os.O_RDONLY))

    def damaged(self, entry: ShardEntry, what: str) -> ShardError:
        """As `ShardFiles` says."""
        path = self._folder / f"{entry.name}.tar"
        return ShardError(f"{path}: {what} is damaged; {remedy_for(entry)}")


class CachedFiles:
    """Shards in an object store; opening looks for every file's name, using one fetches it."""

    def __init__(self, url: str, manifest: Manifest, config: CacheConfig) -> None:
        self._url, self._cache = url, FileCache(config)
        names = set(storage.list_names(url))
        for entry in manifest.shards:
            for name in (f"{entry.name}.tar", f"{entry.name}.index.npz"):
                if name not in names:
                    raise ShardError(f"{url}/{name}: no such file; {remedy_for(entry)}")
        sizes = [entry.num_bytes for entry in manifest.shards]
        self._cache.check_space(sum(sizes))
        # What is open outlives its eviction, so no more may be open than the cache can hold.
        self.max_open = min(MAX_OPEN, self._cache.num_bytes // max(sizes, default=1))

    def read_index(self, entry: ShardEntry) -> ShardIndex:
        """As `ShardFiles` says."""
        url = f"{self._url}/{entry.name}.index.npz"
        for _ in range(_TRIES):
            data = storage.read_bytes(url)
            if hashlib.sha256(data).hexdigest() == entry.index_sha256:
                return _parse_index(data, entry, url)
        raise _wrong_index(url, entry)

    def open_tar(self, entry: ShardEntry) -> OpenFile:
        """As `ShardFiles` says."""
        url = f"{self._url}/{entry.name}.tar"
        try:
            return OpenFile(self._cache.open(url, entry.sha256, entry.num_bytes))
        except StoreError:
            raise
        except UserError as error:
            raise ShardError(f"{error}; {remedy_for(entry)}") from None

    def damaged(self, entry: ShardEntry, what: str) -> ShardError:
        """As `ShardFiles` says; it arrived whole, so the copy here has gone bad."""
        self._cache.forget(entry.sha256)
        return ShardError(
            f"{self._url}/{entry.name}.tar: {what} is damaged in the local cache; it was removed, "
            "run the command again"
        )


def open_files(url: str, manifest: Manifest, cache: CacheConfig) -> ShardFiles:
    """The dataset's files, wherever `url` says they are."""
    if storage.is_remote(url):
        return CachedFiles(url, manifest, cache)
    return LocalFiles(url, manifest)


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
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise _wrong_index(str(path), entry)
    return _parse_index(data, entry, str(path))


def read_null_context(url: str, manifest: Manifest) -> Array:
    """(M, D) embedding of the empty caption. Raises ShardError unless hash and shape match."""
    text, where = require_text(manifest, url), storage.join(url, NULL_CONTEXT)
    data = storage.read_bytes(where) if storage.exists(where) else b""
    if hashlib.sha256(data).hexdigest() != text.null_context_sha256:
        raise ShardError(f"{where}: missing or damaged null context; run the encode again")
    context: Array = np.load(io.BytesIO(data), allow_pickle=False)
    if context.shape != text.context_shape:
        raise ShardError(f"{where}: null context has shape {context.shape}; encode again")
    return context


def _parse_index(data: bytes, entry: ShardEntry, where: str) -> ShardIndex:
    index = parse_index(data, where)
    if (len(index), len(index.context)) != (entry.num_samples, entry.num_captions):
        raise ShardError(f"{where}: index of {len(index)} samples; {remedy_for(entry)}")
    return index


def _wrong_index(where: str, entry: ShardEntry) -> ShardError:
    return ShardError(f"{where}: index does not match the manifest's hash; {remedy_for(entry)}")
