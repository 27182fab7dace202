"""Show what is in a dataset of shards: totals, the first samples, and what they look like."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.config import InspectConfig, ShardsConfig
from data_pipeline.models import decode_mean
from data_pipeline.read import open_shard, read_samples
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.autoencoder import load_autoencoder
from ifvit.shards import LatentSample, Manifest, ShardEntry, read_manifest
from ifvit.shards.files import read_index
from ifvit.shards.index import ShardIndex
from ifvit.shards.records import parse_metadata

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
