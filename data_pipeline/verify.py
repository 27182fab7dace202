"""Check every byte of a dataset of shards: hashes, shapes, counts, finite values."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.config import ShardsConfig
from data_pipeline.read import open_shard, read_samples
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import LatentSample, Manifest, ShardEntry, ShardError, read_manifest
from ifvit.shards.files import check_shard_files, read_index, read_null_context
from ifvit.shards.index import index_bytes, index_tar
from ifvit.shards.records import MANIFEST, NULL_CONTEXT, Array, remedy_for


def verify(config: ShardsConfig) -> None:
    """Print every problem of the dataset as one line. Raises UserError with their number."""
    manifest = read_manifest(config.url)
    problems = _manifest_problems(config.url, manifest)
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)

    def check(entry: ShardEntry) -> list[str]:
        found = list(_shard_problems(config.url, entry, manifest))
        progress.update(entry.num_bytes)
        return found

    with (
        tqdm(total=num_bytes, desc="verify", unit="B", unit_scale=True) as progress,
        ThreadPoolExecutor(config.num_workers) as pool,
    ):
        for found in pool.map(check, manifest.shards):
            problems += found
    if problems:
        sys.stdout.writelines(f"{problem}\n" for problem in problems)
        raise UserError(f"{config.url}: {len(problems)} problems, listed above")
    what = f"{manifest.num_captions:,} captions"
    if manifest.classes:
        what = f"{len(manifest.classes):,} classes"
    sys.stdout.write(
        f"{config.url}: {len(manifest.shards):,} shards, {manifest.num_samples:,} images, "
        f"{what}: every hash, shape and count is right\n"
    )


def _manifest_problems(url: str, manifest: Manifest) -> list[str]:
    problems = []
    try:
        if manifest.text and not np.isfinite(read_null_context(url, manifest)).all():
            problems.append(f"{url}/{NULL_CONTEXT}: values that are not finite; encode again")
    except ShardError as error:
        problems.append(str(error))
    for key in ("num_samples", "num_captions"):
        total = sum(getattr(entry, key) for entry in manifest.shards)
        if total != getattr(manifest, key):
            problems.append(f"{url}/{MANIFEST}: {key} is not the sum over its shards, {total}")
    return problems


def _shard_problems(url: str, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    """What is wrong with one shard; its files are named by where the dataset is."""
    with open_shard(url, entry) as folder:
        for problem in _file_problems(folder, entry, manifest):
            yield problem.replace(str(folder), url)


def _file_problems(folder: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
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
    num_samples = num_captions = 0
    for sample in read_samples(path):
        num_samples += 1
        num_captions += len(sample.metadata.captions)
        for problem in _sample_problems(sample, manifest):
            yield f"{path}: {sample.key}.{problem}; encode again"
    found, expected = (num_samples, num_captions), (entry.num_samples, entry.num_captions)
    if found != expected:
        yield (
            f"{path}: holds (samples, captions) {found}, the manifest says {expected}; encode again"
        )


def _sample_problems(sample: LatentSample, manifest: Manifest) -> Iterator[str]:
    moments = manifest.moments_shape
    yield from _array_problems("moments", sample.moments, moments, manifest)
    flipped = moments if manifest.flipped else None
    yield from _array_problems("flipped", sample.flipped, flipped, manifest)
    num_captions = len(sample.metadata.captions)
    context = (num_captions, *manifest.text.context_shape) if manifest.text else None
    yield from _array_problems("context", sample.context, context, manifest)
    labels = range(len(manifest.classes)) if manifest.classes else [None]
    if sample.label not in labels:
        yield f"cls is {sample.label}, of {len(manifest.classes)} classes"


def _array_problems(
    field: str, array: Array | None, shape: tuple[int, ...] | None, manifest: Manifest
) -> Iterator[str]:
    """How an array differs from `shape` and the set's dtype; shape None means there is none."""
    if array is None or shape is None:
        if (array is None) != (shape is None):
            yield f"{field}.npy is {'absent' if array is None else 'there'}, against the manifest"
        return
    if array.shape != shape or array.dtype != manifest.dtype:
        yield f"{field}.npy is {array.dtype} {array.shape}, not {manifest.dtype} {shape}"
    if not np.isfinite(array).all():
        yield f"{field}.npy has values that are not finite"
