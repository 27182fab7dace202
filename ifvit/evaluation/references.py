"""Real images that samples are compared with: from a folder, or as features in a file.

`ifvit evaluate --make_reference` writes the file; `measure` opens either kind. `sample_set` shows
the real image of each caption.
"""

import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ifvit import storage
from ifvit.distributed import ProcessGroup, choose_device, open_process_group, show_progress
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.evaluation.features import (
    FeatureSet,
    Networks,
    choose_parts,
    collect_features,
    load_networks,
)
from ifvit.evaluation.metrics import FeatureStatistics
from ifvit.images import IMAGE_SUFFIXES, Pixels, read_square
from ifvit.shards.format import RESIZE

_NUM_READERS = 8
_REMEDY = "make another with ifvit evaluate --make_reference"


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Real images in a folder; `sha256` is their `hash_images`."""

    paths: Sequence[Path]
    image_size: int
    batch_size: int
    sha256: str

    @property
    def num_images(self) -> int:
        """Number of real images."""
        return len(self.paths)

    def load_features(self, networks: Networks, group: ProcessGroup) -> dict[str, FeatureSet]:
        """Embed the images, a partition on each process; all processes call this together."""
        world = group.world
        positions = range(len(self.paths))[world.rank :: world.size]
        paths = [self.paths[position] for position in positions]
        batches = show_progress(
            read_batches(paths, self.image_size, self.batch_size),
            len(paths),
            "embed real images",
            world,
        )
        parts = choose_parts(len(self.paths))
        return collect_features(
            networks.functions, batches, positions, parts, networks.device, group
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """Features of real images in an .npz file that `make_reference` wrote."""

    url: str
    arrays: Mapping[str, Any]
    num_images: int
    sha256: str

    def load_features(self, networks: Networks, group: ProcessGroup) -> dict[str, FeatureSet]:
        """Read the features. Raises UserError for a damaged file."""
        try:
            return {name: self._read(name) for name in networks.identities}
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.url}: damaged ({error}); {_REMEDY}") from None

    def _read(self, name: str) -> FeatureSet:
        statistics = FeatureStatistics(
            num_samples=self.num_images,
            mean=self.arrays[f"{name}.mean"],
            covariance=self.arrays[f"{name}.covariance"],
        )
        return FeatureSet(statistics=statistics, part=self.arrays[f"{name}.part"])


def make_reference(config: MakeReferenceConfig) -> None:
    """The verb `evaluate --make_reference`: write the features of a folder of real images.

    Raises UserError for a folder without images or with one that cannot be read.
    """
    networks = load_networks(config.protocol, choose_device(config.device))
    with open_process_group() as group:
        folder = _open_folder(
            config.images, config.image_size, config.protocol.sampling.batch_size, group
        )
        features = folder.load_features(networks, group)
        if group.world.is_main:
            _write(config.output, folder, features, networks)
            sys.stdout.write(
                f"{config.output}: {folder.num_images} images, sha256 {folder.sha256}\n"
            )


def open_reference(
    config: EvaluateConfig, image_size: int, networks: Networks, group: ProcessGroup
) -> ImageFolder | ReferenceFile | None:
    """The real images that the recipe names, if any; all processes call this together.

    Raises UserError for a file of other images or networks, and a folder without images.
    """
    if config.reference:
        return _open_file(config.reference, image_size, networks)
    if config.images:
        return _open_folder(config.images, image_size, config.protocol.sampling.batch_size, group)
    return None


def _open_folder(folder: str, image_size: int, batch_size: int, group: ProcessGroup) -> ImageFolder:
    paths = list_images(folder)
    digest = hash_images(paths, image_size, RESIZE, group)
    return ImageFolder(paths=paths, image_size=image_size, batch_size=batch_size, sha256=digest)


def _write(
    url: str, folder: ImageFolder, features: Mapping[str, FeatureSet], networks: Networks
) -> None:
    arrays: dict[str, object] = {
        "num_images": folder.num_images,
        "images_sha256": folder.sha256,
        "image_size": folder.image_size,
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


def _open_file(url: str, image_size: int, networks: Networks) -> ReferenceFile:
    try:
        arrays = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
        found_size, num_images = int(arrays["image_size"]), int(arrays["num_images"])
        digest = str(arrays["images_sha256"])
        encoders = {name: str(arrays.get(f"{name}.sha256")) for name in networks.identities}
    except (KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{url}: not a reference file ({error}); {_REMEDY}") from None
    if found_size != image_size:
        raise UserError(
            f"{url}: its images have {found_size} pixels, those of the shards {image_size}; "
            f"{_REMEDY}"
        )
    for name, identity in networks.identities.items():
        if encoders[name] != identity.sha256:
            raise UserError(f"{url}: no features by {name} {identity.name}; {_REMEDY}")
    return ReferenceFile(url=url, arrays=arrays, num_images=num_images, sha256=digest)


def list_images(folder: str) -> list[Path]:
    """The image files in a local folder and its class folders, sorted by name.

    Raises UserError if there are fewer than 2.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images {folder}: no such folder; name one with real images")
    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if len(paths) < 2:
        raise UserError(f"images {folder}: has {len(paths)} images; a distance needs two or more")
    return paths


def find_image(paths: Sequence[Path], image_id: int | str) -> Path | None:
    """The file of an image id: of COCO's 42, COCO_val2014_000000000042.jpg or 000000000042.jpg."""
    if isinstance(image_id, int):
        return next((path for path in paths if path.stem.endswith(f"{image_id:012d}")), None)
    ending = f"/{Path(image_id).with_suffix('')}"
    return next((path for path in paths if str(path.with_suffix("")).endswith(ending)), None)


def read_real_image(path: Path, image_size: int) -> Pixels:
    """Pixels (image_size, image_size, 3). Raises UserError naming a file that cannot be read."""
    try:
        return read_square(path, image_size).pixels
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or delete it") from None


def read_batches(paths: Sequence[Path], image_size: int, batch_size: int) -> Iterator[Pixels]:
    """The images in order, in batches (B, image_size, image_size, 3), read by several threads."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            yield np.stack(list(pool.map(read_real_image, batch, repeat(image_size))))


def hash_images(paths: Sequence[Path], image_size: int, resize: str, group: ProcessGroup) -> str:
    """SHA-256 of the contents of the files, in order, and of how they become pixels.

    The features are not hashed, because their last bits differ between machines. Each process
    hashes a partition of the files.
    """
    world = group.world
    partition = tqdm(
        paths[world.rank :: world.size],
        unit="image",
        desc="hash real images",
        leave=False,
        disable=not world.is_main,
    )
    digests = group.gather([storage.sha256_of(path) for path in partition])
    total = hashlib.sha256(f"{resize} {image_size}".encode())
    for position in range(len(paths)):
        total.update(digests[position % world.size][position // world.size].encode())
    return total.hexdigest()
