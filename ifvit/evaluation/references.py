"""Real images that samples are compared with: from a folder, or as features in a file.

`ifvit evaluate --make_reference` writes the file; `measure` opens either kind. `sample_set` shows
the real image of each caption.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
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
from ifvit.images import IMAGE_SUFFIXES, MAX_MEGAPIXELS, Pixels, read_square
from ifvit.records import PositiveInt, Sha256, parse_value, path_inside, record, shorten
from ifvit.sampling.samples import batched
from ifvit.shards.format import RESIZE

_NUM_READERS = 8
_MAX_BYTES = 1 << 30
"""Largest file of reference features; 30,000 CLIP and 10,000 Inception features take 0.2 GB."""
_REMEDY = "make another with ifvit evaluate --make_reference"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that samples are compared with; `sha256` is their `hash_images`."""

    num_images: int
    sha256: str
    features: Mapping[str, FeatureSet] | None
    """Features by network, as stored in a file; None: the images are not embedded yet."""


def make_reference(config: MakeReferenceConfig) -> None:
    """The verb `evaluate --make_reference`: write the features of a folder of real images.

    Raises UserError for a folder without images or with one that cannot be read.
    """
    networks = load_networks(config.protocol, choose_device(config.device))
    paths, size, rules = list_images(config.images), config.image_size, config.image_rules
    with open_process_group() as group:
        digest = hash_images(paths, size, rules, group)
        batch_size = config.protocol.sampling.batch_size
        features = embed_real_images(paths, size, rules, batch_size, networks, group)
        if not group.world.is_main:
            return
        arrays: dict[str, object] = {
            "num_images": len(paths),
            "images_sha256": digest,
            "image_size": size,
            "resize": RESIZE,
            "image_rules": str(rules),
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
    return Reference(num_images=facts.num_images, sha256=facts.images_sha256, features=features)


def _parse_features(
    arrays: Mapping[str, Array], name: str, num_images: int, where: str
) -> FeatureSet:
    """Check the arrays of one network. Raises UserError for statistics that no images have."""
    nothing = np.zeros(0)
    mean, covariance, part = (
        arrays.get(f"{name}.{key}", nothing) for key in ("mean", "covariance", "part")
    )
    num_kept = min(num_images, NUM_KEPT[name])
    shapes = mean.shape * 2, (num_kept, *mean.shape)
    if (
        num_kept < 2
        or mean.ndim != 1
        or (covariance.shape, part.shape) != shapes
        or not all(array.dtype.kind == "f" for array in (mean, covariance, part))
        or not all(np.isfinite(array).all() for array in (mean, covariance, part))
        or not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9 * _largest(covariance))
        or np.diagonal(covariance).min(initial=0) < 0
    ):
        raise UserError(f"{where}: {name} features are damaged; {_REMEDY}")
    return FeatureSet(
        statistics=FeatureStatistics(num_samples=num_images, mean=mean, covariance=covariance),
        part=part,
    )


def _largest(values: NDArray[np.floating]) -> float:
    return float(np.abs(values).max(initial=0))


def embed_real_images(
    paths: Sequence[Path],
    image_size: int,
    rules: ImageRules,
    batch_size: int,
    networks: Networks,
    group: ProcessGroup,
) -> dict[str, FeatureSet]:
    """Embed real images, a partition on each process; all processes call this together."""
    world = group.world
    positions = range(len(paths))[world.rank :: world.size]
    batches = read_batches(paths[world.rank :: world.size], image_size, rules, batch_size)
    shown = show_progress(batches, len(positions), "embed real images", world)
    return collect_features(networks, shown, positions, choose_parts(len(paths)), group)


def list_images(folder: str) -> list[Path]:
    """The image files in a local folder and its class folders, sorted by name.

    Hidden files and folders do not count, nor do the grid and the real images that `evaluate`
    writes beside its samples. Raises UserError if there are fewer than 2, and for a symbolic link
    that leads out of the folder or to a folder, which is not followed.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images {folder}: no such folder; name one with real images")
    paths = sorted(path for path in Path(folder).rglob("*") if _is_reference(Path(folder), path))
    if len(paths) < 2:
        raise UserError(f"images {folder}: has {len(paths)} images; a distance needs two or more")
    return paths


def _is_reference(folder: Path, path: Path) -> bool:
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


def find_image(paths: Sequence[Path], image_id: int | str) -> Path | None:
    """Find the file of an image id.

    COCO's 42 is COCO_val2014_000000000042.jpg or 000000000042.jpg. None if no file fits.
    """
    if isinstance(image_id, int):
        return next((path for path in paths if path.stem.endswith(f"{image_id:012d}")), None)
    ending = "/" + re.sub(r"\.[^./]*$", "", image_id)
    return next((path for path in paths if str(path.with_suffix("")).endswith(ending)), None)


def read_real_image(path: Path, image_size: int, rules: ImageRules) -> Pixels:
    """Pixels (image_size, image_size, 3). Raises UserError naming a file that cannot be read."""
    return read_square(path, image_size, rules).pixels


def read_batches(
    paths: Sequence[Path], image_size: int, rules: ImageRules, batch_size: int
) -> Iterator[Pixels]:
    """The images in order, in batches (B, image_size, image_size, 3), read by several threads."""
    read = partial(read_real_image, image_size=image_size, rules=rules)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for batch in batched(paths, batch_size):
            yield np.stack(list(pool.map(read, batch)))


def hash_images(
    paths: Sequence[Path], image_size: int, rules: ImageRules, group: ProcessGroup
) -> str:
    """SHA-256 of the contents of the files, in order, and of how they become pixels.

    The features are not hashed, because their last bits differ between machines. Each process
    hashes a partition of the files.
    """
    world = group.world
    hidden, partition = not world.is_main, paths[world.rank :: world.size]
    shown = tqdm(partition, "hash real images", unit="image", leave=False, disable=hidden)
    digests = group.gather([_hash_image(path) for path in shown])
    total = hashlib.sha256(f"{RESIZE} {image_size} {rules}".encode())
    for position in range(len(paths)):
        total.update(digests[position % world.size][position // world.size].encode())
    return total.hexdigest()


def _hash_image(path: Path) -> str:
    """SHA-256 of a file that is small enough for an image."""
    data = storage.read_bytes(str(path), 4_000_000 * MAX_MEGAPIXELS)
    return hashlib.sha256(data).hexdigest()
