"""Check every byte of a dataset of shards: hashes, shapes, counts, finite values."""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.config import ShardsConfig
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import Manifest, ShardEntry, ShardError, read_manifest
from ifvit.shards.files import check_shard_files, read_index, read_null_context, require_text
from ifvit.shards.index import index_bytes, index_tar
from ifvit.shards.records import MANIFEST, NULL_CONTEXT, Array, parse_metadata, remedy_for


def verify(config: ShardsConfig) -> None:
    """Print every problem of the dataset as one line. Raises UserError with their number."""
    manifest = read_manifest(config.url)
    num_problems = 0
    for problem in _problems(config.url, manifest):
        num_problems += 1
        tqdm.write(problem, file=sys.stdout)
    if num_problems:
        raise UserError(f"{config.url}: {num_problems} problems, listed above")
    sys.stdout.write(
        f"{config.url}: {len(manifest.shards):,} shards, {manifest.num_samples:,} images, "
        f"{manifest.num_captions:,} captions: every hash, shape and count is right\n"
    )


def _problems(url: str, manifest: Manifest) -> Iterator[str]:
    try:
        context = read_null_context(url, manifest)
        if not np.isfinite(context).all():
            yield f"{url}/{NULL_CONTEXT}: values that are not finite; encode again"
    except ShardError as error:
        yield str(error)
    for key in ("num_samples", "num_captions"):
        total = sum(getattr(entry, key) for entry in manifest.shards)
        if total != getattr(manifest, key):
            yield f"{url}/{MANIFEST}: {key} is not the sum over its shards, {total}"
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
    with tqdm(total=num_bytes, desc="verify", unit="B", unit_scale=True) as progress:
        for entry in manifest.shards:
            yield from _shard_problems(Path(url), entry, manifest)
            progress.update(entry.num_bytes)


def _shard_problems(folder: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    index = None
    try:
        index = read_index(folder, entry)
    except ShardError as error:
        yield str(error)
    path = folder / f"{entry.name}.tar"
    try:
        check_shard_files(folder, entry)
    except ShardError as error:
        yield str(error)
        return
    if storage.sha256_of(path) != entry.sha256:
        yield f"{path}: content does not match the manifest's sha256; {remedy_for(entry)}"
        return  # what lies in a damaged tar is not worth a list
    if index is not None and index_bytes(index) != index_bytes(index_tar(path)):
        yield f"{path}: index does not point to the members; {remedy_for(entry)}"
    yield from _content_problems(path, entry, manifest)


def _content_problems(path: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    """What is wrong inside a tar whose hash is right: then the program that wrote it was."""
    context_shape = require_text(manifest, str(path)).context_shape
    counts = {"moments": 0, "context": 0, "captions": 0}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, member.name
            data = file.read()
            if member.name.endswith(".json"):
                counts["captions"] += len(parse_metadata(data, f"{path} {member.name}").captions)
                continue
            array: Array = np.load(io.BytesIO(data), allow_pickle=False)
            is_context = member.name.endswith(".context.npy")
            counts["context" if is_context else "moments"] += len(array) if is_context else 1
            shape = array.shape[1:] if is_context else array.shape
            expected = context_shape if is_context else manifest.moments_shape
            if shape != expected or array.dtype != manifest.dtype:
                yield f"{path}: {member.name} is {array.dtype} {array.shape}; encode again"
            if not np.isfinite(array).all():
                yield f"{path}: {member.name} has values that are not finite; encode again"
    expected_counts = {
        "moments": entry.num_samples,
        "context": entry.num_captions,
        "captions": entry.num_captions,
    }
    if counts != expected_counts:
        yield f"{path}: holds {counts}, the manifest says {expected_counts}; encode again"
