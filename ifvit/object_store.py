"""Object stores behind fsspec, made safe: every write is checked, every fault is waited out.

What fsspec and s3fs leave to their users (measured on s3fs 2026.9): a failed download leaves a
file of the full size; a file object commits what it holds when an exception closes it; listings
are cached; a server that is down raises errors that are no OSError. So files travel whole, are
compared by hash on arrival, and no file object is ever opened for writing.
"""

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

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


def create(url: str, data: bytes) -> bool:
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
