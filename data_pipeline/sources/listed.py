"""Sources that know all their images from a list: the list is cut into shards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from data_pipeline.sources.source import CaptionedImage
from ifvit import storage


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


class ListedSource:
    """What every source of a list has in common; `images` is in its final order."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images

    @cached_property
    def sha256(self) -> str:
        """Hash of ids, file names, captions and labels: what decides the dataset."""
        digest = hashlib.sha256()
        for image in self.images:
            row = [image.image_id, image.name, image.captions, image.label]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def units(self, samples_per_shard: int) -> list[ListedUnit]:
        """The list cut into shards; the last one may be smaller."""
        starts = range(0, len(self.images), samples_per_shard)
        cuts = [self.images[start : start + samples_per_shard] for start in starts]
        return [
            ListedUnit(name=shard_name(number), images=images) for number, images in enumerate(cuts)
        ]


def numbered_image(
    number: int, folder: str, path: str, captions: tuple[str, ...] = (), label: int | None = None
) -> CaptionedImage:
    """An image that is known by its path in a folder or under an `s3://` prefix."""
    return CaptionedImage(
        key=f"{number:012d}",
        image_id=path,
        name=path,
        read=partial(storage.read_bytes, storage.join(folder, path)),
        captions=captions,
        label=label,
    )


def shard_name(number: int) -> str:
    """`shard_name(42)` => `shard-00042`."""
    return f"shard-{number:05d}"
