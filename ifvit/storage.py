"""Files by URL: a local path, `s3://bucket/key`, `hf://...`, or a protocol that the user allows.

All packages read and write files of datasets and runs through this module. A file is written whole
or not at all: locally under a temporary name, synced and renamed; in an object store by one request
or multipart upload. Every transfer is checked by size and hash.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ifvit import records
from ifvit.connections import (
    ABSENT,
    FileSystem,
    RemoteFile,
    Result,
    create_object,
    etag_of,
    is_remote,
    put_object,
    retry,
)
from ifvit.errors import UserError
from ifvit.records import MAX_BYTES, shorten

Record = TypeVar("Record")
Absent = TypeVar("Absent")
_NUM_DOWNLOADS = 3
"""Downloads with a wrong hash before the object itself counts as damaged."""
# macOS has both ENOTSUP and EOPNOTSUPP.
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class ContentError(UserError):
    """The content of an object has another hash than the content that was written."""


class TooLargeError(UserError):
    """A file has more bytes than its reader allows."""


def join(url: str, *parts: str) -> str:
    """Join parts with slashes: `join("s3://b/run", "weights", "x")` => `s3://b/run/weights/x`."""
    return "/".join([url.rstrip("/"), *parts])


def join_inside(url: str, name: str) -> str:
    """Join a folder and a relative path that a stranger's file or folder names.

    Raises UserError for a name, or a local symbolic link, that leads out of the folder.
    """
    if not is_remote(url):
        records.path_inside(Path(url), name)
    elif not records.is_relative_path(name):
        raise UserError(f"{url}: the name {shorten(name)!r} does not lead inside this folder")
    return join(url, name)


def require_no_links_out(url: str) -> None:
    """Raise UserError when a folder below a local `url` is a symbolic link that leads out of it.

    Files are written and removed in these folders, also when the run comes from a stranger.
    """
    if is_remote(url):
        return
    for parent, folders, _ in os.walk(url):
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() and records.leads_out(Path(url), path):
                raise UserError(
                    f"{path}: a link that leads out of {url}, where files are removed; put a "
                    "folder in its place, or make the whole run a link"
                )


def exists(url: str) -> bool:
    """Whether a file or folder exists. Raises UserError when a local disk fails to answer.

    On such a failure fsspec's `exists` returns False, and callers would overwrite the file.
    """
    return _ask(url, lambda files: files.info(url), None) is not None


def file_size(url: str) -> int | None:
    """Size of a file in bytes, None when it is absent."""
    return _ask(url, lambda files: int(files.info(url)["size"]), None)


def list_names(url: str) -> list[str]:
    """Sorted names of the files and folders directly in folder `url`; [] for an absent folder."""
    return sorted(
        Path(entry).name for entry in _ask(url, lambda files: files.ls(url, detail=False), [])
    )


@dataclass(frozen=True, slots=True)
class FileState:
    """Size of a file, and a text that changes with its content: its ETag or modification time."""

    num_bytes: int
    version: str


def list_states(url: str) -> dict[str, FileState | None]:
    """State of each file directly in folder `url`, by name; None for a folder or special file.

    Costs one request for a thousand files of a store. {} for an absent folder.
    """
    if not is_remote(url):
        return _ask(url, lambda _: _scan(url), {})
    versions = ("blob_id", "LastModified", "last_modified", "mtime")
    return {
        Path(entry["name"]).name: FileState(
            int(entry["size"]), etag_of(entry) or str([entry.get(key) for key in versions])
        )
        if entry["type"] == "file"
        else None
        for entry in _ask(url, lambda files: files.ls(url, detail=True), [])
    }


def _scan(folder: str) -> dict[str, FileState | None]:
    states: dict[str, FileState | None] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            states[entry.name] = None
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a broken link
                if entry.is_file():
                    found = entry.stat()
                    states[entry.name] = FileState(found.st_size, str(found.st_mtime_ns))
    return states


def _ask(url: str, question: Callable[[FileSystem], Result], absent: Absent) -> Result | Absent:
    """Answer to a question about a file or folder; `absent` when there is none."""
    try:
        return retry(url, question)
    except ABSENT:
        return absent


def walk_files(url: str) -> list[str]:
    """Sorted relative paths of the files in folder `url` and below; [] for an absent folder.

    Links to folders are listed as files and not followed.
    """
    if is_remote(url):
        paths = retry(url, lambda files: files.find(url))
        start = len(url.partition("://")[2].rstrip("/")) + 1
        return sorted(path[start:] for path in paths)

    def fail(error: OSError) -> None:
        if not isinstance(error, ABSENT):
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

    names = []
    for place, folders, files in os.walk(url, onerror=fail):
        links = [name for name in folders if Path(place, name).is_symlink()]
        names += [Path(place, name).relative_to(url).as_posix() for name in [*files, *links]]
    return sorted(names)


def open_ranges(url: str, num_bytes: int | None) -> io.IOBase:
    """Open a file of which parts are read; each read of a remote file is one request.

    `num_bytes` is its size by a listing. Raises UserError when it is absent or no regular file.
    """
    if not is_remote(url):
        return open_file(url)
    if num_bytes is None:
        raise UserError(f"{url}: not a regular file")
    return RemoteFile(url, num_bytes)


def read_bytes(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole file. Raises UserError when it is absent, no regular file, or too large."""

    def read(files: FileSystem) -> bytes:
        _check_size(url, _size_of_file(files, url), max_bytes)
        return bytes(files.cat_file(url))

    with _one_line(url):
        if is_remote(url):
            return retry(url, read)
        with open_file(url) as file:
            _check_size(url, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a local file to read. Raises UserError when it is absent or no regular file.

    Unlike `open`, this does not wait for the writer of a pipe.
    """
    with _one_line(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"{path}: not a regular file")


@contextlib.contextmanager
def _one_line(url: str | Path) -> Iterator[None]:
    """Turn the error of a file that cannot be read into a UserError."""
    try:
        yield
    except ABSENT:
        raise UserError(f"{url}: no such file") from None
    except OSError as error:
        raise UserError(f"{url}: cannot be read ({error.strerror})") from None


def _size_of_file(files: FileSystem, url: str) -> int:
    """Size of a regular file or object. Raises UserError for anything else."""
    info = files.info(url)
    if info["type"] != "file":
        raise UserError(f"{url}: not a regular file")
    return int(info["size"])


def _check_size(url: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise TooLargeError(f"{url}: larger than the allowed {max_bytes:,} bytes")


def read_sealed(cls: type[Record], url: str, *, error: type[UserError] = UserError) -> Record:
    """Parse a file of `write_sealed`. Raises `error` when its content does not fit its seal."""
    return records.parse_sealed(cls, read_bytes(url), url, error=error)


def read_rows(cls: type[Record], url: str, *, error: type[UserError] = UserError) -> list[Record]:
    """Parse the complete sealed lines of a file. Raises `error` naming the line."""
    return records.parse_rows(cls, read_bytes(url), url, error=error)


def download(url: str, path: Path, sha256: str | None = None, max_bytes: int | None = None) -> None:
    """Copy `url` to the local `path`, whole or not at all, and check its size.

    Raises UserError when `url` is absent or has more than `max_bytes`. With `sha256`, raises
    ContentError when every download has another hash, because then the object itself is damaged.
    """

    def get(files: FileSystem) -> bool:
        num_bytes = _size_of_file(files, url)
        _check_size(url, num_bytes, max_bytes or num_bytes)
        files.get_file(url, str(temporary))
        if temporary.stat().st_size != num_bytes:
            raise OSError(f"{temporary.stat().st_size} of {num_bytes} bytes arrived")
        return sha256 is None or sha256_of(temporary) == sha256

    with write_file(str(path)) as temporary:
        with _one_line(url):
            is_intact = any(retry(url, get) for _ in range(_NUM_DOWNLOADS))
        if not is_intact:
            raise ContentError(f"{url}: damaged, its content does not have the sha256 {sha256}")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(url: str, data: bytes) -> None:
    """Create or replace `url`; a reader sees either the old content or the new."""
    with write_file(url) as path:
        path.write_bytes(data)


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def write_sealed(url: str, content: Any) -> None:
    """Write a record or JSON object with its seal, for `read_sealed`."""
    write_bytes(url, records.dump_sealed(content))


@contextlib.contextmanager
def write_file(url: str) -> Iterator[Path]:
    """Yield a local path to fill; when the block ends without an error it becomes `url`."""
    if is_remote(url):
        with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
            path = Path(folder, Path(url).name)
            yield path
            upload(path, url)
        return
    with _temporary_beside(Path(url)) as temporary:
        yield temporary
        _sync(temporary)
        publish(temporary, Path(url))


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, synced local file into place and make the rename durable."""
    temporary.replace(path)
    _sync(path.parent)


def upload(path: Path, url: str) -> None:
    """Copy a finished local file to `url`, whole or not at all, and check what arrived."""
    if not is_remote(url):
        with write_file(url) as copy:
            shutil.copyfile(path, copy)
        return
    put_object(path, url)


def create(url: str, data: bytes) -> bool:
    """Write a small file unless it exists => whether this process created it.

    When several processes try at once, exactly one succeeds. On a file system without hard links a
    reader may see the file before its content is complete.
    """
    if is_remote(url):
        return create_object(url, data)
    with _temporary_beside(Path(url)) as temporary, contextlib.suppress(FileExistsError):
        temporary.write_bytes(data)
        _sync(temporary)
        try:
            os.link(temporary, url)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            with Path(url).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return True
    return False


def remove(url: str) -> None:
    """Remove a file, or a folder with its content; an absent one is not an error."""
    with contextlib.suppress(FileNotFoundError):
        retry(url, lambda files: files.rm(url, recursive=True))


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a file `.NAME.xxxxxxxx` in the folder of `path`, and remove it afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Unlike mkstemp, this leaves it to the user's umask who may read the file.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
