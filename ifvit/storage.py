"""Files by URL: a local path or `s3://bucket/key`, written whole or not at all."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from ifvit.errors import UserError


def is_remote(url: str) -> bool:
    """Whether `url` names an object store rather than the local file system."""
    return "://" in url


def join(url: str, *parts: str) -> str:
    """`join("s3://b/run", "weights", "x")` => `s3://b/run/weights/x`."""
    return "/".join([url.rstrip("/"), *parts])


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """The fsspec file system of `url`; listings are never cached, other writers exist."""
    return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]


def exists(url: str) -> bool:
    """Whether a file or folder is there now."""
    return bool(filesystem(url).exists(url))


def read_bytes(url: str) -> bytes:
    """The whole file. Raises UserError when it is not there."""
    try:
        return bytes(filesystem(url).cat_file(url))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None


def write_bytes(url: str, data: bytes) -> None:
    """Create or replace `url`; a reader sees the old content or the new, nothing between."""
    if is_remote(url):
        filesystem(url).pipe_file(url, data)
        return
    path = Path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def list_names(url: str) -> list[str]:
    """Sorted names of what lies directly in folder `url`; an absent folder is empty."""
    files = filesystem(url)
    try:
        entries = files.ls(url, detail=False)
    except FileNotFoundError:
        return []
    return sorted(Path(entry).name for entry in entries)


def sha256_of(path: Path) -> str:
    """Hex digest of a local file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
