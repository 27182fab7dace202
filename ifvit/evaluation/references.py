"""Reference images: found, cropped and resized, and their features in a file."""

import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ifvit import storage
from ifvit.distributed import ProcessGroup, choose_device, open_process_group, show_progress
from ifvit.errors import UserError
from ifvit.evaluation.config import MakeReferenceConfig, MeasureConfig
from ifvit.evaluation.features import (
    FeatureSet,
    Networks,
    collect_features,
    kept_parts,
    load_networks,
)
from ifvit.evaluation.metrics import FeatureStatistics
from ifvit.images import IMAGE_SUFFIXES, Pixels, read_square
from ifvit.shards.format import RESIZE
from ifvit.storage import sha256_of

_NUM_READERS = 8


def list_images(folder: str) -> list[Path]:
    """The image files in a local folder and its class folders, by name.

    Raises UserError when there are fewer than 2.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images {folder}: no such folder; name one with real images")
    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if len(paths) < 2:
        raise UserError(f"images {folder}: {len(paths)} images in it, a distance needs two or more")
    return paths


def find_image(paths: list[Path], image_id: int | str) -> Path | None:
    """The file of an image id; COCO's 42 is COCO_val2014_000000000042.jpg or 000000000042.jpg."""
    if isinstance(image_id, int):
        return next((path for path in paths if path.stem.endswith(f"{image_id:012d}")), None)
    ending = f"/{Path(image_id).with_suffix('')}"
    return next((path for path in paths if str(path.with_suffix("")).endswith(ending)), None)


def read_reference(path: Path, image_size: int) -> Pixels:
    """Pixels (image_size, image_size, 3). Raises UserError naming a file that is broken."""
    try:
        return read_square(path, image_size).pixels
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or delete it") from None


def read_batches(paths: Sequence[Path], image_size: int, batch_size: int) -> Iterator[Pixels]:
    """All images in order, (B, image_size, image_size, 3) at a time, read by several threads."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            yield np.stack(list(pool.map(read_reference, batch, repeat(image_size))))


def hash_images(paths: Sequence[Path], image_size: int, resize: str, channel: ProcessGroup) -> str:
    """SHA-256 of the files' contents, in order, and of how they become pixels.

    Not of the features, whose last bits differ between machines. Every process hashes a share.
    """
    world = channel.world
    share = tqdm(
        paths[world.rank :: world.size],
        unit="image",
        desc="hash real images",
        leave=False,
        disable=not world.is_main,
    )
    digests = channel.gather([sha256_of(path) for path in share])
    whole = hashlib.sha256(f"{resize} {image_size}".encode())
    for position in range(len(paths)):
        whole.update(digests[position % world.size][position // world.size].encode())
    return whole.hexdigest()


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
    with open_process_group() as channel:
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
    config: MeasureConfig, image_size: int, networks: Networks, channel: ProcessGroup
) -> Reference | None:
    """What the recipe names, if anything. Raises UserError for what does not fit."""
    if config.reference:
        return _read(config.reference, image_size, networks)
    if config.images:
        paths, batch_size = list_images(config.images), config.protocol.sampling.batch_size
        return _of_images(paths, image_size, batch_size, networks, channel)
    return None


def _of_images(
    paths: list[Path], image_size: int, batch_size: int, networks: Networks, channel: ProcessGroup
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
