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
from ifvit.images import ImageError, Pixels, decode_png, encode_png
from ifvit.records import NonNegativeInt, PlainName, dump_rows, dump_sealed, printable, record

_NUM_THREADS = 4
_LIST, _SETTINGS = "samples.jsonl", "settings.json"
_T = TypeVar("_T")


@record
class SampleRow:
    """A row of samples.jsonl: an image in the same folder and what was measured on it.

    `real` is the file of the held-out image, `clip_score` the raw cosine, `held_out_loss` the mean
    error on the held-out latents, `scores` what is right about a scene.
    """

    file: PlainName
    prompt: str
    position: NonNegativeInt
    image_id: int | str | None = None
    real: PlainName | None = None
    clip_score: float | None = None
    held_out_loss: float | None = None
    scores: dict[str, bool | None] | None = None


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
    url = storage.join(folder, _SETTINGS)
    if storage.create(url, dump_sealed(settings)):
        return
    found = read_settings(folder)
    names = settings.keys() | found.keys()
    differing = sorted(name for name in names if found.get(name) != settings.get(name))
    if differing:
        raise UserError(
            f"{folder} holds samples of another {printable(', '.join(differing))}; "
            "delete the folder or give another --output"
        )


def read_settings(folder: str) -> dict[str, Any]:
    """Read the settings that `claim_folder` wrote; empty if there are none."""
    url = storage.join_inside(folder, _SETTINGS)
    return storage.read_sealed(dict[str, Any], url) if storage.exists(url) else {}


def unfinished_images(folder: str, positions: Sequence[int]) -> list[int]:
    """List the positions without a PNG file in the folder, or with a damaged one."""
    missing = set(missing_images(folder, positions))
    kept = [position for position in positions if position not in missing]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        urls = [image_url(folder, position) for position in kept]
        intact = list(pool.map(_is_intact, urls))
    missing.update(position for position, whole in zip(kept, intact, strict=True) if not whole)
    return [position for position in positions if position in missing]


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
    with progress, ThreadPoolExecutor(_NUM_THREADS) as pool:
        yield write
        list(writes)


def _write_image(url: str, image: Pixels) -> None:
    storage.write_bytes(url, encode_png(image))


def read_images(urls: Iterable[str]) -> Pixels:
    """Read PNG files of one size as pixels (N, H, W, 3).

    Raises UserError naming a file that is damaged or of another size.
    """
    images: list[Pixels] = []
    for url in urls:
        try:
            images.append(decode_png(storage.read_bytes(url)))
        except ImageError as error:
            raise UserError(f"{url}: {error}; delete it and generate it again") from None
        if images[-1].shape != images[0].shape:
            raise UserError(f"{url}: its size differs from that of the other images")
    return np.stack(images)


def _is_intact(url: str) -> bool:
    """Whether the image can be decoded; a PNG file holds a checksum of its pixels."""
    try:
        decode_png(storage.read_bytes(url))
    except ImageError:
        return False
    return True


def image_url(folder: str, position: int) -> str:
    """`FOLDER/00042.png`. Raises UserError for a link that leads out of the folder."""
    return storage.join_inside(folder, image_name(position))


def image_name(position: int) -> str:
    """`00042.png`"""
    return f"{position:05d}.png"


def write_samples(folder: str, samples: Iterable[SampleRow]) -> None:
    """Write samples.jsonl; written last, it says that all images are there."""
    storage.write_bytes(storage.join(folder, _LIST), dump_rows(samples))


def read_samples(folder: str) -> list[SampleRow]:
    """Read samples.jsonl, one row per position; empty without it. Raises UserError if damaged."""
    url = storage.join_inside(folder, _LIST)
    rows = storage.read_rows(SampleRow, url) if storage.exists(url) else []
    if any(row.position != position for position, row in enumerate(rows)):
        raise UserError(f"{url}: damaged, rows are missing or repeated; restore the file")
    return rows
