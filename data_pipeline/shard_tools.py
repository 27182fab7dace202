"""The verbs `shards inspect`, `stats`, `verify` and `merge`."""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.completion import LatentSums
from data_pipeline.config import InspectConfig, MergeConfig, ShardsConfig
from data_pipeline.encoders import decode_mean
from data_pipeline.shard_io import open_shard, read_samples
from data_pipeline.sources.base import shard_name
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.autoencoders import load_autoencoder
from ifvit.shards import (
    LatentSample,
    Manifest,
    ShardEntry,
    ShardError,
    read_manifest,
    write_manifest,
)
from ifvit.shards.cache import check_shard_files, read_index, read_null_context
from ifvit.shards.format import (
    MANIFEST,
    NULL_CONTEXT,
    Array,
    ShardIndex,
    index_bytes,
    index_tar,
    parse_metadata,
    remedy_for,
)

GRID_COLUMNS = 8
CAPTION_WIDTH = 60


def stats(config: ShardsConfig) -> None:
    """Print a table: counts, caption lengths or class sizes, latent statistics, bytes by part."""
    manifest = read_manifest(config.url)

    def look(entry: ShardEntry) -> tuple[ShardIndex, list[int]]:
        with open_shard(config.url, entry) as folder:
            index = read_index(folder, entry)
            return index, list(_caption_lengths(folder / f"{entry.name}.tar", index))

    with ThreadPoolExecutor(config.num_workers) as pool:
        found = pool.map(look, manifest.shards)
        progress = tqdm(found, total=len(manifest.shards), desc="stats", unit="shard")
        indexes, lengths = zip(*progress, strict=True)
    rows = [
        ("images", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards"),
        *_condition_rows(manifest, indexes, [length for part in lengths for length in part]),
        *_recipe_rows(manifest),
        ("latent mean", f"{manifest.latent_mean:.5f}"),
        ("latent std", f"{manifest.latent_std:.5f}; scaling factor {manifest.scaling_factor:.5f}"),
        *_byte_rows(manifest, indexes),
    ]
    sys.stdout.writelines(f"{name:<16} {value}\n" for name, value in rows)


def inspect_shards(config: InspectConfig) -> None:
    """Print a table of the first samples and, if asked, decode them into one PNG.

    Raises UserError when the autoencoder for the picture is not the one that made the latents.
    """
    manifest = read_manifest(config.url)
    samples = list(islice(_first_samples(config.url, manifest), config.num_samples))
    for name, value in _recipe_rows(manifest):
        sys.stdout.write(f"{name:<16} {value}\n")
    sys.stdout.write(f"{'image':>12} {'size':>11} {'mean':>7} {'std':>6}  shows\n")
    for sample in samples:
        metadata = sample.metadata
        mean = np.split(sample.moments.astype(np.float64), 2)[0]
        size = f"{metadata.width}x{metadata.height}"
        if sample.label is None:
            shows = f"{len(metadata.captions)}: {metadata.captions[0].strip()[:CAPTION_WIDTH]}"
        else:
            shows = manifest.classes[sample.label]
        sys.stdout.write(
            f"{metadata.image_id:>12} {size:>11} {mean.mean():>7.3f} {mean.std():>6.3f}  {shows}\n"
        )
    if config.grid:
        draw_grid(config, manifest, samples)


def draw_grid(config: InspectConfig, manifest: Manifest, samples: list[LatentSample]) -> None:
    """Decode the posterior means of the samples into the PNG `config.grid`, 8 a row."""
    assert config.grid is not None
    vae = load_autoencoder(config.vae or manifest.vae.name)
    if vae.identity.sha256 != manifest.vae.sha256:
        raise UserError(
            f"{vae.identity.name}: not the autoencoder that made {config.url} "
            f"({manifest.vae.name}); name that one with --vae"
        )
    images = np.stack([decode_mean(vae, sample) for sample in samples])
    grid = make_grid(images, min(GRID_COLUMNS, len(samples)))
    storage.write_bytes(config.grid, encode_png(grid))
    sys.stdout.write(f"{config.grid}: {len(samples)} images decoded from their latents\n")


def _first_samples(url: str, manifest: Manifest) -> Iterator[LatentSample]:
    for entry in manifest.shards:
        with open_shard(url, entry) as folder:
            yield from read_samples(folder / f"{entry.name}.tar")


def _caption_lengths(path: Path, index: ShardIndex) -> Iterator[int]:
    """Words of every caption in a shard; only the metadata is read."""
    with path.open("rb") as file:
        for offset, length, _ in index.metadata.tolist():
            file.seek(offset)
            for caption in parse_metadata(file.read(length), str(path)).captions:
                yield len(caption.split())


def _condition_rows(
    manifest: Manifest, indexes: tuple[ShardIndex, ...], lengths: list[int]
) -> list[tuple[str, str]]:
    if manifest.classes:
        labels = np.concatenate([index.label for index in indexes])
        counts = np.bincount(labels, minlength=len(manifest.classes))
        return [("classes", f"{len(counts):,}; {_spread(counts.tolist())} images a class")]
    per_image = np.concatenate([index.num_captions for index in indexes]).tolist()
    return [
        ("captions", f"{manifest.num_captions:,}; {_spread(per_image)} an image"),
        ("words a caption", _spread(lengths)),
    ]


def _byte_rows(manifest: Manifest, indexes: tuple[ShardIndex, ...]) -> list[tuple[str, str]]:
    total = sum(entry.num_bytes for entry in manifest.shards)
    item = np.dtype(manifest.dtype).itemsize
    moments = manifest.num_samples * int(np.prod(manifest.moments_shape)) * item
    parts = {"moments": moments}
    if manifest.flipped:
        parts["flipped"] = moments
    if manifest.text:
        parts["context"] = manifest.num_captions * int(np.prod(manifest.text.context_shape)) * item
    parts["json"] = sum(int(index.metadata[:, 1].sum()) for index in indexes)
    parts["headers"] = total - sum(parts.values())
    rows = [(f"  {name}", f"{part:,} ({100 * part / total:.1f} %)") for name, part in parts.items()]
    return [("bytes", f"{total:,}"), *rows]


def _recipe_rows(manifest: Manifest) -> list[tuple[str, str]]:
    stored = f"moments {'x'.join(map(str, manifest.moments_shape))}"
    rows = [("autoencoder", f"{manifest.vae.name} ({manifest.vae.sha256[:12]})")]
    if text := manifest.text:
        rows.append(("text encoder", f"{text.encoder.name} ({text.encoder.sha256[:12]})"))
        stored += f", context {'x'.join(map(str, text.context_shape))}"
    if manifest.flipped:
        stored += ", mirrored too"
    return [
        *rows,
        ("image", f"{manifest.image_size} px, {manifest.resize}"),
        ("stored", f"{stored}, {manifest.dtype}"),
    ]


def _spread(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}, mean {np.mean(values):.2f}"


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


SAME = ("classes", "image_size", "resize", "flipped", "dtype", "moments_shape")


def merge(config: MergeConfig) -> None:
    """Copy all shards, each checked by its hash, and write the combined manifest last.

    Raises UserError for fewer than two datasets, different encoders or recipes, a shard that is
    there twice, and an output that is a dataset already.
    """
    if len(config.urls) < 2:
        raise UserError("urls: name at least two datasets to merge")
    if storage.exists(storage.join(config.output, MANIFEST)):
        raise UserError(f"{config.output}: is a dataset already; choose another output")
    manifests = [read_manifest(url) for url in config.urls]
    for url, manifest in zip(config.urls, manifests, strict=True):
        _check_alike(config.urls[0], manifests[0], url, manifest)
    sources = [
        (url, entry)
        for url, manifest in zip(config.urls, manifests, strict=True)
        for entry in manifest.shards
    ]
    _check_unique(sources)
    shards = []
    for number, (url, entry) in enumerate(tqdm(sources, desc="merge", unit="shard")):
        renamed = replace(entry, name=shard_name(number))
        for suffix, sha256 in ((".tar", entry.sha256), (".index.npz", entry.index_sha256)):
            old, new = f"{url}/{entry.name}{suffix}", f"{config.output}/{renamed.name}{suffix}"
            _copy(old, new, sha256)
        shards.append(renamed)
    if text := manifests[0].text:
        old, new = f"{config.urls[0]}/{NULL_CONTEXT}", f"{config.output}/{NULL_CONTEXT}"
        _copy(old, new, text.null_context_sha256)
    merged = _combine(manifests, shards)
    write_manifest(config.output, merged)
    sys.stdout.write(
        f"{config.output}: {merged.num_samples:,} images in {len(shards):,} shards of "
        f"{len(manifests)} datasets; latent std {merged.latent_std:.4f}\n"
    )


def _check_alike(first: str, expected: Manifest, url: str, manifest: Manifest) -> None:
    wrong = [key for key in SAME if getattr(manifest, key) != getattr(expected, key)]
    if manifest.vae.sha256 != expected.vae.sha256:
        wrong.append("vae")
    if _text_encoder(manifest) != _text_encoder(expected):
        wrong.append("text_encoder")
    elif _null_context(manifest) != _null_context(expected):
        wrong.append("null_context")  # the same encoder, computing in another precision
    if wrong:
        raise UserError(f"{url}: cannot join {first}, they differ in {', '.join(wrong)}")


def _text_encoder(manifest: Manifest) -> str | None:
    return manifest.text.encoder.sha256 if manifest.text else None


def _null_context(manifest: Manifest) -> str | None:
    return manifest.text.null_context_sha256 if manifest.text else None


def _check_unique(entries: list[tuple[str, ShardEntry]]) -> None:
    counts = Counter(entry.sha256 for _, entry in entries if entry.num_samples)
    twice = [f"{url}/{entry.name}.tar" for url, entry in entries if counts[entry.sha256] > 1]
    if twice:
        raise UserError(f"{twice[0]} and {twice[1]}: the same shard; its images would count twice")


def _copy(source: str, target: str, sha256: str) -> None:
    """Through a local file that is checked, so a damaged shard is never copied on."""
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        local = Path(folder, Path(source).name)
        storage.download(source, local, sha256)
        storage.upload(local, target)


def _combine(manifests: Sequence[Manifest], shards: list[ShardEntry]) -> Manifest:
    """The manifest of all shards, with the statistics of all latents together."""
    sums = LatentSums()
    for one in manifests:
        count = one.num_samples
        second = count * (one.latent_std**2 + one.latent_mean**2)
        sums += LatentSums(count=count, first=count * one.latent_mean, second=second)
    return replace(
        manifests[0],
        num_samples=sum(one.num_samples for one in manifests),
        num_captions=sum(one.num_captions for one in manifests),
        latent_mean=sums.mean,
        latent_std=sums.std,
        shards=tuple(shards),
    )
