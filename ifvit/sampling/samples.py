"""Drawn images as files: POSITION.png and JSON lines beside them."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import Pixels, decode_png, encode_png

_NUM_WRITERS = 4


def claim_folder(folder: str, settings: dict[str, Any]) -> None:
    """Say in settings.json what the folder's images are, or check that this has been said.

    Raises UserError when it holds images of other settings, so that none is lost.
    """
    url = storage.join(folder, "settings.json")
    if storage.create(url, (json.dumps(settings, indent=2) + "\n").encode()):
        return
    found = storage.read_json(url)
    differing = sorted(key for key in settings if found.get(key) != settings[key])
    if differing:
        raise UserError(
            f"{folder} holds samples of another {', '.join(differing)}; "
            "delete it or give another --output"
        )


def missing_images(folder: str, positions: Iterable[int]) -> list[int]:
    """The positions whose PNG is not there yet."""
    present = set(storage.list_names(folder))
    return [position for position in positions if image_name(position) not in present]


def write_images(folder: str, positions: Sequence[int], batches: Iterable[Pixels]) -> None:
    """Write POSITION.png for every image, one batch while the next one comes."""
    remaining = iter(positions)
    progress = tqdm(total=len(positions), unit="image", desc="generate", leave=False)
    with progress, ThreadPoolExecutor(_NUM_WRITERS) as pool:
        pending: list[Future[None]] = []
        for batch in batches:
            _wait(pending)
            urls = [image_url(folder, next(remaining)) for _ in batch]
            pending = [pool.submit(_write_image, *pair) for pair in zip(urls, batch, strict=True)]
            progress.update(len(batch))
        _wait(pending)


def _write_image(url: str, image: Pixels) -> None:
    storage.write_bytes(url, encode_png(image))


def _wait(writes: Iterable[Future[None]]) -> None:
    """Until all are done; raises what one of them raised."""
    for write in writes:
        write.result()


def image_url(folder: str, position: int) -> str:
    """`FOLDER/00042.png`"""
    return storage.join(folder, image_name(position))


def read_images(urls: Iterable[str]) -> Pixels:
    """Image files of one size as (N, H, W, 3)."""
    return np.stack([decode_png(storage.read_bytes(url)) for url in urls])


def image_name(position: int) -> str:
    """`00042.png`"""
    return f"{position:05d}.png"


def write_jsonl(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    storage.write_bytes(url, "".join(json.dumps(row) + "\n" for row in rows).encode())
