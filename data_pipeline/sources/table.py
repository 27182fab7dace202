"""Source `table`: image paths and captions in a CSV, TSV, JSONL or Parquet file.

There is one row per caption.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.sources.base import (
    DEFAULT_LIMITS,
    ListedSource,
    ReadLimits,
    numbered_image,
    relative_path,
)
from ifvit import storage
from ifvit.errors import UserError
from ifvit.records import parse_json, shorten

COLUMNS = ("path", "caption")
NUM_PROBES = 8
MAX_BYTES = 1 << 31
"""Largest table, and largest sum of its texts, which a Parquet file may hold compressed."""
_BATCH_ROWS = 1 << 16

Row = tuple[str, dict[str, Any]]
"""File and line of the row, for messages, and the values by column."""


class CaptionTable(ListedSource):
    """The images of one table, sorted by path; rows with the same path are captions of one image.

    The columns are `path`, in the folder or `s3://` prefix `images`, and `caption`.
    Raises UserError naming the row when a column is missing or a value is not text, and when none
    of the first images exists.
    """

    classes = ()

    def __init__(
        self, images: str, captions: str | None, limits: ReadLimits = DEFAULT_LIMITS
    ) -> None:
        reader = READERS.get(PurePosixPath(captions or "").suffix.lower())
        if captions is None or reader is None:
            raise UserError(
                f"captions: {captions}; a table source needs a file of type {', '.join(READERS)}"
            )
        self._file = captions
        texts: dict[str, list[str]] = {}
        size = 0
        for where, row in reader(storage.read_bytes(captions, MAX_BYTES), captions):
            path, caption = (_text(row, column, where) for column in COLUMNS)
            size += len(path) + len(caption) + 16
            if size > MAX_BYTES:
                raise UserError(f"{captions}: more than {MAX_BYTES:,} characters; divide the table")
            texts.setdefault(relative_path(images, path, where), []).append(caption)
        if not texts:
            raise UserError(f"{captions}: no rows")
        super().__init__(
            [
                numbered_image(number, images, path, limits, captions=tuple(texts[path]))
                for number, path in enumerate(sorted(texts))
            ]
        )
        probes = [storage.join(images, image.name) for image in self.images[:NUM_PROBES]]
        if not any(map(storage.exists, probes)):
            raise UserError(f"{probes[0]}: no such file; paths in {captions} start at {images}")

    def report(self) -> str:
        """Describe the numbers of images and captions."""
        num_captions = sum(len(image.captions) for image in self.images)
        return f"{self._file}: {len(self.images):,} images, {num_captions:,} captions"


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or (column == "path" and not value.strip("/")):
        found = shorten(", ".join(map(str, row)))
        raise UserError(f"{where}: no text in column {column!r}; the columns are {found}")
    return value


def _read_csv(data: bytes, file: str, delimiter: str = ",") -> Iterator[Row]:
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than columns; quote captions with commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason})") from None


def _read_jsonl(data: bytes, file: str) -> Iterator[Row]:
    for number, line in enumerate(io.BytesIO(data.removeprefix(codecs.BOM_UTF8)), start=1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, parse_json(dict[str, Any], line, where)


def _read_parquet(data: bytes, file: str) -> Iterator[Row]:
    try:
        from pyarrow import BufferReader, parquet
    except ImportError:
        raise UserError(f"{file}: Parquet needs pyarrow; pip install 'ifvit[table]'") from None
    number = 0
    try:
        names = parquet.read_schema(BufferReader(data)).names
        if not set(COLUMNS) <= set(names):
            found = shorten(", ".join(names))
            raise UserError(f"{file}: needs the columns {', '.join(COLUMNS)}; it has {found}")
        # As dictionaries, because a text that many rows repeat would fill the memory.
        table = parquet.ParquetFile(BufferReader(data), read_dictionary=list(COLUMNS))
        for batch in table.iter_batches(_BATCH_ROWS, columns=list(COLUMNS)):
            for row in _rows(batch):
                yield f"{file}:{number}", row
                number += 1
    except UserError:
        raise
    except Exception as error:  # pyarrow raises all kinds of errors for broken files
        raise UserError(f"{file}: not Parquet ({shorten(error, 200)})") from None


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a batch; rows with equal texts share one string."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if hasattr(column, "dictionary"):
            texts = column.dictionary.to_pylist()
            columns[name] = [None if i is None else texts[i] for i in column.indices.to_pylist()]
        else:
            columns[name] = column.to_pylist()
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


READERS: dict[str, Callable[[bytes, str], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
