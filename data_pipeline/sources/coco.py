"""Source `coco`: an image folder and COCO's `captions_SPLIT.json`, 2014 or 2017 layout."""

from pathlib import Path

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import ListedSource, describe, image_in
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.records import RelativePath, parse_json, record, replace_lone_surrogates

COMPLETE_SPLITS = {
    "captions_train2014": "82,783 images, 414,113 captions",
    "captions_val2014": "40,504 images, 202,654 captions",
    "captions_train2017": "118,287 images, 591,753 captions",
    "captions_val2017": "5,000 images, 25,014 captions",
}
"""What the report of a complete split says, by file name without .json."""


@record(ignore_unknown=True)
class CocoImage:
    """Entry of the list `images`."""

    id: int
    file_name: RelativePath


@record(ignore_unknown=True)
class CocoCaption:
    """Entry of the list `annotations`; null is a blank caption."""

    image_id: int
    caption: str | None


@record(ignore_unknown=True)
class CocoFile:
    """The keys of an annotation file that are read; other keys are ignored."""

    images: tuple[CocoImage, ...]
    annotations: tuple[CocoCaption, ...]
    info: object = None

    def __post_init__(self) -> None:
        known = {image.id for image in self.images}
        if not known:
            raise UserError("images: an empty list")
        if len(known) < len(self.images):
            raise UserError("images: an id is listed twice")
        for caption in self.annotations:
            if caption.image_id not in known:
                raise UserError(f"annotations: image id {caption.image_id} is not in 'images'")


class CocoCaptions(ListedSource):
    """The images of one annotation file, sorted by image id.

    An image without captions counts as unreadable. Raises UserError for a missing folder, for a
    file without COCO captions, and for a folder that contains none of the images.
    """

    classes = ()

    def __init__(self, config: EncodeConfig) -> None:
        images, captions = config.images, config.captions
        if captions is None:
            raise UserError("captions: not set; a coco source needs a captions_*.json file")
        if not connections.is_remote(images) and not Path(images).is_dir():
            raise UserError(f"{images}: no such folder of images")
        if Path(captions).is_dir():
            raise UserError(f"{captions}: is a folder; name the captions_*.json file in it")
        data = replace_lone_surrogates(storage.read_bytes(captions))
        content = parse_json(CocoFile, data, captions)
        texts: dict[int, list[str]] = {image.id: [] for image in content.images}
        for entry in content.annotations:
            texts[entry.image_id].append(entry.caption or "")
        # Other image sets use the same file names, so the name alone does not identify COCO.
        self._is_official = "COCO 20" in str(content.info)
        self._file = captions
        super().__init__(
            [
                image_in(
                    config,
                    image.file_name,
                    key=f"{image.id:012d}",
                    image_id=image.id,
                    captions=tuple(texts[image.id]),
                    problem="" if texts[image.id] else "the annotations hold no caption of it",
                )
                for image in sorted(content.images, key=lambda image: image.id)
            ]
        )
        present = set(storage.list_names(images))  # only names in subfolders need a request each
        absent = [image for image in self.images if image.name not in present]
        self.missing = [i.name for i in absent if "/" not in i.name or not storage.exists(i.file)]
        if len(self.missing) == len(self.images):
            raise UserError(
                f"{images}: contains none of the {len(self.images)} images that {captions} lists"
            )

    def report(self) -> str:
        """Describe the numbers of images and captions, and warn if some are missing."""
        head, counts = f"{self._file}: {self.counts()}", COMPLETE_SPLITS.get(Path(self._file).stem)
        if self._is_official and counts and counts != self.counts():
            head += f"\nwarning: the complete split has {counts}"
        return describe(head, {"image files are missing": self.missing})
