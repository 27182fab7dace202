"""Files by URL: a local path or `s3://bucket/key`, written whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ifvit import object_store
from ifvit.errors import UserError


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
        object_store.retry(url, lambda files: files.info(url))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{url}: cannot be looked up ({error.strerror}); mend that first") from None
    return True


def file_size(url: str) -> int | None:
    """Bytes of a file, None when it is not there."""
    try:
        return object_store.retry(url, lambda files: int(files.info(url)["size"]))
    except FileNotFoundError:
        return None


def read_bytes(url: str) -> bytes:
    """The whole file. Raises UserError when it is not there."""
    try:
        return object_store.retry(url, lambda files: bytes(files.cat_file(url)))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None


def write_bytes(url: str, data: bytes) -> None:
    """Create or replace `url`; a reader sees the old content or the new, nothing between."""
    if is_remote(url):
        object_store.put_bytes(url, data)
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
        object_store.put_file(path, url)
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
            object_store.get_file(url, temporary, sha256)
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
        return object_store.create(url, data)
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

    object_store.retry(url, delete)


def list_names(url: str) -> list[str]:
    """Sorted names of what lies directly in folder `url`; an absent folder is empty."""
    try:
        entries = object_store.retry(url, lambda files: files.ls(url, detail=False))
    except FileNotFoundError:
        return []
    return sorted(Path(entry).name for entry in entries)


def count_files(url: str) -> int:
    """Files in folder `url` and below, without hidden ones, which are not whole yet."""
    paths = object_store.retry(url, lambda files: files.find(url))
    return sum(not Path(path).name.startswith(".") for path in paths)


def sha256_of(path: Path) -> str:
    """Hex digest of a local file's content."""
    return object_store.file_digest(path, "sha256")


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
