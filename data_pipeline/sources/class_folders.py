"""Source `folder`: one folder of images per class, `IMAGES/CLASS/*.jpg`, with labels."""

from pathlib import PurePosixPath

from data_pipeline.sources.base import ListedSource, numbered_image
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES


class ClassFolders(ListedSource):
    """The first image of every class, then the second image of every class, and so on.

    In this order every shard contains images of many classes, so a loader that shuffles only within
    a few shards still mixes classes. Classes are numbered by their sorted names. Raises UserError
    for a folder without class folders, for a class without images, and when captions are given.
    """

    def __init__(self, images: str, captions: str | None) -> None:
        if captions is not None:
            raise UserError(f"captions: {captions} is set, but a folder source has class labels")
        self._folder = images
        self.classes = tuple(_list_classes(images))
        self._num_others = 0
        ranked = []  # (rank in its class, label, path)
        for label, name in enumerate(self.classes):
            files = storage.list_names(storage.join(images, name))
            chosen = [file for file in files if _is_image(file)]
            if not chosen:
                raise UserError(f"{images}/{name}: no images ({', '.join(IMAGE_SUFFIXES)})")
            self._num_others += len(files) - len(chosen)
            ranked += [(rank, label, f"{name}/{file}") for rank, file in enumerate(chosen)]
        super().__init__(
            [
                numbered_image(number, images, path, label=label)
                for number, (_, label, path) in enumerate(sorted(ranked))
            ]
        )

    def report(self) -> str:
        """Describe the numbers of images, classes and ignored files."""
        text = f"{self._folder}: {len(self.images):,} images in {len(self.classes):,} classes"
        if self._num_others:
            text += f"\nwarning: {self._num_others:,} files are not images and are ignored"
        return text


def _list_classes(images: str) -> list[str]:
    entries = [name for name in storage.list_names(images) if not name.startswith(".")]
    if not entries:
        raise UserError(f"{images}: missing or empty folder; expected CLASS/*.jpg in it")
    loose = [name for name in entries if _is_image(name)]
    if loose:
        raise UserError(f"{images}/{loose[0]}: image without a class; move it to CLASS/*.jpg")
    return entries


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
