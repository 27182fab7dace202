"""The protocol of a source of images, and sources that know all their images from a list."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

from ifvit import storage


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image and what it shows: all its captions, or the number of its class.

    `key` is unique in its unit and holds no dot and no slash; `name` is for messages.
    `read` returns the content of the image file. Whatever it raises, save a failing store, is
    recorded as the reason why the image was left out.
    """

    key: str
    image_id: int | str
    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()
    label: int | None = None


class Unit(Protocol):
    """The images of one output shard."""

    @property
    def name(self) -> str:
        """Name of the shard, for example shard-00042."""

    @property
    def num_images(self) -> int | None:
        """How many images there are, None where only opening tells."""

    @property
    def is_listed(self) -> bool:
        """Whether `open` is free, so that every start may look if a failed image is mended."""

    def open(self) -> Sequence[CaptionedImage]:
        """The images in their order; may take long, a download for example."""


class Source(Protocol):
    """All images of one dataset, the same ones in the same order for every process.

    Constructed as `Source(images, captions)` from the two fields of the recipe, the second None
    where it is not set; raises UserError, in one line, for what is missing or malformed.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels number; empty where images have captions."""

    @property
    def sha256(self) -> str:
        """Hash of what decides the dataset (ids, captions, labels, files), whatever its path."""

    def report(self) -> str:
        """Counts, and what is missing, in a few lines to read before hours are spent."""

    def units(self, samples_per_shard: int) -> Sequence[Unit]:
        """The units of work, decided from the source alone."""


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
