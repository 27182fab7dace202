"""Latent samples => one shard: a byte-reproducible tar and the index of its members."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from webdataset import TarWriter

from ifvit import storage
from ifvit.shards import LatentSample, ShardEntry
from ifvit.shards.records import INDEX_COLUMNS, Array


def write_shard(folder: Path, name: str, samples: Iterable[LatentSample]) -> ShardEntry:
    """Write `NAME.tar` and `NAME.index.npy` into `folder`, each whole or not at all.

    Samples are consumed one by one, so a shard is never held in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, name)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.tar.")
    path = Path(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_tar(file, samples)
            os.fsync(file.fileno())
        index = index_tar(path)
        index_bytes = npy_bytes(index)
        entry = ShardEntry(
            name=name,
            num_samples=len(index),
            num_captions=int(index[:, INDEX_COLUMNS.index("num_captions")].sum()),
            num_bytes=path.stat().st_size,
            sha256=storage.sha256_of(path),
            index_sha256=hashlib.sha256(index_bytes).hexdigest(),
        )
        storage.write_bytes(str(folder / f"{name}.index.npy"), index_bytes)
        storage.publish(path, folder / f"{name}.tar")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return entry


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the unfinished files that a killed run left of `name` or `name.*`."""
    for leftover in folder.glob(f".{name}.*"):
        leftover.unlink()


def pack_sample(sample: LatentSample) -> dict[str, str | bytes]:
    """A sample as WebDataset wants it: member suffix => bytes."""
    return {
        "__key__": sample.key,
        "moments.npy": npy_bytes(sample.moments),
        "context.npy": npy_bytes(sample.context),
        "json": json.dumps(asdict(sample.metadata), ensure_ascii=False).encode(),
    }


def npy_bytes(array: Array) -> bytes:
    """The `.npy` file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def index_tar(path: Path) -> Array:
    """Tar of samples => (num_samples, 5) int64, columns INDEX_COLUMNS, offsets past npy headers."""
    rows: dict[str, dict[str, int]] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            row = rows.setdefault(key, {})
            if suffix == "json":
                row["json_offset"], row["json_length"] = member.offset_data, member.size
                continue
            shape, offset = _array_header(file, member.offset_data)
            field = suffix.removesuffix(".npy")
            row[f"{field}_offset"] = offset
            if field == "context":
                row["num_captions"] = shape[0]
    table = [[row[column] for column in INDEX_COLUMNS] for row in rows.values()]
    return np.array(table, dtype=np.int64).reshape(-1, len(INDEX_COLUMNS))


def _write_tar(file: IO[bytes], samples: Iterable[LatentSample]) -> None:
    """Write the samples with fixed owner and time, so that equal samples give equal bytes."""
    with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(pack_sample(sample))
    file.flush()


def _array_header(file: IO[bytes], offset: int) -> tuple[tuple[int, ...], int]:
    """Shape of the `.npy` at `offset` and where its data begins."""
    file.seek(offset)
    version = np.lib.format.read_magic(file)
    assert version == (1, 0), version
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape, file.tell()
