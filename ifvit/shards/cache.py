"""Files of object stores on local disk: bounded, shared by the processes of a machine.

A file is named by the sha256 of its content: a dataset that was encoded anew never meets what was
cached of it before. The content is checked on arrival and not hashed again after a restart, which
would cost minutes; readers check each array that they use by its own checksum.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.config import CacheConfig


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
