"""Whole shards, read from front to back: what `write.py` wrote, from a folder or a store."""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

import numpy as np

from ifvit import storage
from ifvit.shards import LatentSample, ShardEntry
from ifvit.shards.records import Array, parse_metadata


@contextlib.contextmanager
def open_shard(url: str, entry: ShardEntry) -> Iterator[Path]:
    """A folder with the shard's tar and index: the dataset's own, or one of copies for the block.

    Nothing is checked; a file that the store does not have is not in the folder either.
    """
    if not storage.is_remote(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        for name in (f"{entry.name}.tar", f"{entry.name}.index.npz"):
            if storage.exists(storage.join(url, name)):
                storage.download(storage.join(url, name), Path(folder, name))
        yield Path(folder)


def read_samples(path: Path) -> Iterator[LatentSample]:
    """The samples of a tar in order. Raises ValueError for members that are not ours."""
    with tarfile.open(path, "r:") as tar:
        for key, members in groupby(tar, lambda member: member.name.partition(".")[0]):
            content = {member.name.partition(".")[2]: tar.extractfile(member) for member in members}
            yield _build_sample(key, {suffix: _all(file) for suffix, file in content.items()})


def _build_sample(key: str, members: dict[str, bytes]) -> LatentSample:
    arrays = {
        suffix.removesuffix(".npy"): _parse_npy(data)
        for suffix, data in members.items()
        if suffix.endswith(".npy")
    }
    return LatentSample(
        key=key,
        label=int(members["cls"]) if "cls" in members else None,
        metadata=parse_metadata(members["json"], f"{key}.json"),
        **arrays,
    )


def _parse_npy(data: bytes) -> Array:
    array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _all(file: IO[bytes] | None) -> bytes:
    assert file is not None, "a tar of samples holds plain files only"
    return file.read()
