"""Generated images as files: POSITION.png, settings.json and JSON lines in one folder.

`generate`, `evaluate` and the rating study read and write their images here. Folders are local or
`s3://` URLs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import Pixels, decode_png, encode_png

_NUM_WRITERS = 4
_T = TypeVar("_T")


def batched(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Yield the items in order, `size` at a time; the last batch may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))


def hash_json(value: object) -> str:
    """SHA-256 of `value` as JSON; keys of dicts keep their order."""
    return sha256(json.dumps(value).encode()).hexdigest()


def claim_folder(folder: str, settings: dict[str, Any]) -> None:
    """Write the settings of the folder's images to settings.json, or compare them with that file.

    Raises UserError if the folder holds images of other settings. No image is overwritten.
    """
    url = storage.join(folder, "settings.json")
    if storage.create(url, (json.dumps(settings, indent=2) + "\n").encode()):
        return
    found = storage.read_json(url)
    differing = sorted(key for key in settings if found.get(key) != settings[key])
    if differing:
        raise UserError(
            f"{folder} holds samples of another {', '.join(differing)}; "
            "delete the folder or give another --output"
        )


def missing_images(folder: str, positions: Iterable[int]) -> list[int]:
    """List the positions without a PNG file in the folder."""
    present = set(storage.list_names(folder))
    return [position for position in positions if image_name(position) not in present]


@contextmanager
def open_writer(folder: str, positions: Sequence[int]) -> Iterator[Callable[[Pixels], None]]:
    """Yield a function that writes the next batch of images, one PNG file per position.

    Threads write a batch while the caller generates the next one. An error of writing is raised at
    the next batch or at the end.
    """
    remaining = iter(positions)
    writes: Iterator[None] = iter(())

    def write(batch: Pixels) -> None:
        nonlocal writes
        list(writes)  # wait for the previous batch, and raise its errors
        urls = [image_url(folder, next(remaining)) for _ in batch]
        writes = pool.map(_write_image, urls, batch)
        progress.update(len(batch))

    progress = tqdm(total=len(positions), unit="image", desc="generate", leave=False)
    with progress, ThreadPoolExecutor(_NUM_WRITERS) as pool:
        yield write
        list(writes)


def _write_image(url: str, image: Pixels) -> None:
    storage.write_bytes(url, encode_png(image))


def read_images(urls: Iterable[str]) -> Pixels:
    """Read PNG files of one size as pixels (N, H, W, 3)."""
    return np.stack([decode_png(storage.read_bytes(url)) for url in urls])


def image_url(folder: str, position: int) -> str:
    """`FOLDER/00042.png`"""
    return storage.join(folder, image_name(position))


def image_name(position: int) -> str:
    """`00042.png`"""
    return f"{position:05d}.png"


def write_jsonl(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    storage.write_bytes(url, "".join(json.dumps(row) + "\n" for row in rows).encode())
