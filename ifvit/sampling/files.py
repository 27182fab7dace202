"""Drawn images as files: POSITION.png and JSON lines beside them."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ifvit import storage
from ifvit.images import Pixels, decode_png, encode_png


def write_images(folder: str, positions: Sequence[int], batches: Iterable[Pixels]) -> list[str]:
    """Write POSITION.png for every image as the batches come; returns the URLs."""
    urls = []
    for position, image in zip(positions, itertools.chain.from_iterable(batches), strict=True):
        urls.append(storage.join(folder, image_name(position)))
        storage.write_bytes(urls[-1], encode_png(image))
    return urls


def read_images(urls: Iterable[str]) -> Pixels:
    """Image files of one size as (N, H, W, 3)."""
    return np.stack([decode_png(storage.read_bytes(url)) for url in urls])


def image_name(position: int) -> str:
    """`00042.png`"""
    return f"{position:05d}.png"


def write_jsonl(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    storage.write_bytes(url, "".join(json.dumps(row) + "\n" for row in rows).encode())
