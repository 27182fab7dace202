"""The verbs `shards inspect`, `stats`, `verify` and `merge`."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
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
from ifvit.arrays import Array
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.autoencoders import load_autoencoder
from ifvit.records import printable, shorten
from ifvit.shards.cache import check_files, read_index, read_null_context
from ifvit.shards.format import (
    COMPLETED,
    FEATURE_DTYPE,
    MANIFEST,
    NULL_CONTEXT,
    LatentSample,
    Manifest,
    ShardEntry,
    ShardError,
    TextEncoding,
    read_manifest,
    remedy_for,
    write_manifest,
)
from ifvit.shards.index import ShardIndex, index_bytes, index_tar

GRID_COLUMNS = 8
CAPTION_WIDTH = 60
SHARED = (
    *("classes", "caption_sources", "image_size", "resize", "image_rules", "flipped", "dtype"),
    *("latent_shape", "deterministic"),
)

Rows = list[tuple[str, str]]
"""Names and values of a printed table."""


def inspect_shards(config: InspectConfig) -> None:
    """Print a table of the first samples and, with `grid`, decode them into one PNG file.

    Raises ShardError for a sample that contradicts the manifest, and UserError when the
    autoencoder for the pictures is not the one that made the latents.
    """
    manifest = read_manifest(config.url)
    samples = list(islice(_read_all(config.url, manifest), config.num_samples))
    for sample in samples:
        for problem in _sample_problems(sample, manifest):
            raise ShardError(f"{config.url}: {sample.key}.{problem}; encode again")
    _print_rows(_recipe_rows(manifest))
    sys.stdout.write(f"{'image':>12} {'size':>11} {'mean':>7} {'std':>6}  shows\n")
    for sample in samples:
        metadata = sample.metadata
        mean = sample.moments[: manifest.latent_shape[0]].astype(np.float64)
        size = f"{metadata.width}x{metadata.height}"
        if sample.label is None:
            caption = metadata.captions[0].strip()
            shows = f"{len(metadata.captions)}: {shorten(caption, CAPTION_WIDTH)}"
        else:
            shows = shorten(manifest.classes[sample.label])
        sys.stdout.write(
            f"{shorten(metadata.image_id):>12} {size:>11} {mean.mean():>7.3f} {mean.std():>6.3f}  "
            f"{shows}\n"
        )
    if config.grid:
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


def _read_all(url: str, manifest: Manifest) -> Iterator[LatentSample]:
    files = storage.list_states(url)
    for entry in manifest.shards:
        check_files(url, files, entry)
        with open_shard(url, entry) as folder:
            yield from read_samples(folder / f"{entry.name}.tar")


def stats(config: ShardsConfig) -> None:
    """Print counts, captions per image or class sizes, latent statistics, and bytes.

    Reads only the manifest and the indexes. Raises ShardError for a damaged index.
    """
    manifest = read_manifest(config.url)
    counts, tokens, sources = totals = Counter[int](), Counter[int](), Counter[int]()

    def count(entry: ShardEntry) -> list[Counter[int]]:
        index = read_index(config.url, manifest, entry)
        of_images = index.label if manifest.classes else np.diff(index.first_caption)
        return list(map(_count, (of_images, index.context[:, 1], index.source)))

    with ThreadPoolExecutor(config.num_workers) as pool:
        for found in pool.map(count, manifest.shards):
            for total, added in zip(totals, found, strict=True):
                total.update(added)
    if manifest.classes:
        per_class = Counter(counts[label] for label in range(len(manifest.classes)))
        shows = [("classes", f"{len(manifest.classes):,}; {_range(per_class)} images per class")]
    else:
        shows = [("captions", f"{manifest.num_captions:,}; {_range(counts)} per image")]
    for number, name in enumerate(manifest.caption_sources):
        shows.append(("", f"{sources[number]:,} of source {shorten(name)}"))
    if text := manifest.text:
        num_bytes = text.bytes_per_token * _mean(tokens)
        shows.append(("contexts", f"{_range(tokens)} tokens, {num_bytes:,.0f} bytes per caption"))
    _print_rows(
        [
            ("images", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards"),
            *shows,
            *_recipe_rows(manifest),
            ("latent mean", f"{manifest.latent_mean:.5f}"),
            ("latent std", f"{manifest.latent_std:.5f}"),
            ("scaling factor", f"{manifest.scaling_factor:.5f}"),
            ("channel means", " ".join(f"{mean:.5f}" for mean in manifest.channel_mean)),
            ("channel stds", " ".join(f"{std:.5f}" for std in manifest.channel_std)),
            ("bytes", f"{sum(entry.num_bytes for entry in manifest.shards):,}"),
        ]
    )


def _count(values: Array) -> Counter[int]:
    found, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _range(counts: Counter[int]) -> str:
    return f"{min(counts)} to {max(counts)}, mean {_mean(counts):.2f}"


def _mean(counts: Counter[int]) -> float:
    return sum(value * count for value, count in counts.items()) / counts.total()


def _print_rows(rows: Rows) -> None:
    sys.stdout.writelines(f"{name:<16} {printable(value)}\n" for name, value in rows)


def _recipe_rows(manifest: Manifest) -> Rows:
    rows = [("autoencoder", f"{manifest.vae.name} ({manifest.vae.sha256[:12]})")]
    stored = "latents" if manifest.deterministic else "moments"
    stored += f" {'x'.join(map(str, manifest.moments_shape))}"
    if text := manifest.text:
        rows.append(("text encoder", f"{text.encoder.name} ({text.encoder.sha256[:12]})"))
        settings = text.encoder.settings
        rows.append(("", ", ".join(f"{key} {value}" for key, value in vars(settings).items())))
        most = "" if settings.keeps_padding else "up to "
        stored += f", context {most}{'x'.join(map(str, text.context_shape))}"
        stored += " int8" if text.dtype == "int8" else ""
    if features := manifest.features:
        rows.append(("image encoder", f"{features.encoder.name} ({features.encoder.sha256[:12]})"))
        stored += f", features {'x'.join(map(str, features.shape))}"
    if manifest.flipped:
        stored += ", horizontal flips"
    return [
        *rows,
        ("image", f"{manifest.image_size} px, {manifest.resize}, {manifest.image_rules}"),
        ("stored", f"{stored}, {manifest.dtype}"),
    ]


def verify(config: ShardsConfig) -> None:
    """Print every problem of the dataset on one line. Raises UserError with their number."""
    manifest = read_manifest(config.url)
    problems = []
    try:
        null_context = read_null_context(config.url, manifest)
        if null_context is not None and not np.isfinite(null_context).all():
            problems.append(f"{config.url}/{NULL_CONTEXT}: values are not finite; encode again")
    except StoreError:
        raise
    except UserError as error:
        problems.append(str(error))
    check = partial(_verify_shard, config.url, manifest, storage.list_states(config.url))
    with ThreadPoolExecutor(config.num_workers) as pool:
        found = pool.map(check, manifest.shards)
        for of_shard in tqdm(found, desc="verify", total=len(manifest.shards), unit="shard"):
            problems += of_shard
    if problems:
        sys.stdout.writelines(f"{printable(problem)}\n" for problem in problems)
        raise UserError(f"{config.url}: {len(problems)} problems, listed above")
    sys.stdout.write(
        f"{config.url}: {len(manifest.shards):,} shards, {manifest.contents}: every hash, shape "
        "and count is right\n"
    )


def _verify_shard(
    url: str, manifest: Manifest, files: Mapping[str, storage.FileState | None], entry: ShardEntry
) -> list[str]:
    index, problems = None, []
    try:
        check_files(url, files, entry)
    except ShardError as error:
        return [str(error)]
    with open_shard(url, entry) as folder:
        try:
            index = read_index(folder, manifest, entry)
        except ShardError as error:
            problems.append(str(error))
        try:
            path = folder / f"{entry.name}.tar"
            problems += _tar_problems(path, entry, manifest, index)
        except ShardError as error:
            problems.append(str(error))  # what comes after this place cannot be checked
    return [problem.replace(str(folder), url) for problem in problems]


def _tar_problems(
    path: Path, entry: ShardEntry, manifest: Manifest, index: ShardIndex | None
) -> Iterator[str]:
    if storage.sha256_of(path) != entry.sha256:
        yield f"{path}: content does not match the manifest's sha256; {remedy_for(entry)}"
        return  # further problems of a damaged tar would only be consequences
    rebuilt = index_tar(path)  # raises ShardError for arrays that do not belong together
    if index is not None and index_bytes(index) != index_bytes(rebuilt):
        yield f"{path}: index does not point to the members; {remedy_for(entry)}"
    # The hash is right, so the program that wrote the tar is to blame for the problems below.
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
    text = manifest.text
    image = (manifest.dtype, manifest.moments_shape)
    feature = (FEATURE_DTYPE, manifest.features.shape) if manifest.features else None
    # Number format and shape of each array; () where the captions decide the shape.
    wanted: dict[str, tuple[str, tuple[int, ...]] | None] = {
        "moments": image,
        "flipped": image if manifest.flipped else None,
        "features": feature,
        "flipped_features": feature if manifest.flipped else None,
        "context": (text.dtype, ()) if text else None,
        "context_lengths": ("int32", ()) if text else None,
        "context_scale": ("float32", ()) if text and text.dtype == "int8" else None,
    }
    for field, form in wanted.items():
        array: Array | None = getattr(sample, field)
        if array is None or form is None:
            if (array is None) != (form is None):
                state = "missing" if array is None else "present"
                yield f"{field}.npy is {state}, contrary to the manifest"
            continue
        dtype, shape = form
        if array.dtype != dtype or array.shape != (shape or array.shape):
            yield f"{field}.npy is {array.dtype} {array.shape}, not {dtype} {shape or ''}".rstrip()
        if not np.isfinite(array).all():
            yield f"{field}.npy has values that are not finite"
    if text:
        yield from _context_problems(sample, text, manifest.dtype)
    num_captions, labels = len(sample.metadata.captions), range(len(manifest.classes))
    if sample.label not in (labels or [None]):
        yield f"cls is {sample.label}, but there are {len(labels)} classes"
    if bool(labels) != (num_captions == 0):
        yield f"json has {num_captions} captions, contrary to the manifest"
    if not labels and bool(sample.metadata.sources) != bool(manifest.caption_sources):
        yield "json has or lacks sources of captions, contrary to the manifest"


def _context_problems(sample: LatentSample, text: TextEncoding, dtype: str) -> Iterator[str]:
    context, lengths, scale = sample.context, sample.context_lengths, sample.context_scale
    if context is not None and context.shape[1] != text.context_shape[1]:
        yield f"context.npy has tokens of width {context.shape[1]}"
    if lengths is not None and not all(map(text.allows, lengths.tolist())):
        yield f"context_lengths.npy is not what contexts of shape {text.context_shape} have"
    if context is not None and scale is not None:
        with np.errstate(over="ignore"):
            tokens = np.multiply(context, scale[:, None], dtype=np.float32).astype(dtype)
        if (scale < 0).any() or not np.isfinite(tokens).all():
            yield f"context_scale.npy has values below 0 or too large for {dtype}"


def merge(config: MergeConfig) -> None:
    """Copy all shards, check the hash of each, and write the combined manifest last.

    Raises UserError for fewer than two datasets, for datasets that were encoded differently, for a
    shard that occurs twice, and when the output already contains a dataset.
    """
    if len(config.urls) < 2:
        raise UserError("urls: name at least two datasets to merge")
    if storage.exists(storage.join(config.output, MANIFEST)):
        raise UserError(f"{config.output}: already contains a dataset; choose another output")
    if storage.list_names(storage.join(config.output, COMPLETED)):
        raise UserError(f"{config.output}: holds shards of an encode job; choose another output")
    manifests = [read_manifest(url) for url in config.urls]
    _check_alike(config.urls, manifests)
    sources = [
        (url, entry)
        for url, manifest in zip(config.urls, manifests, strict=True)
        for entry in manifest.shards
    ]
    check_unique(sources)
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


def _check_alike(urls: list[str], manifests: list[Manifest]) -> None:
    """Raise UserError unless the datasets share all properties of their encoding."""

    def properties(manifest: Manifest) -> dict[str, object]:
        text, features = manifest.text, manifest.features
        return {key: getattr(manifest, key) for key in SHARED} | {
            "vae": manifest.vae.sha256,
            "text_encoder": text and (text.encoder.sha256, text.encoder.settings, text.dtype),
            "null_context": text and text.null_context_sha256,  # also shows another precision
            "image_encoder": features and (features.encoder.sha256, features.shape),
        }

    first = properties(manifests[0])
    for url, manifest in zip(urls, manifests, strict=True):
        wrong = [key for key, value in properties(manifest).items() if value != first[key]]
        if wrong:
            raise UserError(
                f"{url}: cannot be merged with {urls[0]}, they differ in {', '.join(wrong)}"
            )


def check_unique(entries: list[tuple[str, ShardEntry]]) -> None:
    """Raise UserError if a shard that contains images occurs twice."""
    counts = Counter(entry.sha256 for _, entry in entries if entry.num_samples)
    first = next((entry.sha256 for _, entry in entries if counts[entry.sha256] > 1), None)
    twice = [f"{url}/{entry.name}.tar" for url, entry in entries if entry.sha256 == first]
    if twice:
        raise UserError(f"{twice[0]} and {twice[1]}: the same shard; its images would count twice")


def _copy(source: str, target: str, sha256: str) -> None:
    """Copy a file, and check its hash on the way; damaged files are not copied."""
    with storage.write_file(target) as path:
        storage.download(source, path, sha256)


def _combine(manifests: list[Manifest], shards: list[ShardEntry]) -> Manifest:
    """Build the manifest of all shards, with the statistics of all their latents."""
    sums = LatentSums()
    for manifest in manifests:
        count, mean = manifest.num_samples, np.array(manifest.channel_mean)
        squares = np.array(manifest.channel_std) ** 2 + mean**2
        first, second = (tuple((count * values).tolist()) for values in (mean, squares))
        sums += LatentSums(count=count, first=first, second=second)
    return replace(
        manifests[0],
        num_samples=sum(manifest.num_samples for manifest in manifests),
        num_captions=sum(manifest.num_captions for manifest in manifests),
        shards=tuple(shards),
        **sums.statistics(),
    )
