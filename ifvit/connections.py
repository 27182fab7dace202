"""Object stores by fsspec: which URLs are allowed, how files are sent, how failures are retried.

`storage` opens all files through this module. URLs are local paths, `s3://` and `hf://`.
IFVIT_PROTOCOLS names further protocols of fsspec, such as `gs,az`; a recipe of a stranger cannot
add one. Failed requests are repeated for IFVIT_STORE_PATIENCE seconds (default 600).
"""

import contextlib
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from ifvit.errors import EXIT_STORE, UserError
from ifvit.records import shorten

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FileSystem = Any
"""An fsspec file system; fsspec has no types."""

_PROTOCOLS = ("s3", "hf")
# An object store refuses other names only after the patience, as if it failed.
_REMOTE_PATH = re.compile(
    r"[\w.@:-]*[\w.@-](/[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,1000})?", re.ASCII
)
_S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"max_attempts": 2, "mode": "standard"},
    },
}
PART_BYTES = 64 << 20
"""Part size of multipart uploads; a file of less than two parts is sent in one request."""
STALL_SECONDS = 60.0
_MIN_BYTES_PER_SECOND = 1 << 20
"""An upload has stalled after STALL_SECONDS plus its size divided by this rate."""
# ValueError includes UserError.
ABSENT = (FileNotFoundError, NotADirectoryError)
_PERMANENT_ERRORS = (*ABSENT, FileExistsError, IsADirectoryError, TypeError, ValueError)
_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")

_connecting = threading.Lock()


class StoreError(UserError):
    """An object store refuses access, or has failed for longer than the patience."""

    exit_code = EXIT_STORE


def is_remote(url: str) -> bool:
    """Whether `url` names an object store rather than the local file system.

    Raises UserError for a protocol that is not allowed and for a text that is no path.
    """
    protocol, separator, path = url.partition("://")
    if url.startswith(("~", "file:", "local:")) or "\0" in url:
        raise UserError(f"{shorten(url)}: expected a plain path, without ~ and file:")
    if not separator:
        return False
    allowed = (*_PROTOCOLS, *filter(None, os.environ.get("IFVIT_PROTOCOLS", "").split(",")))
    if protocol not in allowed or "::" in path:
        raise UserError(
            f"{shorten(url)}: expected a local path or a URL of {', '.join(allowed)}; to allow "
            "another protocol, name it in the environment variable IFVIT_PROTOCOLS"
        )
    if not _REMOTE_PATH.fullmatch(path):
        raise UserError(f"{shorten(url)}: expected a printable name, as {protocol}://bucket/prefix")
    return True


def filesystem(url: str) -> FileSystem:
    """Return the fsspec file system of `url`, without cached listings: others write there too.

    All threads of a process share one S3 client; fsspec would connect in each thread, at 0.2 s.
    """
    if not is_remote(url):
        return LocalFileSystem()
    if not url.startswith("s3://"):
        return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    settings = tuple(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_"))
    with _connecting:
        return _connect(os.getpid(), settings)


@lru_cache(maxsize=4)
def _connect(_pid: int, _settings: tuple[tuple[str, str], ...]) -> FileSystem:
    files = fsspec.filesystem("s3", skip_instance_cache=True, **_S3_OPTIONS)
    files.connect()
    return files


class RemoteFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file of a store; each read is one request, which is repeated as in `retry`."""

    def __init__(self, url: str, num_bytes: int) -> None:
        super().__init__(None, url, cache_type="none", size=num_bytes)

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)

        def get(files: FileSystem) -> bytes:
            data = bytes(files.cat_file(self.path, start=start, end=end))
            if len(data) != end - start:
                raise OSError(f"{len(data)} of {end - start} bytes arrived")
            return data

        return retry(self.path, get)


def retry(url: str, action: Callable[[FileSystem], Result]) -> Result:
    """Run `action` until it succeeds, with growing pauses; once on the local file system.

    Raises StoreError when the store refuses access or has failed for IFVIT_STORE_PATIENCE seconds.
    Permanent errors such as FileNotFoundError are raised without a retry.
    """
    if not is_remote(url):
        try:
            return action(filesystem(url))
        except ABSENT:
            raise
        except OSError as error:
            raise UserError(f"{url}: {error.strerror or error}; check the disk") from None
    patience = _patience()
    deadline = time.monotonic() + patience
    pause = 0.2
    while True:
        try:
            return action(filesystem(url))
        except _PERMANENT_ERRORS:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if _is_refusal(error):
                needed = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
                raise StoreError(
                    f"{url}: the store refuses access ({reason}); set "
                    f"{'HF_TOKEN' if url.startswith('hf:') else needed} to credentials with access"
                ) from error
            if not _is_transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise StoreError(
                    f"{url}: the store fails ({reason}), tried for {patience:.0f} s; nothing is "
                    "lost, run the same command again when the store answers"
                ) from error
            log.warning("%s: %s; trying again in %.1f s", url, reason, pause)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, 15.0)


def put_object(path: Path, url: str) -> None:
    """Copy a finished local file to an object, whole or not at all, and check what arrived."""
    etag, num_bytes = _expected_etag(path), path.stat().st_size

    def put(files: FileSystem) -> None:
        parts = {"chunksize": PART_BYTES} if url.startswith("s3://") else {}
        files.put_file(str(path), url, **parts, **_timeout(url, num_bytes))
        stored = files.info(url)
        is_equal = stored["size"] == num_bytes
        if is_equal and etag_of(stored) != etag:
            # The ETag of an encrypting store is not an MD5; then the object is read back.
            with files.open(url, "rb") as copy, path.open("rb") as file:
                digests = [hashlib.file_digest(each, "sha256").digest() for each in (copy, file)]
            is_equal = digests[0] == digests[1]
        if not is_equal:
            raise OSError("the store holds other bytes than were sent")

    _send(url, put)


def create_object(url: str, data: bytes) -> bool:
    """Write a small object unless it exists => whether this process created it."""

    def put(files: FileSystem) -> bool:
        try:
            files.pipe_file(url, data, mode="create", **_timeout(url, len(data)))
        except OSError as error:
            # s3fs has several exceptions for the answer 412, which means that the object exists.
            answer = getattr(error.__cause__, "response", None) or {}
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if not isinstance(error, FileExistsError) and status != 412:
                raise
            # An earlier try may have created the object, and only its answer was lost.
            return bool(files.cat_file(url) == data)
        return True

    return _send(url, put)


def _send(url: str, action: Callable[[FileSystem], Result]) -> Result:
    try:
        return retry(url, action)
    except FileNotFoundError:
        raise StoreError(f"{url}: no such bucket; create it first") from None


def _timeout(url: str, num_bytes: int) -> dict[str, float]:
    """Option for sending by s3fs, whose read timeout starts only when all bytes are sent."""
    if not url.startswith("s3://"):
        return {}
    return {"timeout": STALL_SECONDS + num_bytes / _MIN_BYTES_PER_SECOND}


def etag_of(info: Mapping[str, str]) -> str:
    """ETag of an object that a store describes; "" without one."""
    return info.get("ETag", "").strip('"')


def _expected_etag(path: Path) -> str:
    """ETag that S3 gives a file: its MD5, or the MD5 of its parts' MD5s and their number."""
    parts = []
    with path.open("rb") as file:
        if path.stat().st_size < 2 * PART_BYTES:
            return hashlib.file_digest(file, "md5").hexdigest()
        while data := file.read(PART_BYTES):
            parts.append(hashlib.md5(data, usedforsecurity=False).digest())
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return f"{joined}-{len(parts)}"


def _patience() -> float:
    given = os.environ.get("IFVIT_STORE_PATIENCE", "600")
    with contextlib.suppress(ValueError):
        if float(given) >= 0:
            return float(given)
    raise UserError(f"IFVIT_STORE_PATIENCE is {shorten(given)}; it must be a number of seconds")


def _is_refusal(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)  # of the hub
    names_credentials = type(error).__name__ in _CREDENTIAL_ERRORS
    return isinstance(error, PermissionError) or names_credentials or status in (401, 403)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):  # includes TimeoutError, and s3fs's EIO for unknown answers
        return True
    return any(
        cls.__module__.split(".")[0] in ("botocore", "aiohttp", "httpx", "httpx2")
        for cls in type(error).__mro__
    )
