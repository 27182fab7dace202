"""Show what is in a dataset of shards: totals, the first samples, and what they look like."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data_pipeline.config import InspectConfig, ShardsConfig
from ifvit.errors import UserError
from ifvit.models.autoencoder import load_autoencoder
from ifvit.shards import ShardReader

GRID_COLUMNS = 8
CAPTION_WIDTH = 60


def stats(config: ShardsConfig) -> None:
    """Print a table: counts, caption lengths, latent statistics, bytes by part."""
    reader = ShardReader(config.url)
    manifest = reader.manifest
    lengths: list[int] = []
    json_bytes = 0
    for sample in tqdm(range(len(reader)), desc="stats", unit="img"):
        captions = reader.metadata(sample).captions
        lengths.extend(len(caption.split()) for caption in captions)
        json_bytes += reader.json_bytes(sample)
    counts = [reader.num_captions(sample) for sample in range(len(reader))]
    item = np.dtype(manifest.dtype).itemsize
    moments_bytes = len(reader) * int(np.prod(manifest.moments_shape)) * item
    context_bytes = manifest.num_captions * int(np.prod(reader.text.context_shape)) * item
    total_bytes = sum(entry.num_bytes for entry in manifest.shards)
    other = total_bytes - moments_bytes - context_bytes - json_bytes
    rows = [
        ("images", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards"),
        ("captions", f"{manifest.num_captions:,}; {_spread(counts)} an image"),
        ("words a caption", _spread(lengths)),
        *_recipe_rows(reader),
        ("latent mean", f"{manifest.latent_mean:.5f}"),
        ("latent std", f"{manifest.latent_std:.5f}; scaling factor {manifest.scaling_factor:.5f}"),
        ("bytes", f"{total_bytes:,}"),
        ("  moments", _share(moments_bytes, total_bytes)),
        ("  context", _share(context_bytes, total_bytes)),
        ("  json", _share(json_bytes, total_bytes)),
        ("  headers", _share(other, total_bytes)),
    ]
    sys.stdout.writelines(f"{name:<16} {value}\n" for name, value in rows)


def inspect_shards(config: InspectConfig) -> None:
    """Print a table of the first samples and, if asked, decode them into one PNG.

    Raises UserError when the autoencoder for the picture is not the one that made the latents.
    """
    reader = ShardReader(config.url)
    num_samples = min(config.num_samples, len(reader))
    for name, value in _recipe_rows(reader):
        sys.stdout.write(f"{name:<16} {value}\n")
    sys.stdout.write(f"{'image':>12} {'size':>11} {'mean':>7} {'std':>6}  captions\n")
    for sample in range(num_samples):
        metadata = reader.metadata(sample)
        mean = np.split(reader.moments(sample).astype(np.float64), 2)[0]
        size = f"{metadata.width}x{metadata.height}"
        sys.stdout.write(
            f"{metadata.image_id:>12} {size:>11} {mean.mean():>7.3f} {mean.std():>6.3f}  "
            f"{len(metadata.captions)}: {metadata.captions[0].strip()[:CAPTION_WIDTH]}\n"
        )
    if config.grid:
        draw_grid(reader, num_samples, config.vae or reader.manifest.vae.name, Path(config.grid))


def draw_grid(reader: ShardReader, num_samples: int, vae_name: str, path: Path) -> None:
    """Decode the posterior means of the first samples into a PNG, 8 a row."""
    vae = load_autoencoder(vae_name)
    if vae.identity.sha256 != reader.manifest.vae.sha256:
        raise UserError(
            f"{vae_name}: not the autoencoder that made {reader.url} "
            f"({reader.manifest.vae.name}); name that one with --vae"
        )
    size = reader.manifest.image_size
    columns = min(GRID_COLUMNS, num_samples)
    grid = Image.new("RGB", (columns * size, -(-num_samples // columns) * size), "white")
    for sample in range(num_samples):
        mean = np.split(reader.moments(sample).astype(np.float32), 2)[0]
        with torch.no_grad():
            image = vae.decode(torch.from_numpy(mean)[None])[0]
        pixels = ((image + 1.0) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        place = (sample % columns * size, sample // columns * size)
        grid.paste(Image.fromarray(pixels), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    sys.stdout.write(f"{path}: {num_samples} images decoded from their latents\n")


def _recipe_rows(reader: ShardReader) -> list[tuple[str, str]]:
    manifest, text = reader.manifest, reader.text
    moments = "x".join(map(str, manifest.moments_shape))
    context = "x".join(map(str, text.context_shape))
    return [
        ("autoencoder", f"{manifest.vae.name} ({manifest.vae.sha256[:12]})"),
        ("text encoder", f"{text.encoder.name} ({text.encoder.sha256[:12]})"),
        ("image", f"{manifest.image_size} px, {manifest.resize}"),
        ("stored", f"moments {moments}, context {context}, {manifest.dtype}"),
    ]


def _spread(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}, mean {np.mean(values):.2f}"


def _share(part: int, total: int) -> str:
    return f"{part:,} ({100 * part / total:.1f} %)"
