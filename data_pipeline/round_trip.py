"""The last look at a fresh dataset: are the images in it the images that went in?"""

import sys
from itertools import islice

import numpy as np

from data_pipeline.config import EncodeConfig
from data_pipeline.decode import read_or_fail
from data_pipeline.models import decode_mean
from data_pipeline.read import open_shard, read_samples
from data_pipeline.sources.source import Source
from ifvit.images import DecodedImage, Pixels
from ifvit.models.autoencoder import Autoencoder
from ifvit.shards import Manifest

MOST_IMAGES = 8


def report_round_trip(
    config: EncodeConfig, source: Source, manifest: Manifest, vae: Autoencoder
) -> None:
    """Print the PSNR after image => shard => decoded posterior mean.

    Of one image in a hundred, but at least one and at most 8, the first ones of the first shard.
    """
    num_images = min(MOST_IMAGES, 1 + manifest.num_samples // 100)
    entry = next(entry for entry in manifest.shards if entry.num_samples)
    unit = next(u for u in source.units(config.samples_per_shard) if u.name == entry.name)
    originals = {image.key: image for image in unit.open()}
    values = []
    with open_shard(config.output, entry) as folder:
        for sample in islice(read_samples(folder / f"{entry.name}.tar"), num_images):
            original = read_or_fail(originals[sample.key], config.image_size)
            assert isinstance(original, DecodedImage), original
            values.append(psnr(decode_mean(vae, sample), original.pixels))
    sys.stdout.write(
        f"round trip of {len(values)} images: PSNR {np.mean(values):.1f} dB, "
        f"lowest {min(values):.1f} dB\n"
    )


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, 10 log10(255^2 / MSE)."""
    squares = (first.astype(np.float64) - second) ** 2
    return float(10 * np.log10(255**2 / squares.mean()))
