"""Features of real images: from a folder, or from the file that was made of one.

The file is a NumPy .npz without pickles. Of each network `clip` and `inception` it holds NAME.mean
(F,), NAME.covariance (F, F), NAME.part (n, F) float32 in random order, NAME.encoder and
NAME.sha256; of the images num_images, image_size, resize and images_sha256.
"""

import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ifvit import storage
from ifvit.device import choose_device
from ifvit.errors import UserError
from ifvit.evaluation.config import MakeReferenceConfig, MeasureConfig
from ifvit.evaluation.feature_sets import FeatureSet, collect_features
from ifvit.evaluation.frechet import FeatureStatistics
from ifvit.evaluation.networks import Networks, kept_parts, load_networks
from ifvit.evaluation.progress import show_progress
from ifvit.evaluation.references import hash_images, list_images, read_batches
from ifvit.shards.records import RESIZE
from ifvit.side_channel import SideChannel, open_channel


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that drawn ones are compared with, known before their features are."""

    num_images: int
    sha256: str
    """Of the images' files and their resize, see `hash_images`."""
    load: Callable[[], Mapping[str, FeatureSet]]
    """Called once, by all processes together."""

    @cached_property
    def features(self) -> Mapping[str, FeatureSet]:
        """By name of the network."""
        return self.load()


def make_reference(config: MakeReferenceConfig) -> None:
    """The verb `evaluate --make_reference`: a folder of real images => a file.

    Raises UserError for a folder without images, or one that is broken.
    """
    networks = load_networks(config.protocol, choose_device(config.device))
    batch_size = config.protocol.sampling.batch_size
    with open_channel() as channel:
        reference = _of_images(
            list_images(config.images), config.image_size, batch_size, networks, channel
        )
        features = reference.features
        if channel.world.is_main:
            _write(config.output, reference, features, networks, config.image_size)
            sys.stdout.write(
                f"{config.output}: {reference.num_images} images, sha256 {reference.sha256}\n"
            )


def open_reference(
    config: MeasureConfig, image_size: int, networks: Networks, channel: SideChannel
) -> Reference | None:
    """What the recipe names, if anything. Raises UserError for what does not fit."""
    if config.reference:
        return _read(config.reference, image_size, networks)
    if config.images:
        paths, batch_size = list_images(config.images), config.protocol.sampling.batch_size
        return _of_images(paths, image_size, batch_size, networks, channel)
    return None


def _of_images(
    paths: list[Path], image_size: int, batch_size: int, networks: Networks, channel: SideChannel
) -> Reference:
    """Embedded when first asked for, a share by every process."""

    def load() -> dict[str, FeatureSet]:
        world = channel.world
        positions = range(len(paths))[world.rank :: world.size]
        batches = read_batches([paths[position] for position in positions], image_size, batch_size)
        shown = show_progress(batches, len(positions), "embed real images", world)
        parts = kept_parts(len(paths))
        return collect_features(
            networks.functions, shown, positions, parts, networks.device, channel
        )

    digest = hash_images(paths, image_size, RESIZE, channel)
    return Reference(num_images=len(paths), sha256=digest, load=load)


def _write(
    url: str,
    reference: Reference,
    features: Mapping[str, FeatureSet],
    networks: Networks,
    image_size: int,
) -> None:
    arrays: dict[str, object] = {
        "num_images": reference.num_images,
        "images_sha256": reference.sha256,
        "image_size": image_size,
        "resize": RESIZE,
    }
    for name, found in features.items():
        arrays |= {
            f"{name}.mean": found.statistics.mean,
            f"{name}.covariance": found.statistics.covariance,
            f"{name}.part": found.part,
            f"{name}.encoder": networks.identities[name].name,
            f"{name}.sha256": networks.identities[name].sha256,
        }
    with storage.write_file(url) as path, path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numbers and strings become arrays


def _read(url: str, image_size: int, networks: Networks) -> Reference:
    """Raises UserError for another file, other networks or another image size than wanted."""
    try:
        file = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
        found_size, num_images = int(file["image_size"]), int(file["num_images"])
        digest = str(file["images_sha256"])
        encoders = {name: str(file.get(f"{name}.sha256")) for name in networks.identities}
    except (KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{url}: not a reference ({error}); make it with ifvit evaluate --make_reference"
        ) from None
    remedy = "make another with ifvit evaluate --make_reference"
    if found_size != image_size:
        raise UserError(
            f"{url}: of images of {found_size}, the shards' have {image_size}; {remedy}"
        )
    for name, identity in networks.identities.items():
        if encoders[name] != identity.sha256:
            raise UserError(f"{url}: no features by {name} {identity.name}; {remedy}")

    def load() -> dict[str, FeatureSet]:
        try:
            return {name: _feature_set(file, name, num_images) for name in networks.identities}
        except zipfile.BadZipFile as error:
            raise UserError(f"{url}: damaged ({error}); {remedy}") from None

    return Reference(num_images=num_images, sha256=digest, load=load)


def _feature_set(file: Mapping[str, Any], name: str, num_images: int) -> FeatureSet:
    statistics = FeatureStatistics(
        num_samples=num_images, mean=file[f"{name}.mean"], covariance=file[f"{name}.covariance"]
    )
    return FeatureSet(statistics=statistics, part=file[f"{name}.part"])
