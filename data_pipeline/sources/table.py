"""Source `table`: image paths and captions in a CSV, TSV, JSONL or Parquet file.

Rows with the same path are captions of one image.
"""

import codecs
import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.sources.base import (
    DEFAULT_LIMITS,
    ListedSource,
    ReadLimits,
    captions_of,
    numbered_image,
    relative_path,
)
from ifvit import storage
from ifvit.errors import UserError
from ifvit.records import parse_json, replace_lone_surrogates, shorten

PATH, CAPTION = "path", "caption"
NUM_PROBES = 8
MAX_BYTES = 1 << 31
"""Largest table, and largest sum of its texts, which a Parquet file may hold compressed."""
_BATCH_ROWS = 1 << 16

Row = tuple[str, dict[str, Any]]
"""File and line of the row, for messages, and the values by column."""


class CaptionTable(ListedSource):
    """The images of one table, sorted by path; rows with the same path are captions of one image.

    The columns are `path`, in the folder or `s3://` prefix `images`, and `caption`, or those of
    `limits.caption_names`. A cell holds a text, nothing, or, in JSONL and Parquet, a list of texts.
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
        columns = (PATH, *(limits.caption_names or (CAPTION,)))
        for where, row in reader(storage.read_bytes(captions, MAX_BYTES), captions, columns):
            _check_columns(row, columns, where)
            path = row[PATH]
            found = captions_of([row[column] for column in columns[1:]], where)
            size += len(path) + sum(len(caption) + 16 for caption in found)
            if size > MAX_BYTES:
                raise UserError(f"{captions}: more than {MAX_BYTES:,} characters; divide the table")
            texts.setdefault(relative_path(images, path, where), []).extend(found)
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


def _check_columns(row: dict[str, Any], columns: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in row:
            found = shorten(", ".join(map(str, row)))
            raise UserError(
                f"{where}: no column {column!r}; the columns are {found}; --caption_key names "
                "those of the captions"
            )
    path = row[PATH]
    if not (isinstance(path, str) and path.strip("/")):
        raise UserError(f"{where}: no text in column {PATH!r}")


def _check_unique(names: Sequence[str], columns: Sequence[str], file: str) -> None:
    for column in columns:
        if names.count(column) > 1:
            raise UserError(
                f"{file}: two columns are called {column!r}; rename one, and name both with "
                "--caption_key if they are captions"
            )


def _read_csv(
    data: bytes, file: str, columns: Sequence[str], delimiter: str = ","
) -> Iterator[Row]:
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    csv.field_size_limit(MAX_BYTES)  # by default 131,072 characters; longer captions are cut later
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    try:
        _check_unique(reader.fieldnames or (), columns, file)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than columns; quote captions with commas")
            if None in row.values():
                raise UserError(f"{where}: fewer cells than columns; quote captions of many lines")
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in row.values()):
                raise UserError(
                    f"{where}: a quote joins rows; double it inside quotes, or use JSONL"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason})") from None


def _read_jsonl(data: bytes, file: str, _columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(io.BytesIO(data.removeprefix(codecs.BOM_UTF8)), start=1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, parse_json(dict[str, Any], replace_lone_surrogates(line), where)


def _read_parquet(data: bytes, file: str, columns: Sequence[str]) -> Iterator[Row]:
    with reading_parquet(file) as pyarrow:
        schema = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).schema
        names = schema.to_arrow_schema().names
        if not set(columns) <= set(names):
            found = shorten(", ".join(names))
            raise UserError(
                f"{file}: needs the columns {', '.join(columns)}; it has {found}; --caption_key "
                "names those of the captions"
            )
        _check_unique(names, columns, file)
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
