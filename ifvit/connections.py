"""Connections to object stores by fsspec: which URLs are allowed, and how failures are retried.

`storage` opens all files through this module. URLs are local paths, `s3://` and `hf://`.
IFVIT_PROTOCOLS names further protocols of fsspec, such as `gs,az`; a recipe of a stranger cannot
add one. Failed requests are repeated for IFVIT_STORE_PATIENCE seconds (default 600).
"""

import contextlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
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
