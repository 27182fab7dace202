"""Files of a dataset: in a local folder, or fetched from an object store into a disk cache.

`ShardReader` opens shards through `ShardFiles`; the verbs `shards verify` and `shards stats` call
`check_files` and `read_index`.
"""

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from ifvit import connections, storage
from ifvit.arrays import Array, parse_npy
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.records import is_sha256
from ifvit.shards import CacheConfig
from ifvit.shards.format import NULL_CONTEXT, Manifest, ShardEntry, ShardError, remedy_for
from ifvit.shards.index import ShardIndex, parse_index
from ifvit.storage import FileState

MAX_OPEN = 256
"""Tars that a reader keeps open, or a quarter of the process's descriptors if these are fewer."""
_NUM_TRIES = 3
"""Reads of a small object before it counts as damaged at rest, not in transfer."""
_MARKER = "ifvit-cache"
"""File that marks a folder as a cache, whose files may be deleted."""


class FileCache:
    """Folder of downloaded files, named by sha256; the least recently used files are evicted.

    Only files whose names are 64 hexadecimal digits are removed, from a folder with our marker.
    POSIX keeps an evicted file readable until it is closed, so no process waits for another one
    to finish reading.
    """

    def __init__(self, config: CacheConfig) -> None:
        default = Path(tempfile.gettempdir(), f"ifvit-cache-{os.getuid()}")
        self.folder = Path(config.folder) if config.folder else default
        self.num_bytes = int(config.gigabytes * 1e9)
        _open_cache(self.folder)
        self._locks = self.folder / "locks"
        self._locks.mkdir(exist_ok=True)

    def check_space(self, num_bytes: int) -> None:
        """Raise UserError unless the disk can hold `num_bytes`, or the whole cache if smaller."""
        cached = sum(found.st_size for _, found in self._files())
        room = shutil.disk_usage(self.folder).free + cached
        if room < min(num_bytes, self.num_bytes):
            raise UserError(
                f"{self.folder}: room for {room / 1e9:.1f} GB only; lower cache.gigabytes or set "
                "cache.folder to a larger disk"
            )

    def open(self, url: str, sha256: str, num_bytes: int) -> int:
        """Open the local copy of `url`, which is downloaded first if absent => file descriptor.

        Raises ContentError when the object has another sha256, UserError when it is absent.
        """
        path = self.folder / sha256
        with FileLock(self._locks / sha256):
            while True:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):  # absent, or a link
                        raise
                    self._fetch(url, path, num_bytes)
                else:
                    os.utime(descriptor)
                    return descriptor

    def remove(self, sha256: str) -> None:
        """Remove a copy that has gone bad on this disk; the next `open` downloads it again."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, num_bytes: int) -> None:
        for leftover in self.folder.glob(f".{path.name}.*"):  # of a killed process
            leftover.unlink()
        with FileLock(self._locks / "eviction"):
            self._make_room(num_bytes)
        storage.download(url, path, path.name, num_bytes)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        excess = sum(found.st_size for _, found in files) + num_bytes - self.num_bytes
        for path, found in files:
            if excess <= 0:
                return
            if is_sha256(path.name):  # another process is downloading the others
                path.unlink(missing_ok=True)
                excess -= found.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # renamed or evicted by another process
                # Unfinished downloads are named .SHA256.xxxxxxxx.
                if is_sha256(path.name.removeprefix(".")[:64]) and path.is_file():
                    yield path, path.lstat()


def _open_cache(folder: Path) -> None:
    """Create a cache folder with its marker file, or check that `folder` is one of this user.

    Raises UserError for a folder that another user owns or may write to, and for one that holds
    files but no marker.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH:
        raise UserError(f"{folder}: other users own or may change it; set cache.folder to another")
    names = {path.name for path in folder.iterdir()}
    if names and _MARKER not in names:
        raise UserError(
            f"{folder}: holds files, but no {_MARKER} that marks a cache whose files may be "
            "deleted; empty it, or set cache.folder to a new folder"
        )
    if not names:
        (folder / _MARKER).write_text("ifvit may delete the files in this folder.\n")


def local_copy(url: str, sha256: str) -> Path:
    """Path of a local `url`, or of its verified copy in the default cache folder."""
    if not connections.is_remote(url):
        return Path(url)
    cache = FileCache(CacheConfig())
    os.close(cache.open(url, sha256, storage.file_size(url) or 0))
    return cache.folder / sha256


class OpenFile:
    """File descriptor that is closed when the last reference to this object goes away."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """Opens the tars of a dataset, in a local folder or as copies in the cache of a store.

    Opening a dataset lists its files once and checks all names and the sizes of the tars. Raises
    ShardError for a file that is missing or contradicts the manifest.
    """

    def __init__(self, url: str, manifest: Manifest, config: CacheConfig) -> None:
        self.url = url
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # 256 on macOS; -1 is no limit
        self.max_open = min(MAX_OPEN, soft // 4) if soft > 0 else MAX_OPEN
        self._cache = FileCache(config) if connections.is_remote(url) else None
        files = storage.list_states(url)
        for entry in manifest.shards:
            check_files(url, files, entry)
        if self._cache is None:
            return
        sizes = [entry.num_bytes for entry in manifest.shards]
        self._cache.check_space(sum(sizes))
        # An open file still takes disk space after its eviction, so the cache bounds open files.
        self.max_open = min(self.max_open, self._cache.num_bytes // max(sizes, default=1))

    def open_tar(self, entry: ShardEntry) -> OpenFile:
        """Open the tar of one shard; its content is checked where it is read."""
        url = f"{self.url}/{entry.name}.tar"
        if self._cache is None:
            return OpenFile(os.open(url, os.O_RDONLY))
        try:
            return OpenFile(self._cache.open(url, entry.sha256, entry.num_bytes))
        except StoreError:
            raise
        except UserError as error:
            raise ShardError(f"{error}; {remedy_for(entry)}") from None

    def damaged(self, entry: ShardEntry, member: str) -> ShardError:
        """Return the error that names a damaged member of a tar and the remedy.

        A copy in the cache is removed: its hash was right after the download, so this disk damaged
        it.
        """
        problem = f"{self.url}/{entry.name}.tar: {member} is damaged"
        if self._cache is None:
            return ShardError(f"{problem}; {remedy_for(entry)}")
        self._cache.remove(entry.sha256)
        return ShardError(
            f"{problem} in the local cache; the copy was removed, run the command again"
        )


def check_files(url: str, files: Mapping[str, FileState | None], entry: ShardEntry) -> None:
    """Raise ShardError unless `files` of a dataset have a shard's index, and its tar in full size.

    `files` are those of `list_states`.
    """
    tar, index = f"{entry.name}.tar", f"{entry.name}.index.npz"
    for name in (tar, index):
        if files.get(name) is None:
            raise ShardError(f"{url}/{name}: no such file; {remedy_for(entry)}")
    state = files[tar]
    if state and state.num_bytes != entry.num_bytes:
        raise ShardError(
            f"{url}/{tar}: {state.num_bytes} bytes, the manifest says {entry.num_bytes}; "
            f"{remedy_for(entry)}"
        )


def read_index(folder: Path | str, manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Read `NAME.index.npz`. Raises ShardError when it is absent or not the file that was written.

    A transfer may damage bytes, so a wrong hash is tried again.
    """
    url = storage.join(str(folder), f"{entry.name}.index.npz")
    for _ in range(_NUM_TRIES):
        try:
            data = storage.read_bytes(url)
        except StoreError:
            raise
        except UserError as error:
            raise ShardError(f"{error}; {remedy_for(entry)}") from None
        if hashlib.sha256(data).hexdigest() == entry.index_sha256:
            return parse_index(data, url, manifest, entry)
    raise ShardError(f"{url}: index does not match the manifest's hash; {remedy_for(entry)}")


def read_null_context(url: str, manifest: Manifest) -> Array | None:
    """(M, D) context of the empty caption; None in a dataset without contexts.

    Raises ShardError unless hash, shape and dtype match.
    """
    if manifest.text is None:
        return None
    where = storage.join(url, NULL_CONTEXT)
    data = storage.read_bytes(where) if storage.exists(where) else b""
    if hashlib.sha256(data).hexdigest() != manifest.text.null_context_sha256:
        raise ShardError(f"{where}: missing or damaged null context; run the encode again")
    context = parse_npy(data, where, error=ShardError)
    num_tokens, width = context.shape if context.ndim == 2 else (0, 0)
    is_right = manifest.text.allows(num_tokens) and width == manifest.text.context_shape[1]
    if not is_right or context.dtype != manifest.dtype:
        found = f"{context.dtype} {context.shape}"
        raise ShardError(f"{where}: null context has dtype and shape {found}; encode again")
    return context
