"""Protocol of image sources, and a base class for sources that list all their images.

`encode` calls the protocol. Your own source may be any class that follows it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

from ifvit import storage


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image with all its captions, or with the number of its class.

    `key` is unique in its unit and contains no dot and no slash. `name` is for messages. `read`
    returns the content of the image file; an error that it raises, except StoreError, is recorded
    as the reason why the image is left out.
    """

    key: str
    image_id: int | str
    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The images of one output shard, which `open` returns in order.

    `num_images` is None if it is unknown before `open`. `is_listed` says that `open` costs nothing,
    so that every start may check images that failed before.
    """

    name: str
    open: Callable[[], Sequence[CaptionedImage]]
    num_images: int | None
    is_listed: bool


class Source(Protocol):
    """All images of one dataset, with the same images in the same order in every process.

    Its constructor takes the fields `images` and `captions` of the recipe; the latter may be None.
    It raises UserError, in one line, for missing or malformed input.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty if images have captions."""

    @property
    def sha256(self) -> str:
        """Hash of ids, captions, labels and file names, independent of the folder."""

    def report(self) -> str:
        """Describe in a few lines how many images there are and which are missing."""

    def units(self, samples_per_shard: int) -> Sequence[Unit]:
        """Divide the images into units of work."""


class ListedSource:
    """Base class of sources that list all their images; `images` is in its final order."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images

    @cached_property
    def sha256(self) -> str:
        """Hash of ids, file names, captions and labels."""
        digest = hashlib.sha256()
        for image in self.images:
            row = [image.image_id, image.name, image.captions, image.label]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Divide the list into shards; the last one may be smaller."""
        starts = range(0, len(self.images), samples_per_shard)
        parts = [self.images[start : start + samples_per_shard] for start in starts]
        return [
            Unit(
                name=shard_name(number),
                open=partial(list, images),
                num_images=len(images),
                is_listed=True,
            )
            for number, images in enumerate(parts)
        ]


def numbered_image(
    number: int, folder: str, path: str, captions: tuple[str, ...] = (), label: int | None = None
) -> CaptionedImage:
    """An image whose id is its path in a folder or under an `s3://` prefix."""
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
