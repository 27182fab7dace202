"""Real images of the evaluation set, cropped and resized as they were for training."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES, Pixels, read_square
from ifvit.side_channel import SideChannel
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


def hash_images(paths: Sequence[Path], image_size: int, resize: str, channel: SideChannel) -> str:
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
