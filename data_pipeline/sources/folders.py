"""Sources `folder` and `captioned_folder`: class folders, and images with texts beside them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import (
    REQUESTS_AT_ONCE,
    Captions,
    ListedSource,
    caption_fields,
    check_link,
    describe,
    image_in,
    is_hidden,
    is_image,
    is_readme,
    read_file,
)
from ifvit import storage
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES
from ifvit.records import decode_lines, shorten

SUFFIX = "txt"
MAX_TEXT_BYTES = 1 << 20
NO_TEXT = "no text file of the same name beside it"


class ClassFolders(ListedSource):
    """`IMAGES/CLASS/*.jpg`: the first image of every class, then the second of every class, ....

    In this order every shard contains images of many classes, so a loader that shuffles only within
    a few shards still mixes classes. Classes are numbered by their sorted names. Raises UserError
    for a folder without class folders and for a class without images.
    """

    def __init__(self, config: EncodeConfig) -> None:
        self._folder = config.images
        folders, self._others = _list_classes(config)
        self.classes = tuple(folders)
        ranked = []  # (rank in its class, label, path)
        for label, (name, files) in enumerate(folders.items()):
            chosen = [file for file in files if is_image(file)]
            if not chosen:
                raise UserError(f"{config.images}/{name}: no images ({', '.join(IMAGE_SUFFIXES)})")
            self._others += [f"{name}/{file}" for file in sorted({*files}.difference(chosen))]
            ranked += [(rank, label, f"{name}/{file}") for rank, file in enumerate(chosen)]
        super().__init__(
            [
                image_in(config, path, key=f"{number:012d}", label=label)
                for number, (_, label, path) in enumerate(sorted(ranked))
            ]
        )

    def report(self) -> str:
        """Describe the numbers of images, classes and ignored files."""
        return describe(
            f"{self._folder}: {len(self.images):,} images in {len(self.classes):,} classes",
            {"files and folders are not images and are ignored": self._others},
        )


def _list_classes(config: EncodeConfig) -> tuple[dict[str, list[str]], list[str]]:
    """List the files of each class folder, and the files beside these folders."""
    images = config.images
    entries = [name for name in storage.list_names(images) if not is_hidden(name)]
    if not entries:
        raise UserError(f"{images}: missing or empty folder; expected CLASS/*.jpg in it")
    loose = next(filter(is_image, entries), None)
    if loose:
        raise UserError(
            f"{images}/{loose}: image without a class; move it to CLASS/*.jpg, or "
            "use --source captioned_folder for images with texts beside them"
        )
    folders = {}
    for name in entries:
        place = storage.join(images, name)
        if not name.isprintable():  # it is stored in the manifest as UTF-8 and printed
            raise UserError(f"{images}/{shorten(name)}: rename this class in letters of UTF-8")
        try:
            check_link(config, name)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        files = storage.list_names(place)
        if files != [name] or Path(place).is_dir():  # a file is listed as its own content
            folders[name] = files
    if not folders:
        raise UserError(f"{images}: no folders of classes; expected CLASS/*.jpg in it")
    return folders, [name for name in entries if name not in folders]


class CaptionedFolder(ListedSource):
    """The images of a folder and of the folders in it, sorted by path.

    Each line of `NAME.txt` is a caption of `NAME.jpg`; `caption_key` names other suffixes of the
    texts. An image without text counts as unreadable. Hidden files and folders are ignored. Raises
    UserError for a folder without images.
    """

    classes = ()

    def __init__(self, config: EncodeConfig) -> None:
        self._folder = config.images
        names = config.caption_names or (SUFFIX,)
        texts: dict[str, str] = {}  # by path with the suffix in small letters
        others, paths = [], []
        for path in storage.walk_files(config.images):
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
            raise UserError(f"{self._folder}: no images in this folder; expected NAME.jpg")
        stems = [str(PurePosixPath(path).with_suffix("")) for path in paths]
        wanted = [{f"{stem}.{name}": n for n, name in enumerate(names)} for stem in stems]
        unused = set(texts).difference(*wanted)
        self._unused = [texts[key] for key in sorted(unused) if not is_readme(key)]
        self._others = [path for path in others if not is_readme(path)]

        def read(keys: dict[str, int]) -> tuple[Captions, str]:
            numbers = {texts[key]: number for key, number in keys.items() if key in texts}
            return _read_captions(config, numbers)

        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = list(pool.map(read, wanted))
        super().__init__(
            [
                image_in(
                    config,
                    path,
                    key=f"{n:012d}",
                    problem=problem,
                    **caption_fields(captions or [("", 0)], config),
                )
                for n, (path, (captions, problem)) in enumerate(zip(paths, found, strict=True))
            ]
        )

    def report(self) -> str:
        """Describe the numbers of images and captions, and name what has no counterpart."""
        return describe(
            f"{self._folder}: {self.counts()}",
            {
                "images have no text": [i.name for i in self.images if i.problem == NO_TEXT],
                "texts have no image": self._unused,
                "files are neither images nor texts": self._others,
            },
        )


def _read_captions(config: EncodeConfig, numbers: dict[str, int]) -> tuple[Captions, str]:
    """Captions, one a line, of texts with their numbers, and the reason why they are unreadable."""
    if not numbers:
        return [], NO_TEXT
    captions: Captions = []
    try:
        for path, number in numbers.items():
            lines = decode_lines(read_file(config, path, MAX_TEXT_BYTES), path)
            captions += [(line, number) for line in lines if line.strip()]
    except StoreError:
        raise
    except UserError as error:
        return [], f"its text: {str(error).rpartition(': ')[2]}"
    return captions, ""
