"""Reading and writing of complete shards with webdataset.

`writer` writes the shards of an encode job. `encode` and the `shards` verbs read them from front to
back; random access for training is in `ifvit.shards.reader`.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from webdataset import TarWriter

from ifvit import connections, storage
from ifvit.arrays import npy_bytes, parse_npy
from ifvit.records import MAX_BYTES
from ifvit.shards.format import LatentSample, ShardEntry, ShardError, parse_metadata
from ifvit.shards.index import index_bytes, index_tar, parse_label, read_tar

BUFFER_BYTES = 8 << 20
"""Size of one write. Files that were written in large blocks are read faster afterwards."""


def write_shard(folder: str, name: str, samples: Iterable[LatentSample]) -> ShardEntry:
    """Write `NAME.tar` and `NAME.index.npz` into a folder or prefix, each whole or not at all.

    Each sample is written before the next one is taken, so a shard need not fit into memory. Equal
    samples give equal bytes, because owner and time of the members are constants.
    """
    remove_leftovers(folder, name)
    with storage.write_file(storage.join(folder, f"{name}.tar")) as path:
        with (
            path.open("wb", BUFFER_BYTES) as file,
            TarWriter(file, user="", group="", mtime=0, encoder=False) as tar,
        ):
            for sample in samples:
                tar.write(pack_sample(sample))
        index = index_tar(path)
        data = index_bytes(index)
        storage.write_bytes(storage.join(folder, f"{name}.index.npz"), data)
        return ShardEntry(
            name=name,
            num_samples=len(index),
            num_captions=len(index.context),
            num_bytes=path.stat().st_size,
            sha256=storage.sha256_of(path),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )


def remove_leftovers(url: str, name: str) -> None:
    """Delete unfinished local files of `name` or `name.*` that a killed process left in `url`.

    The random ending of 8 digits that `storage` gives them tells them from files of the user.
    """
    if not connections.is_remote(url):
        for path in Path(url).glob(f".{name}.*"):
            if re.fullmatch(r"\.[0-9a-f]{8}", path.suffix):
                path.unlink()


def pack_sample(sample: LatentSample) -> dict[str, str | bytes]:
    """Convert a sample to webdataset's form: member suffix => bytes."""
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


@contextlib.contextmanager
def open_shard(url: str, entry: ShardEntry) -> Iterator[Path]:
    """Provide a local folder with the shard's tar and index; downloads are deleted at the end.

    Nothing is checked. A file that is missing in the store, or that has another size than the
    manifest states, is missing in the folder.
    """
    if not connections.is_remote(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        tar, index = f"{entry.name}.tar", f"{entry.name}.index.npz"
        if storage.file_size(storage.join(url, tar)) == entry.num_bytes:
            storage.download(storage.join(url, tar), Path(folder, tar))
        if (storage.file_size(storage.join(url, index)) or MAX_BYTES) < MAX_BYTES:
            storage.download(storage.join(url, index), Path(folder, index))
        yield Path(folder)


def read_samples(path: Path) -> Iterator[LatentSample]:
    """Read the samples of a tar in order. Raises ShardError for a tar of anything else."""
    for key, members in read_tar(path):
        arrays = {
            suffix.removesuffix(".npy"): parse_npy(
                member.data, f"{path}: {key}.{suffix}", error=ShardError
            )
            for suffix, member in members.items()
            if suffix.endswith(".npy")
        }
        where = f"{path}: {key}"
        yield LatentSample(
            key=key,
            label=parse_label(members["cls"].data, f"{where}.cls") if "cls" in members else None,
            metadata=parse_metadata(members["json"].data, f"{where}.json"),
            **arrays,
        )
