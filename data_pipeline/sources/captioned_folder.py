"""Source `captioned_folder`: images with their captions in text files beside them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath

from data_pipeline.sources.base import (
    DEFAULT_LIMITS,
    ListedSource,
    ReadLimits,
    is_hidden,
    is_image,
    is_readme,
    numbered_image,
    read_image,
)
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.records import decode_lines, shorten

SUFFIX = "txt"
MAX_TEXT_BYTES = 1 << 20
MAX_CHARACTERS = 1 << 31
REQUESTS_AT_ONCE = 16
NO_TEXT = "no text file of the same name beside it"


class CaptionedFolder(ListedSource):
    """The images of a folder and of the folders in it, sorted by path.

    Each line of `NAME.txt` is a caption of `NAME.jpg`; `limits.caption_names` are other suffixes of
    the texts. An image without text counts as unreadable. Hidden files and folders are ignored.
    Raises UserError for a folder without images and when `captions` is set.
    """

    classes = ()

    def __init__(
        self, images: str, captions: str | None, limits: ReadLimits = DEFAULT_LIMITS
    ) -> None:
        if captions is not None:
            raise UserError(f"captions: {captions} is set, but the folder contains its captions")
        self._folder = images
        names = limits.caption_names or (SUFFIX,)
        texts: dict[str, str] = {}  # by path with the suffix in small letters
        others, paths = [], []
        for path in storage.walk_files(images):
            name = next((n for n in names if path.lower().endswith(f".{n.lower()}")), None)
            if any(map(is_hidden, path.split("/"))):
                continue
            if is_image(path):
                paths.append(path)
            elif name and path[: -len(name)] + name not in texts:
                texts[path[: -len(name)] + name] = path
            else:
                others.append(path)
        if not paths:
            raise UserError(f"{images}: no images in this folder; expected NAME.jpg and NAME.txt")
        stems = [str(PurePosixPath(path).with_suffix("")) for path in paths]
        wanted = [[f"{stem}.{n}" for n in names if f"{stem}.{n}" in texts] for stem in stems]
        unused = set(texts).difference(*wanted)
        self._unused = [texts[key] for key in sorted(unused) if not is_readme(key)]
        self._others = [path for path in others if not is_readme(path)]
        read = partial(_read_captions, images, limits=limits)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = list(pool.map(read, [[texts[key] for key in keys] for keys in wanted]))
        if sum(len(text) for captions, _ in found for text in captions) > MAX_CHARACTERS:
            raise UserError(f"{images}: more than {MAX_CHARACTERS:,} characters; divide the folder")
        super().__init__(
            [
                replace(
                    numbered_image(number, images, path, limits, captions=captions or ("",)),
                    problem=problem,
                )
                for number, (path, (captions, problem)) in enumerate(zip(paths, found, strict=True))
            ]
        )

    def report(self) -> str:
        """Describe the numbers of images and captions, and name what has no counterpart."""
        num_captions = sum(len(image.captions) for image in self.images if not image.problem)
        without = [image.name for image in self.images if image.problem == NO_TEXT]
        lines = [f"{self._folder}: {len(self.images):,} images, {num_captions:,} captions"]
        for what, paths in (
            ("images have no text", without),
            ("texts have no image", self._unused),
            ("files are neither images nor texts", self._others),
        ):
            if paths:
                lines.append(f"warning: {len(paths):,} {what}; the first is {shorten(paths[0])}")
        return "\n".join(lines)


def _read_captions(
    folder: str, paths: list[str], limits: ReadLimits
) -> tuple[tuple[str, ...], str]:
    """Captions, one a line, and the reason why they cannot be read."""
    if not paths:
        return (), NO_TEXT
    lines: list[str] = []
    try:
        for path in paths:
            data = read_image(folder, path, replace(limits, max_bytes=MAX_TEXT_BYTES))
            lines += decode_lines(data, path)
    except connections.StoreError:
        raise
    except UserError as error:
        return (), f"its text: {str(error).rpartition(': ')[2]}"
    return tuple(line for line in lines if line.strip()), ""
