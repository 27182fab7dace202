"""Source `table`: image paths and captions in a CSV, JSONL or Parquet file, one row per caption."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.sources.base import ListedSource, numbered_image
from ifvit import storage
from ifvit.errors import UserError

COLUMNS = ("path", "caption")
NUM_PROBES = 8

Row = tuple[str, dict[str, Any]]
"""File and line of the row, for messages, and the values by column."""


class CaptionTable(ListedSource):
    """The images of one table, sorted by path; rows with the same path are captions of one image.

    The columns are `path`, relative to the folder or `s3://` prefix `images`, and `caption`.
    Raises UserError naming the row when a column is missing or a value is not text, and when none
    of the first images exists.
    """

    classes = ()

    def __init__(self, images: str, captions: str | None) -> None:
        reader = READERS.get(PurePosixPath(captions or "").suffix.lower())
        if captions is None or reader is None:
            raise UserError(
                f"captions: {captions}; a table source needs a file of type {', '.join(READERS)}"
            )
        self._file = captions
        texts: dict[str, list[str]] = {}
        for where, row in reader(storage.read_bytes(captions), captions):
            path, caption = (_text(row, column, where) for column in COLUMNS)
            texts.setdefault(path, []).append(caption)
        if not texts:
            raise UserError(f"{captions}: no rows")
        super().__init__(
            [
                numbered_image(number, images, path, captions=tuple(texts[path]))
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
        found = ", ".join(map(str, row))
        raise UserError(f"{where}: no text in column {column!r}; the columns are {found}")
    if column == "path" and value.startswith("/"):
        raise UserError(f"{where}: path {value} is absolute; make it relative to `images`")
    return value


def _read_csv(data: bytes, file: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_decode(data, file), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than columns; quote captions with commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _read_jsonl(data: bytes, file: str) -> Iterator[Row]:
    for number, line in enumerate(_decode(data, file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{file}:{number}: not a JSON object")
        yield f"{file}:{number}", value


def _read_parquet(data: bytes, file: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise UserError(f"{file}: Parquet needs pyarrow; pip install 'ifvit[table]'") from None
    try:
        table = parquet.ParquetFile(BufferReader(data))
        is_complete = set(COLUMNS) <= set(table.schema_arrow.names)
        rows = table.read(columns=list(COLUMNS) if is_complete else None)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: not Parquet ({' '.join(str(error).split())})") from None
    for number, row in enumerate(row for batch in rows.to_batches() for row in batch.to_pylist()):
        yield f"{file}:{number}", row


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error})") from None


READERS: dict[str, Callable[[bytes, str], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
