"""Whole shards: written byte-reproducibly with their index, and read from front to back."""

import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import IO

import numpy as np
from webdataset import TarWriter

from ifvit import storage
from ifvit.shards import LatentSample, ShardEntry
from ifvit.shards.format import Array, index_bytes, index_tar, parse_metadata

BUFFER_BYTES = 8 << 20
"""Written at a time: the page cache keeps what was written in pieces as large, and a shard that
was just encoded is read the faster for it."""


def write_shard(folder: Path, name: str, samples: Iterable[LatentSample]) -> ShardEntry:
    """Write `NAME.tar` and `NAME.index.npz` into `folder`, each whole or not at all.

    Samples are consumed one by one, so a shard is never held in memory.
    """
    remove_leftovers(folder, name)
    with storage.write_file(str(folder / f"{name}.tar")) as path:
        with path.open("wb", BUFFER_BYTES) as file:
            _write_tar(file, samples)
        index = index_tar(path)
        data = index_bytes(index)
        storage.write_bytes(str(folder / f"{name}.index.npz"), data)
        return ShardEntry(
            name=name,
            num_samples=len(index),
            num_captions=len(index.context),
            num_bytes=path.stat().st_size,
            sha256=storage.sha256_of(path),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the unfinished files that a killed run left of `name` or `name.*`."""
    for leftover in folder.glob(f".{name}.*"):
        leftover.unlink()


def pack_sample(sample: LatentSample) -> dict[str, str | bytes]:
    """A sample as WebDataset wants it: member suffix => bytes."""
    members: dict[str, str | bytes] = {
        "__key__": sample.key,
        "moments.npy": npy_bytes(sample.moments),
        "json": json.dumps(asdict(sample.metadata), ensure_ascii=False).encode(),
    }
    if sample.flipped is not None:
        members["flipped.npy"] = npy_bytes(sample.flipped)
    if sample.context is not None:
        members["context.npy"] = npy_bytes(sample.context)
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    return members


def npy_bytes(array: Array) -> bytes:
    """The `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_tar(file: IO[bytes], samples: Iterable[LatentSample]) -> None:
    """Write the samples with fixed owner and time, so that equal samples give equal bytes."""
    with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(pack_sample(sample))


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
