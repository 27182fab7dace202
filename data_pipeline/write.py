"""Latent samples => one shard: a byte-reproducible tar and the index of its members."""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from webdataset import TarWriter

from ifvit import storage
from ifvit.shards import LatentSample, ShardEntry
from ifvit.shards.index import index_bytes, index_tar
from ifvit.shards.records import Array

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
