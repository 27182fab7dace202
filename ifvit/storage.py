"""Files by URL: a local path or `s3://bucket/key`, written whole or not at all."""

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from ifvit.errors import UserError

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20
"""Part size of multipart uploads; a file under two parts goes up in one request."""
STALL_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""An upload that takes longer than both together allow has stalled and begins anew."""
_S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"max_attempts": 2, "mode": "standard"},
    }
}
_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    TypeError,
    ValueError,
)
_REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
_PRECONDITION_FAILED = 412
_DOWNLOADS = 3

_connecting = threading.Lock()

Result = TypeVar("Result")


class StoreError(UserError):
    """An object store that refuses, or that failed for longer than our patience."""


class ContentError(UserError):
    """An object whose content is not what was once written."""


def patience() -> float:
    """Seconds for which a failing store is tried again: IFVIT_STORE_PATIENCE, or ten minutes."""
    return float(os.environ.get("IFVIT_STORE_PATIENCE", "600"))


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """The fsspec file system of `url`; listings are never cached, other writers exist.

    All threads of a process share one S3 client: fsspec would make each its own, at 0.2 s.
    """
    if not url.startswith("s3://"):
        return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    settings = tuple(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_"))
    with _connecting:
        return _connect(os.getpid(), settings)


@lru_cache(maxsize=4)
def _connect(_pid: int, _settings: tuple[tuple[str, str], ...]) -> fsspec.AbstractFileSystem:
    files = fsspec.filesystem(
        "s3", use_listings_cache=False, skip_instance_cache=True, **_S3_OPTIONS
    )
    files.connect()
    return files


def retry(url: str, action: Callable[[fsspec.AbstractFileSystem], Result]) -> Result:
    """Do `action` until it succeeds, with growing pauses; on the local file system, once.

    Raises StoreError when the store refuses access or has failed for `patience()` seconds;
    FileNotFoundError at once, for that is an answer.
    """
    if "://" not in url:
        return action(filesystem(url))
    deadline = time.monotonic() + patience()
    pause = 0.2
    while True:
        try:
            return action(filesystem(url))
        except _PERMANENT:  # UserError is a ValueError
            raise
        except Exception as error:
            if isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS:
                raise StoreError(
                    f"{url}: the store refuses access ({_reason(error)}); set AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL to credentials that may use it"
                ) from error
            if not _is_transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise StoreError(
                    f"{url}: the store fails ({_reason(error)}), tried for {patience():.0f} s; "
                    "nothing is lost, run the same command again when it answers"
                ) from error
            log.warning("%s: %s; trying again in %.1f s", url, _reason(error), pause)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, 15.0)


def put_bytes(url: str, data: bytes) -> None:
    """Create or replace an object by one request, and see that the store holds just `data`."""
    etag = hashlib.md5(data, usedforsecurity=False).hexdigest()

    def put(files: fsspec.AbstractFileSystem) -> None:
        files.pipe_file(url, data, **_deadline(url, len(data)))
        stored = files.info(url)
        if stored["size"] != len(data) or (
            _etag_of(stored) != etag and files.cat_file(url) != data
        ):
            raise OSError("what the store holds is not what was sent")

    _write(url, put)


def put_file(path: Path, url: str) -> None:
    """Upload a finished local file, in parts when it is large, and check it by hash."""
    etag, num_bytes = _file_etag(path), path.stat().st_size

    def put(files: fsspec.AbstractFileSystem) -> None:
        options = {"chunksize": PART_BYTES} if url.startswith("s3://") else {}
        files.put_file(str(path), url, **options, **_deadline(url, num_bytes))
        stored = files.info(url)
        if stored["size"] != num_bytes:
            raise OSError(f"the store holds {stored['size']} bytes of {num_bytes}")
        # An encrypting store's ETag is no MD5; then what it holds is read back.
        if _etag_of(stored) != etag and _remote_sha256(files, url) != file_digest(path, "sha256"):
            raise OSError("what the store holds is not what was sent")

    _write(url, put)


def get_file(url: str, path: Path, sha256: str | None = None) -> None:
    """Download to `path`, which the caller publishes, and check size and, if given, hash.

    Raises ContentError when the content differs each time: then the object itself is damaged.
    """

    def get(files: fsspec.AbstractFileSystem) -> bool:
        num_bytes = files.info(url)["size"]
        files.get_file(url, str(path))
        if path.stat().st_size != num_bytes:
            raise OSError(f"{path.stat().st_size} of {num_bytes} bytes arrived")
        return sha256 is None or file_digest(path, "sha256") == sha256

    if not any(retry(url, get) for _ in range(_DOWNLOADS)):
        raise ContentError(f"{url}: damaged, its content does not have the sha256 {sha256}")


def create_object(url: str, data: bytes) -> bool:
    """Write `data` unless `url` exists; of many at once, one succeeds. Whether this one did."""

    def holds(files: fsspec.AbstractFileSystem) -> bool:
        return bool(files.cat_file(url) == data)  # yes, if an earlier try got through unheard

    def put(files: fsspec.AbstractFileSystem) -> bool:
        try:
            files.pipe_file(url, data, mode="create", **_deadline(url, len(data)))
        except FileExistsError:
            return holds(files)
        except OSError as error:
            if not _is_condition(error):
                raise
            return holds(files)
        return True

    return _write(url, put)


def file_digest(path: Path, name: str) -> str:
    """Hex digest of a local file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _deadline(url: str, num_bytes: int) -> dict[str, float]:
    """Option of s3fs's calls that send; its read timeout starts only when all has been taken."""
    if not url.startswith("s3://"):
        return {}
    return {"timeout": STALL_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND}


def _write(url: str, action: Callable[[fsspec.AbstractFileSystem], Result]) -> Result:
    try:
        return retry(url, action)
    except FileNotFoundError:
        raise StoreError(f"{url}: no such bucket; create it first") from None


def _is_condition(error: Exception) -> bool:
    """Whether the store said 412, whatever exception s3fs made of it."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return bool(status == _PRECONDITION_FAILED)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):  # TimeoutError is one, and s3fs makes EIO of unknown answers
        return True
    return any(
        cls.__module__.split(".")[0] in ("botocore", "aiohttp") for cls in type(error).__mro__
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _etag_of(info: dict[str, str]) -> str:
    return info.get("ETag", "").strip('"')


def _file_etag(path: Path) -> str:
    """The ETag that S3 gives a file: MD5, or the MD5 of its parts' MD5s and their number."""
    if path.stat().st_size < 2 * PART_BYTES:
        return file_digest(path, "md5")
    parts = []
    with path.open("rb") as file:
        while data := file.read(PART_BYTES):
            parts.append(hashlib.md5(data, usedforsecurity=False).digest())
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return f"{joined}-{len(parts)}"


def _remote_sha256(files: fsspec.AbstractFileSystem, url: str) -> str:
    digest = hashlib.sha256()
    with files.open(url, "rb") as file:
        while data := file.read(PART_BYTES):
            digest.update(data)
    return digest.hexdigest()


def is_remote(url: str) -> bool:
    """Whether `url` names an object store rather than the local file system."""
    return "://" in url


def join(url: str, *parts: str) -> str:
    """`join("s3://b/run", "weights", "x")` => `s3://b/run/weights/x`."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or folder is there now. Raises UserError when that cannot be told.

    fsspec's own answer is no whenever a local disk fails, and what is thought absent is written
    anew or removed.
    """
    try:
        retry(url, lambda files: files.info(url))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{url}: cannot be looked up ({error.strerror}); mend that first") from None
    return True


def file_size(url: str) -> int | None:
    """Bytes of a file, None when it is not there."""
    try:
        return retry(url, lambda files: int(files.info(url)["size"]))
    except FileNotFoundError:
        return None


def read_bytes(url: str) -> bytes:
    """The whole file. Raises UserError when it is not there."""
    try:
        return retry(url, lambda files: bytes(files.cat_file(url)))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None


def write_bytes(url: str, data: bytes) -> None:
    """Create or replace `url`; a reader sees the old content or the new, nothing between."""
    if is_remote(url):
        put_bytes(url, data)
        return
    with write_file(url) as path:
        path.write_bytes(data)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, synced local file into place and make the rename itself durable."""
    temporary.chmod(0o644)  # mkstemp's 0600 would lock out the rest of the team
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(url: str) -> Any:
    """Parse a JSON file. Raises UserError naming the file when it is missing or malformed."""
    try:
        return json.loads(read_bytes(url))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{url}: not valid JSON ({error})") from None


def write_json(url: str, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def upload(path: Path, url: str) -> None:
    """Copy a finished local file to `url`, whole or not at all, and check what arrived."""
    if is_remote(url):
        put_file(path, url)
        return
    with write_file(url) as copy:
        shutil.copyfile(path, copy)


@contextlib.contextmanager
def write_file(url: str) -> Iterator[Path]:
    """A local file to fill inside; it becomes `url` after, unless an error ends the block."""
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


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Copy `url` to the local `path`, whole or not at all.

    Raises ContentError when `sha256` is given and the content has another, UserError when `url`
    is not there.
    """
    with write_file(str(path)) as temporary:
        try:
            get_file(url, temporary, sha256)
        except FileNotFoundError:
            raise UserError(f"{url}: no such file") from None


def local_copy(url: str, sha256: str) -> Path:
    """`url` itself if it is local, else a verified copy in the cache, downloaded at most once.

    The cache is IFVIT_CACHE, or ifvit in XDG_CACHE_HOME or ~/.cache. Raises like `download`.
    """
    if not is_remote(url):
        return Path(url)
    caches = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    path = Path(os.environ.get("IFVIT_CACHE", f"{caches}/ifvit"), sha256)
    if not path.exists():
        download(url, path, sha256)
    return path


def create(url: str, data: bytes) -> bool:
    """Write a small file unless it exists; of many processes at once, one succeeds."""
    if is_remote(url):
        return create_object(url, data)
    with _temporary_beside(Path(url)) as temporary:
        temporary.write_bytes(data)
        temporary.chmod(0o644)
        _sync(temporary)
        try:
            os.link(temporary, url)
        except FileExistsError:
            return False
    return True


def remove(url: str) -> None:
    """Remove a file, or a folder and all in it; one that is not there is no error."""

    def delete(files: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            files.rm(url, recursive=True)

    retry(url, delete)


def list_names(url: str) -> list[str]:
    """Sorted names of what lies directly in folder `url`; an absent folder is empty."""
    try:
        entries = retry(url, lambda files: files.ls(url, detail=False))
    except FileNotFoundError:
        return []
    return sorted(Path(entry).name for entry in entries)


def count_files(url: str) -> int:
    """Files in folder `url` and below, without hidden ones, which are not whole yet."""
    paths = retry(url, lambda files: files.find(url))
    return sum(not Path(path).name.startswith(".") for path in paths)


def sha256_of(path: Path) -> str:
    """Hex digest of a local file's content."""
    return file_digest(path, "sha256")


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A file `.NAME.xxxxxxxx` in the folder of `path`, made if need be; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
