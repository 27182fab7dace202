"""Source `coco`: an image folder and COCO's `captions_SPLIT.json`, 2014 or 2017 layout."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.sources.base import CaptionedImage, ListedSource
from ifvit import storage
from ifvit.errors import UserError

COMPLETE_SPLITS = {
    "captions_train2014": (82_783, 414_113),
    "captions_val2014": (40_504, 202_654),
    "captions_train2017": (118_287, 591_753),
    "captions_val2017": (5_000, 25_014),
}
"""Number of images and of captions by file name, without .json."""

Value = TypeVar("Value")


class CocoCaptions(ListedSource):
    """The images of one annotation file, sorted by image id.

    Raises UserError for a missing folder, for a file without COCO captions, for an image without
    captions, and for a folder that contains none of the images.
    """

    classes = ()

    def __init__(self, images: str, captions: str | None) -> None:
        if captions is None:
            raise UserError("captions: not set; a coco source needs a captions_*.json file")
        if not storage.is_remote(images) and not Path(images).is_dir():
            raise UserError(f"{images}: no such folder of images")
        if Path(captions).is_dir():
            raise UserError(f"{captions}: is a folder; name the captions_*.json file in it")
        content = storage.read_json(captions)
        names, texts = _read_annotations(content, captions)
        # Other image sets use the same file names, so the name alone does not identify COCO.
        self._is_official = "COCO 20" in str(content.get("info"))
        self._file = captions
        super().__init__(
            [
                CaptionedImage(
                    key=f"{image_id:012d}",
                    image_id=image_id,
                    name=names[image_id],
                    read=partial(storage.read_bytes, storage.join(images, names[image_id])),
                    captions=tuple(texts[image_id]),
                )
                for image_id in texts
            ]
        )
        self.missing = _find_missing(images, list(names.values()))
        if len(self.missing) == len(self.images):
            raise UserError(
                f"{images}: contains none of the {len(self.images)} images that {captions} lists"
            )

    def report(self) -> str:
        """Describe the numbers of images and captions, and warn if some are missing."""
        counts = (len(self.images), sum(len(image.captions) for image in self.images))
        lines = [f"{self._file}: {counts[0]:,} images, {counts[1]:,} captions"]
        expected = COMPLETE_SPLITS.get(Path(self._file).stem)
        if self._is_official and expected and expected != counts:
            lines.append(
                f"warning: the complete split has {expected[0]:,} images, {expected[1]:,} captions"
            )
        if self.missing:
            lines.append(
                f"warning: {len(self.missing):,} image files are missing: {self.missing[0]}, …"
            )
        return "\n".join(lines)


def _find_missing(images: str, names: Sequence[str]) -> list[str]:
    """List the names of missing files. Only names in subfolders need a request per file."""
    present = set(storage.list_names(images))
    return [
        name
        for name in names
        if name not in present and not ("/" in name and storage.exists(storage.join(images, name)))
    ]


def _read_annotations(content: Any, file: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Read the file name and the captions of each image id, both sorted by id."""
    names: dict[int, str] = {}
    for entry in _entries(content, "images", file):
        image_id = _value(entry, "id", int, "images", file)
        if image_id in names:
            raise UserError(f"{file}: image id {image_id} is listed twice")
        names[image_id] = _value(entry, "file_name", str, "images", file)
    names = dict(sorted(names.items()))
    captions: dict[int, list[str]] = {image_id: [] for image_id in names}
    for entry in _entries(content, "annotations", file):
        image_id = _value(entry, "image_id", int, "annotations", file)
        if image_id not in captions:
            raise UserError(f"{file}: a caption has image id {image_id}, which is not in 'images'")
        captions[image_id].append(_value(entry, "caption", str, "annotations", file))
    for image_id, texts in captions.items():
        if not texts:
            raise UserError(f"{file}: image id {image_id} ({names[image_id]}) has no caption")
    return names, captions


def _entries(content: Any, key: str, file: str) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
        raise UserError(f"{file}: not COCO captions, needs a list under the key {key!r}")
    return list(content[key])


def _value(entry: Any, key: str, kind: type[Value], where: str, file: str) -> Value:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise UserError(
            f"{file}: not COCO captions, an entry of {where!r} has no {key!r} ({kind.__name__})"
        )
    return value
