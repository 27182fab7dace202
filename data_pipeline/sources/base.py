"""Base classes of image sources: `Source` is what `encode` calls, `ListedSource` lists all images.

Your own source derives from one of them.
"""

import fnmatch
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand

from data_pipeline.config import EncodeConfig
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES
from ifvit.records import leads_out, shorten

REQUESTS_AT_ONCE = 16
MAX_CAPTION = 10_000
"""Longest caption in characters; the rest is cut before tokenising, and is not stored."""

Captions = list[tuple[str, int]]
"""Captions, each with the number of the column, key or suffix that it comes from."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image with all its captions, or with the number of its class.

    `sources` are the numbers of the captions' sources in `Source.caption_sources`, if it has names.

    `key` is the wish for the key in the shard; the encode job makes it safe and unique. Messages
    show `name`. `read` returns the content of the image file. It is called from several threads,
    and again after a restart; when it raises an error other than StoreError, the image is left out
    and the error is recorded as the reason. `problem` is such a reason that is known before
    reading; it may concern `num_images` images. `remarks` say what the source changed or left out.
    `file` is the path or URL of the file; without it a rerun does not see that the image has
    changed. Raises UserError for an image with neither captions nor label nor problem.
    """

    key: str
    image_id: int | str
    name: str
    read: Callable[[], bytes] = bytes
    captions: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    label: int | None = None
    problem: str = ""
    num_images: int = 1
    remarks: tuple[str, ...] = ()
    file: str = ""

    def __post_init__(self) -> None:
        if not self.captions and self.label is None and not self.problem:
            raise UserError(f"{self.name}: no caption and no label; give every image one of them")
        if self.sources and len(self.sources) != len(self.captions):
            counts = f"{len(self.captions)} captions and {len(self.sources)} sources of captions"
            raise UserError(f"{self.name}: {counts}; give each caption one source, or none any")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The images of one output shard, which `open` returns in order.

    `is_listed` says that `open` costs nothing; then every start of the job checks whether images
    that failed before can be read now, and whether captions have changed. `files` are the paths or
    URLs of the input files of the unit: a rerun makes the shard again when their content has
    changed. `count_images` tells how many images are missing when `open` fails, None if unknown.
    """

    name: str
    open: Callable[[], Sequence[CaptionedImage]]
    is_listed: bool
    files: Sequence[str] = ()
    count_images: Callable[[], int | None] = lambda: None


class Source(ABC):
    """All images of one dataset; every process sees the same images in the same order.

    The constructor takes the fields `images` and `captions` of the recipe; `captions` may be None.
    It raises UserError, in one line, for missing or malformed input.
    """

    classes: tuple[str, ...]
    """Class names in the order of the labels; empty if images have captions."""
    caption_sources: tuple[str, ...] = ()
    """Names of the sources of captions, as the columns of a table; empty if there is only one."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of ids, labels and file names in order, independent of the folder.

        An output folder holds shards of one such hash. Captions and contents of files belong to
        the identity of each unit.
        """

    @abstractmethod
    def report(self) -> str:
        """Describe in a few lines how many images there are and which are missing."""

    @abstractmethod
    def units(self, samples_per_shard: int) -> Sequence[Unit]:
        """Divide the images into units of work."""


class ListedSource(Source):
    """Base class of sources that list all their images, in the order in which they are encoded."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images

    @cached_property
    def sha256(self) -> str:
        """Hash of ids, file names and labels."""
        digest = hashlib.sha256()
        for image in self.images:
            row = [image.image_id, image.name, image.label]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def counts(self) -> str:
        """Numbers of the images and of their captions, for the report."""
        num_captions = sum(len(image.captions) for image in self.images if not image.problem)
        return f"{len(self.images):,} images, {num_captions:,} captions"

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Divide the list into shards; the last one may be smaller."""
        starts = range(0, len(self.images), samples_per_shard)
        parts = [self.images[start : start + samples_per_shard] for start in starts]
        return [
            Unit(
                name=shard_name(number),
                open=partial(list, images),
                is_listed=True,
                files=[image.file for image in images if image.file],
            )
            for number, images in enumerate(parts)
        ]


def image_in(
    config: EncodeConfig, path: str, *, key: str, image_id: int | None = None, **fields: Any
) -> CaptionedImage:
    """Build the image `path` below the folder of the recipe; its id is the path by default."""
    return CaptionedImage(
        key=key,
        image_id=path if image_id is None else image_id,
        name=path,
        read=partial(read_file, config, path, config.max_image_bytes),
        file=storage.join(config.images, path),
        **fields,
    )


def read_file(config: EncodeConfig, path: str, max_bytes: int) -> bytes:
    """Read the file `path` below the folder of the recipe. Raises UserError for a link out."""
    check_link(config, path)
    return storage.read_bytes(storage.join(config.images, path), max_bytes)


def check_link(config: EncodeConfig, path: str) -> None:
    """Raise UserError for a link out of the folder of the recipe, unless it allows such links."""
    if config.allow_links or connections.is_remote(config.images):
        return
    if leads_out(Path(config.images), Path(config.images, path)):
        raise UserError("a link leads out of the folder of the images; --allow_links allows it")


def captions_of(cells: Iterable[object], where: str) -> Captions:
    """Captions from cells of a table, each a text, a list of texts, or null for no caption.

    Cells without any text are a blank caption. Raises UserError naming `where` for other cells.
    """
    captions = []
    for number, cell in enumerate(cells):
        texts = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
        for text in texts:
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise UserError(f"{where}: the caption is no text and no list of texts ({kind})")
            captions.append((text or "", number))
    return captions or [("", 0)]


def caption_fields(captions: Captions, config: EncodeConfig) -> dict[str, Any]:
    """The fields `captions` and `sources` of CaptionedImage."""
    sources = tuple(number for _, number in captions)
    return {
        "captions": tuple(text for text, _ in captions),
        "sources": sources if config.caption_sources else (),
    }


def find_files(images: str, suffix: str) -> dict[str, int | None]:
    """Sizes of the files that end in `suffix`, by URL, from a folder, a pattern or a name.

    Sorted by URL; the size is None for what is no regular file. Each folder is listed once. Raises
    UserError when a folder or pattern has no such file.
    """
    try:
        patterns = list(braceexpand(images))
    except ValueError as error:
        raise UserError(f"{images}: {error}") from None
    list_states = lru_cache(storage.list_states)
    sizes: dict[str, int | None] = {}
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        if not name.endswith(suffix):
            folder, name = pattern.rstrip("/"), f"*{suffix}"
        found = {
            f"{folder}/{file}" if folder else file: state.num_bytes if state else None
            for file, state in list_states(folder or ".").items()
            if not file.startswith(".")
            and fnmatch.fnmatchcase(file[: -len(suffix)] + file[-len(suffix) :].lower(), name)
        }
        if not found:
            raise UserError(f"{pattern}: no such {suffix} file; name a folder or a pattern of them")
        sizes |= found
    return dict(sorted(sizes.items()))


def describe(head: str, warnings: dict[str, list[str]]) -> str:
    """The report `head`, and a line for each kind of files that it warns of."""
    lines = [
        f"warning: {len(names):,} {what}; the first is {shorten(names[0])}"
        for what, names in warnings.items()
        if names
    ]
    return "\n".join([head, *lines])


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or made by an archiver of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def is_readme(path: str) -> bool:
    """Whether a path names a text about the data set."""
    return PurePosixPath(path).stem.upper().startswith(("README", "LICENSE"))


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image and is not hidden."""
    pure = PurePosixPath(path)
    return not is_hidden(pure.name) and pure.suffix.lower() in IMAGE_SUFFIXES


def shard_name(number: int) -> str:
    """`shard_name(42)` => `shard-00042`."""
    return f"shard-{number:05d}"
