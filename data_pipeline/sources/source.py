"""The protocol of a source of images; implement it to encode images from anywhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


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
