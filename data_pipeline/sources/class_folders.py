"""Source `folder`: one folder of images per class, `IMAGES/CLASS/*.jpg`, with labels."""

from pathlib import Path

from data_pipeline.sources.base import (
    DEFAULT_LIMITS,
    ListedSource,
    ReadLimits,
    is_hidden,
    is_image,
    numbered_image,
)
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES
from ifvit.records import leads_out, shorten


class ClassFolders(ListedSource):
    """The first image of every class, then the second image of every class, and so on.

    In this order every shard contains images of many classes, so a loader that shuffles only within
    a few shards still mixes classes. Classes are numbered by their sorted names. Raises UserError
    for a folder without class folders, for a class without images, and when captions are given.
    """

    def __init__(
        self, images: str, captions: str | None, limits: ReadLimits = DEFAULT_LIMITS
    ) -> None:
        if captions is not None:
            raise UserError(f"captions: {captions} is set, but a folder source has class labels")
        self._folder = images
        folders, self._others = _list_classes(images, limits)
        self.classes = tuple(folders)
        ranked = []  # (rank in its class, label, path)
        for label, (name, files) in enumerate(folders.items()):
            chosen = [file for file in files if is_image(file)]
            if not chosen:
                raise UserError(f"{images}/{name}: no images ({', '.join(IMAGE_SUFFIXES)})")
            self._others += [f"{name}/{file}" for file in sorted({*files}.difference(chosen))]
            ranked += [(rank, label, f"{name}/{file}") for rank, file in enumerate(chosen)]
        super().__init__(
            [
                numbered_image(number, images, path, limits, label=label)
                for number, (_, label, path) in enumerate(sorted(ranked))
            ]
        )

    def report(self) -> str:
        """Describe the numbers of images, classes and ignored files."""
        text = f"{self._folder}: {len(self.images):,} images in {len(self.classes):,} classes"
        if self._others:
            text += (
                f"\nwarning: {len(self._others):,} files and folders are not images and are "
                f"ignored; the first is {shorten(self._others[0])}"
            )
        return text


def _list_classes(images: str, limits: ReadLimits) -> tuple[dict[str, list[str]], list[str]]:
    """List the files of each class folder, and the files beside these folders."""
    entries = [name for name in storage.list_names(images) if not is_hidden(name)]
    if not entries:
        raise UserError(f"{images}: missing or empty folder; expected CLASS/*.jpg in it")
    loose = [name for name in entries if is_image(name)]
    if loose:
        raise UserError(
            f"{images}/{loose[0]}: image without a class; move it to CLASS/*.jpg, or "
            "use --source captioned_folder for images with texts beside them"
        )
    folders = {}
    for name in entries:
        place = storage.join(images, name)
        if not name.isprintable():  # it is stored in the manifest as UTF-8 and printed
            raise UserError(f"{images}/{shorten(name)}: rename this class in letters of UTF-8")
        if not (connections.is_remote(images) or limits.allow_links) and leads_out(
            Path(images), Path(place)
        ):
            raise UserError(f"{place}: a link leads out of {images}; --allow_links allows it")
        files = storage.list_names(place)
        if files != [name] or Path(place).is_dir():  # a file is listed as its own content
            folders[name] = files
    if not folders:
        raise UserError(f"{images}: no folders of classes; expected CLASS/*.jpg in it")
    return folders, [name for name in entries if name not in folders]
