"""Real images that samples are compared with: from a folder, or as features in a file.

`ifvit evaluate --make_reference` writes the file.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ifvit import storage
from ifvit.arrays import Array, parse_npz
from ifvit.distributed import ProcessGroup, choose_device, open_process_group, show_progress
from ifvit.errors import UserError
from ifvit.evaluation.config import MakeReferenceConfig
from ifvit.evaluation.features import (
    NUM_KEPT,
    FeatureSet,
    Networks,
    choose_parts,
    collect_features,
    load_networks,
)
from ifvit.evaluation.metrics import FeatureStatistics
from ifvit.image_rules import ImageRules
from ifvit.images import BYTES_PER_PIXEL, IMAGE_SUFFIXES, MAX_MEGAPIXELS, Pixels, read_square
from ifvit.records import PositiveInt, Sha256, parse_value, path_inside, record, shorten
from ifvit.sampling.samples import batched
from ifvit.shards.format import RESIZE

_NUM_READERS = 8
_MAX_BYTES = 1 << 30
"""Largest file of reference features; 30,000 CLIP and 10,000 Inception features take 0.2 GB."""
_REMEDY = "make another with ifvit evaluate --make_reference"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that samples are compared with; `sha256` is their `RealImages.hash`."""

    num_images: int
    sha256: str
    features: Callable[[], Mapping[str, FeatureSet]]
    """Features by network, from a file or computed when they are called for."""


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Files of real images, and how they become square pixels."""

    paths: Sequence[Path]
    image_size: int
    rules: ImageRules

    def read(self, path: Path) -> Pixels:
        """Pixels (image_size, image_size, 3). Raises UserError naming a file that is no image."""
        data = storage.read_bytes(str(path), MAX_MEGAPIXELS * BYTES_PER_PIXEL * 1_000_000)
        try:
            return read_square(data, self.image_size, self.rules).pixels
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def find(self, image_id: int | str) -> Path | None:
        """Find the file of an image id.

        COCO's 42 is COCO_val2014_000000000042.jpg or 000000000042.jpg. None if no file fits.
        """
        if isinstance(image_id, int):
            ending = f"{image_id:012d}"
            return next((path for path in self.paths if path.stem.endswith(ending)), None)
        ending = "/" + re.sub(r"\.[^./]*$", "", image_id)
        return next(
            (path for path in self.paths if str(path.with_suffix("")).endswith(ending)), None
        )

    def hash(self, group: ProcessGroup) -> str:
        """SHA-256 of the contents of the files, in order, and of how they become pixels.

        The features are not hashed, because their last bits differ between machines. Each process
        hashes a partition of the files.
        """
        world = group.world
        hidden, partition = not world.is_main, self.paths[world.rank :: world.size]
        shown = tqdm(partition, "hash real images", unit="image", leave=False, disable=hidden)
        # Larger files are no images.
        contents = (storage.read_bytes(str(path), 4_000_000 * MAX_MEGAPIXELS) for path in shown)
        digests = group.gather([hashlib.sha256(content).hexdigest() for content in contents])
        total = hashlib.sha256(f"{RESIZE} {self.image_size} {self.rules}".encode())
        for position in range(len(self.paths)):
            total.update(digests[position % world.size][position // world.size].encode())
        return total.hexdigest()

    def embed(
        self, networks: Networks, batch_size: int, group: ProcessGroup
    ) -> dict[str, FeatureSet]:
        """Embed a partition of the images on each process; all processes call this together."""
        world, total = group.world, len(self.paths)
        positions = range(total)[world.rank :: world.size]
        batches = self._read_batches([self.paths[position] for position in positions], batch_size)
        shown = show_progress(batches, len(positions), "embed real images", world)
        return collect_features(networks, shown, positions, choose_parts(total), group)

    def _read_batches(self, paths: Sequence[Path], batch_size: int) -> Iterator[Pixels]:
        """Batches (B, image_size, image_size, 3) in order, read by several threads."""
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for batch in batched(paths, batch_size):
                yield np.stack(list(pool.map(self.read, batch)))


def list_images(folder: str) -> list[Path]:
    """The image files in a local folder and its class folders, sorted by name.

    Hidden files and folders do not count, nor do the grid and the real images that `evaluate`
    writes beside its samples. Raises UserError if there are fewer than 2, and for a symbolic link
    that leads out of the folder or to a folder, which is not followed.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images {folder}: no such folder; name one with real images")
    paths = sorted(path for path in Path(folder).rglob("*") if _is_real_image(Path(folder), path))
    if len(paths) < 2:
        raise UserError(f"images {folder}: has {len(paths)} images; a distance needs two or more")
    return paths


def _is_real_image(folder: Path, path: Path) -> bool:
    name = path.relative_to(folder)
    is_hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    if path.is_symlink() and path.is_dir() and not is_hidden:
        raise UserError(f"{path}: a link to a folder; put the folder itself there")
    if is_hidden or path.suffix.lower() not in IMAGE_SUFFIXES:
        return False
    is_overview = path.name == "grid.png" or path.name.startswith("real_")
    if is_overview and path.with_name("samples.jsonl").exists():
        return False
    return path_inside(folder, name.as_posix()).is_file()


def make_reference(config: MakeReferenceConfig) -> None:
    """The verb `evaluate --make_reference`: write the features of a folder of real images.

    Raises UserError for a folder without images or with one that cannot be read.
    """
    networks = load_networks(config.protocol, choose_device(config.device))
    paths = list_images(config.images)
    images = RealImages(paths=paths, image_size=config.image_size, rules=config.image_rules)
    with open_process_group() as group:
        digest = images.hash(group)
        features = images.embed(networks, config.protocol.sampling.batch_size, group)
        if not group.world.is_main:
            return
        arrays: dict[str, object] = {
            "num_images": len(paths),
            "images_sha256": digest,
            "image_size": config.image_size,
            "resize": RESIZE,
            "image_rules": str(config.image_rules),
        }
        for name, found in features.items():
            arrays |= {
                f"{name}.mean": found.statistics.mean,
                f"{name}.covariance": found.statistics.covariance,
                f"{name}.part": found.part,
                f"{name}.encoder": networks.features[name].identity.name,
                f"{name}.sha256": networks.features[name].identity.sha256,
            }
        with storage.write_file(config.output) as path, path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numbers, strings become arrays
        sys.stdout.write(f"{config.output}: {len(paths)} images, sha256 {digest}\n")


@record
class _Facts:
    """What a file of features says about its images."""

    num_images: PositiveInt
    images_sha256: Sha256
    image_size: PositiveInt
    resize: str
    image_rules: str


def read_reference(url: str, image_size: int, rules: ImageRules, networks: Networks) -> Reference:
    """Read a file that `make_reference` wrote.

    Raises UserError for a file of other sizes, rules or networks, or one that is damaged.
    """
    arrays = parse_npz(storage.read_bytes(url, _MAX_BYTES), url, max_bytes=_MAX_BYTES)
    stored = {name: array.item() for name, array in arrays.items() if array.shape == ()}
    own = {name: stored[name] for name in _Facts.__annotations__ if name in stored}
    facts = parse_value(_Facts, own, f"{url}: damaged or not a reference file")
    if facts.image_size != image_size:
        raise UserError(
            f"{url}: its images have {facts.image_size} pixels, those of the shards {image_size}; "
            f"{_REMEDY}"
        )
    if facts.image_rules != str(rules):
        raise UserError(
            f"{url}: its images were read with {shorten(facts.image_rules, 200)}, those of the "
            f"shards with {rules}; {_REMEDY} and the same --image_rules"
        )
    for name, network in networks.features.items():
        if stored.get(f"{name}.sha256") != network.identity.sha256:
            raise UserError(f"{url}: no features by {name} {network.identity.name}; {_REMEDY}")
    features = {
        name: _parse_features(arrays, name, facts.num_images, url) for name in networks.features
    }
    return Reference(
        num_images=facts.num_images, sha256=facts.images_sha256, features=lambda: features
    )


def _parse_features(
    arrays: Mapping[str, Array], name: str, num_images: int, where: str
) -> FeatureSet:
    """Check the arrays of one network. Raises UserError for statistics that no images have."""
    found = [arrays.get(f"{name}.{key}", np.zeros(0)) for key in ("mean", "covariance", "part")]
    mean, covariance, part = found
    num_kept = min(num_images, NUM_KEPT[name])
    is_whole = (
        num_kept > 1
        and mean.ndim == 1
        and (covariance.shape, part.shape) == (mean.shape * 2, (num_kept, *mean.shape))
        and all(array.dtype.kind == "f" and np.isfinite(array).all() for array in found)
        and np.diagonal(covariance).min(initial=0) >= 0
        and np.allclose(
            covariance, covariance.T, rtol=1e-6, atol=1e-9 * np.abs(covariance).max(initial=0)
        )
    )
    if not is_whole:
        raise UserError(f"{where}: {name} features are damaged; {_REMEDY}")
    statistics = FeatureStatistics(
        num_samples=num_images, mean=mean, scatter=covariance * (num_images - 1)
    )
    return FeatureSet(statistics=statistics, part=part)
