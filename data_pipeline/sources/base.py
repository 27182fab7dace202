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
from ifvit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image with all its captions, or with the number of its class.

    `key` is unique in its unit and contains no dot and no slash. Messages show `name`. `read`
    returns the content of the image file. It is called from several threads, and again after a
    restart; when it raises an error other than StoreError, the image
    is left out and the error is recorded as the reason. Raises UserError for an image with neither
    captions nor label.
    """

    key: str
    image_id: int | str
    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if not self.captions and self.label is None:
            raise UserError(f"{self.name}: no caption and no label; give every image one of them")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The images of one output shard, which `open` returns in order.

    `num_images` is None if it is unknown before `open`. `is_listed` says that `open` costs nothing;
    then every start of the job checks whether images that failed before can be read now.
    """

    name: str
    open: Callable[[], Sequence[CaptionedImage]]
    num_images: int | None
    is_listed: bool


class Source(Protocol):
    """All images of one dataset; every process sees the same images in the same order.

    The constructor takes the fields `images` and `captions` of the recipe; `captions` may be None.
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
    """Base class of sources that list all their images, in the order in which they are encoded."""

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
    """Build an image whose id is its path below `folder`, which may be an `s3://` prefix."""
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
