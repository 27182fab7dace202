"""Sources that know all their images from a list: the list is cut into shards."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_pipeline.sources.source import CaptionedImage


@dataclass(frozen=True, kw_only=True)
class ListedUnit:
    """A stretch of the list."""

    name: str
    images: Sequence[CaptionedImage]
    is_listed: bool = True

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return len(self.images)

    def open(self) -> Sequence[CaptionedImage]:
        """The images in the list's order."""
        return self.images


def cut_list(images: Sequence[CaptionedImage], samples_per_shard: int) -> list[ListedUnit]:
    """The units of a list; the last one may be smaller."""
    starts = range(0, len(images), samples_per_shard)
    return [
        ListedUnit(name=shard_name(number), images=images[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def shard_name(number: int) -> str:
    """`shard_name(42)` => `shard-00042`."""
    return f"shard-{number:05d}"


def hash_list(images: Iterable[CaptionedImage]) -> str:
    """SHA-256 of what decides the dataset: ids, file names, captions, labels."""
    digest = hashlib.sha256()
    for image in images:
        row = [image.image_id, image.name, image.captions, image.label]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
