"""Sources `coco` and `table`: one file lists the images of a folder and their captions."""

import codecs
import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import (
    Captions,
    ListedSource,
    caption_fields,
    captions_of,
    describe,
    image_in,
)
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.records import (
    RelativePath,
    is_relative_path,
    parse_json,
    record,
    replace_lone_surrogates,
    shorten,
)

COMPLETE_SPLITS = {
    "captions_train2014": "82,783 images, 414,113 captions",
    "captions_val2014": "40,504 images, 202,654 captions",
    "captions_train2017": "118,287 images, 591,753 captions",
    "captions_val2017": "5,000 images, 25,014 captions",
}
"""What the report of a complete split says, by file name without .json."""
PATH = "path"
NUM_PROBES = 8
MAX_BYTES = 1 << 31
"""Largest table, and largest sum of its texts, which a Parquet file may hold compressed."""
_BATCH_ROWS = 1 << 16

Row = tuple[str, dict[str, Any]]
"""File and line of the row, for messages, and the values by column."""


@record
class CocoImage:
    """Entry of the list `images`."""

    id: int
    file_name: RelativePath


@record
class CocoCaption:
    """Entry of the list `annotations`; null is a blank caption."""

    image_id: int
    caption: str | None


@record
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
        content = parse_json(CocoFile, data, captions, ignore_unknown=True)
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
            raise UserError(f"{images}: contains none of the images that {captions} lists")

    def report(self) -> str:
        """Describe the numbers of images and captions, and warn if some are missing."""
        head, counts = f"{self._file}: {self.counts()}", COMPLETE_SPLITS.get(Path(self._file).stem)
        if self._is_official and counts and counts != self.counts():
            head += f"\nwarning: the complete split has {counts}"
        return describe(head, {"image files are missing": self.missing})


class CaptionTable(ListedSource):
    """The images of one table, sorted by path; rows with the same path are captions of one image.

    The columns are `path`, in the folder or `s3://` prefix `images`, and `caption`, or those of
    `caption_key`. A cell holds a text, nothing, or, in JSONL and Parquet, a list of texts.
    Raises UserError naming the row when a column is missing or a value is not text, and when none
    of the first images exists.
    """

    classes = ()

    def __init__(self, config: EncodeConfig) -> None:
        images, captions = config.images, config.captions
        reader = READERS.get(PurePosixPath(captions or "").suffix.lower())
        if captions is None or reader is None:
            raise UserError(
                f"captions: {captions}; a table source needs a file of type {', '.join(READERS)}"
            )
        self._file = captions
        texts: dict[str, Captions] = {}
        size = 0
        columns = (PATH, *config.caption_columns)
        for where, row in reader(storage.read_bytes(captions, MAX_BYTES), captions, columns):
            path = row[PATH]
            if not (isinstance(path, str) and path.strip("/")):
                raise UserError(f"{where}: no text in column {PATH!r}")
            found = captions_of([row[column] for column in columns[1:]], where)
            size += len(path) + sum(len(caption) + 16 for caption, _ in found)
            if size > MAX_BYTES:
                raise UserError(f"{captions}: more than {MAX_BYTES:,} characters; divide the table")
            texts.setdefault(_relative_path(images, path, where), []).extend(found)
        if not texts:
            raise UserError(f"{captions}: no rows")
        super().__init__(
            [
                image_in(config, path, key=f"{number:012d}", **caption_fields(texts[path], config))
                for number, path in enumerate(sorted(texts))
            ]
        )
        probes = [image.file for image in self.images[:NUM_PROBES]]
        if not any(map(storage.exists, probes)):
            raise UserError(f"{probes[0]}: no such file; paths in {captions} start at {images}")

    def report(self) -> str:
        """Describe the numbers of images and captions."""
        return f"{self._file}: {self.counts()}"


def _relative_path(folder: str, path: str, where: str) -> str:
    """Path below `folder` of a path in a table, which may also be absolute.

    Raises UserError naming `where` for a URL and for a path outside of the folder.
    """
    if is_relative_path(path):
        return path
    if "://" in path:
        raise UserError(f"{where}: {shorten(path)} is a URL; download the images first")
    relative, root = PurePosixPath(path), Path(folder).absolute()
    if relative.is_relative_to(root) and not connections.is_remote(folder):
        relative = relative.relative_to(root)
    if not is_relative_path(str(relative)):
        text = f"{where}: path {shorten(path)} does not lead inside {folder}; "
        raise UserError(f"{text}name a folder with --images that holds all images")
    return str(relative)


def check_columns(names: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raise UserError naming `where` unless each of the columns occurs once in `names`."""
    for column in columns:
        if names.count(column) != 1:
            number = "two columns are called" if column in names else "no column"
            raise UserError(
                f"{where}: {number} {shorten(column)!r}; name the columns of the captions with "
                f"--caption_key; the columns are {shorten(', '.join(names), 200)}"
            )


def _read_csv(
    data: bytes, file: str, columns: Sequence[str], delimiter: str = ","
) -> Iterator[Row]:
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    csv.field_size_limit(MAX_BYTES)  # by default 131,072 characters; longer captions are cut later
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    try:
        check_columns(reader.fieldnames or (), columns, file)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than columns; quote captions with commas")
            if None in row.values():
                raise UserError(f"{where}: fewer cells than columns; quote captions of many lines")
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in row.values()):
                raise UserError(f"{where}: a quote joins rows; double it, or use JSONL")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason})") from None


def _read_jsonl(data: bytes, file: str, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(io.BytesIO(data.removeprefix(codecs.BOM_UTF8)), start=1):
        if line.strip():
            where = f"{file}:{number}"
            row = parse_json(dict[str, Any], replace_lone_surrogates(line), where)
            check_columns(list(row), columns, where)
            yield where, row


def _read_parquet(data: bytes, file: str, columns: Sequence[str]) -> Iterator[Row]:
    with reading_parquet(file) as pyarrow:
        schema = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).schema
        names = schema.to_arrow_schema().names
        check_columns(names, columns, file)
        paths = [schema.column(number).path for number in range(len(schema))]
        # As dictionaries, because a text that many rows repeat would fill the memory.
        texts = [path for path in paths if path.split(".")[0] in columns]
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=texts)
        batches = table.iter_batches(_BATCH_ROWS, columns=list(columns))
        for number, row in enumerate(row for batch in batches for row in _rows_of(batch)):
            yield f"{file}:{number}", row


@contextlib.contextmanager
def reading_parquet(file: str) -> Iterator[Any]:
    """Yield the package pyarrow, and turn its errors for a broken `file` into UserError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: Parquet needs pyarrow; pip install 'ifvit[table]'") from None
    try:
        yield pyarrow
    except UserError:
        raise
    except Exception as error:  # pyarrow raises all kinds of errors for broken files
        raise UserError(f"{file}: not Parquet ({shorten(error, 200)})") from None


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a batch; rows with equal texts share one string."""
    columns = [_values_of(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _values_of(column: Any) -> list[Any]:
    if hasattr(column, "dictionary"):
        texts = column.dictionary.to_pylist()
        return [None if i is None else texts[i] for i in column.indices.to_pylist()]
    if not hasattr(column, "value_lengths"):
        return list(column.to_pylist())
    items = iter(_values_of(column.flatten()))
    lengths = column.value_lengths().to_pylist()
    return [None if length is None else list(islice(items, length)) for length in lengths]


READERS: dict[str, Callable[[bytes, str, Sequence[str]], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
