"""Source `parquet`: images and captions inside Parquet files, as Hugging Face datasets store them.

The files are local, in an object store, or on the hub (`hf://datasets/OWNER/NAME/...`).
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import (
    REQUESTS_AT_ONCE,
    CaptionedImage,
    Source,
    Unit,
    caption_fields,
    captions_of,
    find_files,
    shard_name,
)
from data_pipeline.sources.caption_files import MAX_BYTES, check_columns, reading_parquet
from ifvit import connections, storage
from ifvit.errors import UserError
from ifvit.records import shorten

IMAGE = "image"
_BUFFER_BYTES = 4 << 20
"""Bytes that one read of a column asks for; a larger page is read as a whole."""
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")


@dataclass(frozen=True, kw_only=True)
class ParquetPart:
    """One Parquet file: its images and their column, or why its footer cannot be read."""

    url: str
    num_bytes: int | None
    num_rows: int | None = None
    image: str = ""
    problem: str = ""


class ParquetImages(Source):
    """The rows of Parquet files, in order; each file becomes one or several shards.

    `images` is a folder or prefix, a pattern `FOLDER/train-*.parquet`, or a file. The images are in
    the column `image`, or else in the only column of bytes or of structs {bytes, path}; captions,
    texts or lists of texts, are in the column `caption` or in those of `caption_key`.
    Raises UserError when a file lacks these columns, when no file can be read, and when a folder
    holds several splits.
    """

    classes = ()

    def __init__(self, config: EncodeConfig) -> None:
        self._config, images = config, config.images
        sizes = find_files(images, ".parquet")
        splits = {found[1] for found in map(_SPLIT.fullmatch, map(_name, sizes)) if found}
        if len(splits) > 1 and not images.endswith(".parquet"):
            found = ", ".join(sorted(splits))
            raise UserError(
                f"{images}: holds the splits {shorten(found)}; name one of them, as "
                f"{storage.join(images, min(splits))}-*.parquet"
            )
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            describe = partial(_describe, columns=config.caption_columns)
            self._parts = list(pool.map(describe, *zip(*sizes.items(), strict=True)))
        if all(part.problem for part in self._parts):
            raise UserError(self._parts[0].problem)

    @property
    def sha256(self) -> str:
        """Hash of the names of the files and columns."""
        names = [[_name(part.url) for part in self._parts], self._config.caption_names]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def report(self) -> str:
        """Describe the numbers of files and images, the columns, and files that are broken."""
        good = [part for part in self._parts if not part.problem]
        num_rows = sum(part.num_rows or 0 for part in good)
        gigabytes = sum(part.num_bytes or 0 for part in good) / 1e9
        columns = sorted({part.image for part in good}.union(self._config.caption_columns))
        lines = [
            f"{self._config.images}: {len(good):,} Parquet files, {gigabytes:,.2f} GB, "
            f"{num_rows:,} images; columns {', '.join(columns)}"
        ]
        lines += [f"warning: {part.problem}" for part in self._parts if part.problem]
        return "\n".join(lines)

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Divide the rows of each file into shards; a broken file is one unit.

        Names of shards have two numbers, of the file and of the shard in it, so that a file that is
        mended changes no other shards.
        """
        return [
            Unit(
                name=f"{shard_name(number)}-{start // samples_per_shard:05d}",
                open=partial(_open_rows, part, start, samples_per_shard, self._config),
                is_listed=False,
                files=(part.url,),
                count_images=partial(_count_rows, part, start, samples_per_shard),
            )
            for number, part in enumerate(self._parts)
            for start in range(0, part.num_rows or 1, samples_per_shard)
        ]


def _name(url: str) -> str:
    return PurePosixPath(url).name


def _count_rows(part: ParquetPart, start: int, samples_per_shard: int) -> int | None:
    return part.num_rows and min(samples_per_shard, part.num_rows - start)


def _describe(url: str, size: int | None, columns: Sequence[str]) -> ParquetPart:
    """Read the footer. Raises UserError for a file without the columns."""
    try:
        with reading_parquet(url) as pyarrow, storage.open_ranges(url, size) as file:
            num_bytes = file.seek(0, os.SEEK_END)
            found = pyarrow.parquet.ParquetFile(file)
            num_rows, schema = found.metadata.num_rows, found.schema_arrow
            if not 0 <= num_rows <= num_bytes:  # bounds the number of units
                raise ValueError(f"{num_rows} rows in {num_bytes} bytes")
    except connections.StoreError:
        raise
    except UserError as error:
        return ParquetPart(url=url, num_bytes=size, problem=str(error))
    check_columns(schema.names, columns, url)
    image = _find_image_column(url, schema)
    return ParquetPart(url=url, num_bytes=num_bytes, num_rows=num_rows, image=image)


def _find_image_column(url: str, schema: Any) -> str:
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if IMAGE in found:
        return IMAGE
    if len(found) != 1:
        what = f"several columns of bytes, {', '.join(found)}" if found else "no column of bytes"
        raise UserError(
            f"{url}: {shorten(what)}; the images must be bytes, or structs of bytes and path, in "
            f"a column {IMAGE!r}; for a table of paths use --source table"
        )
    return str(found[0])


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return number >= 0 and _holds_bytes(kind.field(number).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _open_rows(
    part: ParquetPart, start: int, num_rows: int, config: EncodeConfig
) -> list[CaptionedImage]:
    """List up to `num_rows` rows from `start` on, after copying their images to a temporary file.

    The file on disk is freed with the list. Raises UserError when the Parquet file is broken, and
    OSError when the disk is full.
    """
    if part.problem:
        raise UserError(part.problem)
    copies = tempfile.TemporaryFile(prefix="ifvit-")  # noqa: SIM115
    columns, images, size = config.caption_columns, [], 0
    num_rows = _count_rows(part, start, num_rows) or 0
    for number, row in enumerate(islice(_read_rows(part, columns, start), num_rows), start):
        value = row[part.image]
        data = value.get("bytes") if isinstance(value, dict) else value
        where = f"{_name(part.url)}:{number}"
        captions = captions_of([row[name] for name in columns], where)
        size += sum(len(caption) + 16 for caption, _ in captions)
        if size > MAX_BYTES:
            raise UserError(f"{part.url}: more than {MAX_BYTES:,} characters in one shard")
        offset = copies.tell()
        if data and len(data) <= config.max_image_bytes:
            copies.write(data)
        images.append(
            CaptionedImage(
                key=f"{_name(part.url).removesuffix('.parquet')}-{number:08d}",
                image_id=where,
                name=where,
                read=partial(_read_copy, copies, offset, len(data or b""), config.max_image_bytes),
                problem="" if data else "the row holds no bytes of an image",
                **caption_fields(captions, config),
            )
        )
    copies.flush()
    if len(images) < num_rows:
        raise UserError(f"{part.url}: not Parquet (rows are missing)")
    return images


def _read_rows(part: ParquetPart, captions: Sequence[str], start: int) -> Iterator[dict[str, Any]]:
    """Rows from `start` on, read page by page; earlier row groups are skipped."""
    with (
        reading_parquet(part.url) as pyarrow,
        storage.open_ranges(part.url, part.num_bytes) as file,
    ):
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}  # reads page by page
        table = pyarrow.parquet.ParquetFile(file, **options)
        first = 0
        for group in range(table.num_row_groups):
            end = first + table.metadata.row_group(group).num_rows
            if end > start:
                # Batches of one row, because a row may be as large as an image.
                batches = table.iter_batches(
                    1, row_groups=[group], columns=[part.image, *captions], use_threads=False
                )
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from islice(rows, max(0, start - first), None)
            first = end


def _read_copy(file: Any, offset: int, num_bytes: int, max_bytes: int) -> bytes:
    if num_bytes > max_bytes:
        raise storage.TooLargeError(f"{num_bytes:,} bytes are more than {max_bytes:,}")
    # pread takes the offset as an argument, so threads can share the open file.
    return os.pread(file.fileno(), num_bytes, offset)
