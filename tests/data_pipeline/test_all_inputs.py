"""A table of inputs that people have, each beside what the data set must make of it.

One run of the encode job reads all rows of one kind of source.
"""

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encoded_files import finish
from PIL import Image
from test_image_rules import (
    ALPHA,
    COLORS,
    DEEP,
    GREY_ALPHA,
    GREY_SHOWN,
    GREYS,
    INKS,
    ON_WHITE,
    SHOWN,
    SRGB,
    SWAPPED,
    animated,
    file_of,
    made,
    palette,
    png,
    turned,
)

from data_pipeline.completion import read_marker
from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig
from data_pipeline.shard_io import TOO_LONG
from data_pipeline.shard_tools import inspect_shards, verify
from data_pipeline.units import BLANK, CUT, REPLACED
from ifvit.image_rules import CMYK, CONVERTED, CUT_TO_8_BITS, FIRST_FRAME, IGNORED, TURNED
from ifvit.records import shorten
from ifvit.shards.reader import ShardReader

BESIDE = "images beside that of the same key were left out"
UNKNOWN = "not an image of a known format"
ALL_BLANK = "all its captions are blank; --allow_blank_captions"
TOO_SMALL = "the shorter side has fewer than 8; --min_side"
SHARED = "images have this key, .*--tar_keys last_dot"
LINK = "a link leads out of the folder of the images; --allow_links"

FOLDER, LINK_OUT, MISSING = "folder", "link out", "missing"
"""What may be in the place of an image's file."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """An encoded image with its number of captions and its remarks, or the reason without it.

    With `first` this must be the first caption, and with `looks_like` the image must look like that
    of another row. An image without captions is labelled. An ignored file has an empty reason.
    """

    num_captions: int = 0
    remarks: tuple[str, ...] = ()
    first: str | None = None
    looks_like: str = ""
    reason: str | None = None


def encoded(num_captions: int, *remarks: str, first: str | None = None, like: str = "") -> Expected:
    return Expected(num_captions=num_captions, remarks=remarks, first=first, looks_like=like)


def left_out(reason: str) -> Expected:
    return Expected(reason=reason)


IGNORED_FILE = left_out("")
Row = tuple[str, bytes | str, Any, Expected]
"""Name, content of the image, captions as this kind of source has them, and the expected result."""

RGB = made("RGB", COLORS, "PNG")
JPEG = made("RGB", COLORS, "JPEG")


def sized(width: int, height: int) -> bytes:
    return file_of(Image.new("RGB", (width, height)), "PNG")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
TEXT = ("a dog",)

COCO: list[Row] = [
    ("rgb.png", RGB, TEXT, encoded(1, first="a dog")),
    ("rgb.jpg", JPEG, ["a", "b", "c", "d", "e"], encoded(5, first="a")),
    ("rgb.bmp", made("RGB", COLORS, "BMP"), TEXT, encoded(1, like="rgb.png")),
    ("rgb.webp", made("RGB", COLORS, "WEBP"), TEXT, encoded(1, like="rgb.png")),
    ("png named.jpg", RGB, TEXT, encoded(1, like="rgb.png")),
    ("greys.png", made("RGB", GREYS, "PNG"), TEXT, encoded(1)),
    ("l.png", made("L", [0, 128, 255, 0], "PNG"), TEXT, encoded(1, like="greys.png")),
    ("16 bits.png", png(0, 16, DEEP), TEXT, encoded(1, CUT_TO_8_BITS, like="greys.png")),
    ("on white.png", made("RGB", SHOWN, "PNG"), TEXT, encoded(1)),
    ("rgba.png", made("RGBA", ALPHA, "PNG"), TEXT, encoded(1, ON_WHITE, like="on white.png")),
    ("rgba.webp", made("RGBA", ALPHA, "WEBP"), TEXT, encoded(1, ON_WHITE, like="on white.png")),
    ("grey on white.png", made("RGB", GREY_SHOWN, "PNG"), TEXT, encoded(1)),
    ("la", made("LA", GREY_ALPHA, "PNG"), TEXT, encoded(1, ON_WHITE, like="grey on white.png")),
    ("p.gif", palette("GIF", None), TEXT, encoded(1, like="rgb.png")),
    ("p transparent.png", palette("PNG", 1), TEXT, encoded(1, ON_WHITE)),
    ("p transparent.gif", palette("GIF", 1), TEXT, encoded(1, ON_WHITE, like="p transparent.png")),
    ("cmyk.jpg", made("CMYK", INKS, "JPEG"), TEXT, encoded(1, CMYK)),
    ("srgb.png", made("RGB", COLORS, "PNG", icc_profile=SRGB), TEXT, encoded(1, like="rgb.png")),
    ("icc.png", made("RGB", COLORS, "PNG", icc_profile=SWAPPED), TEXT, encoded(1, CONVERTED)),
    ("no icc.png", made("RGB", COLORS, "PNG", icc_profile=b"x"), TEXT, encoded(1, IGNORED)),
    ("turned.jpg", turned(6), TEXT, encoded(1, TURNED)),
    ("animated.gif", animated("GIF"), TEXT, encoded(1, FIRST_FRAME, like="rgb.png")),
    ("animated.webp", animated("WEBP"), TEXT, encoded(1, FIRST_FRAME, like="rgb.png")),
    ("smallest.png", sized(8, 9), TEXT, encoded(1)),
    ("small.png", sized(7, 16), TEXT, left_out(TOO_SMALL)),
    ("1 pixel.png", sized(1, 1), TEXT, left_out(TOO_SMALL)),
    ("long.png", sized(170, 16), TEXT, left_out("aspect ratio is above 10; --max_aspect_ratio")),
    ("large.png", sized(200, 200), TEXT, left_out("0.03 megapixels; --max_megapixels")),
    ("truncated.jpg", JPEG[:-100], TEXT, left_out("[Tt]runcated")),
    ("eps.jpg", EPS, TEXT, left_out(UNKNOWN)),
    ("page.jpg", b"<html>not found</html>", TEXT, left_out(UNKNOWN)),
    ("empty.jpg", b"", TEXT, left_out(UNKNOWN)),
    ("folder.jpg", FOLDER, TEXT, left_out("not a regular file")),
    ("link.png", LINK_OUT, TEXT, left_out(LINK)),
    ("missing.png", MISSING, TEXT, left_out("no such file")),
    ("a/same.png", RGB, TEXT, encoded(1)),
    ("b/same.png", RGB, TEXT, encoded(1)),
    ("._x.jpg", JPEG, TEXT, encoded(1)),  # the file lists it
    ("no caption.png", RGB, (), left_out("the annotations hold no caption of it")),
    ("empty caption.png", RGB, [""], left_out(ALL_BLANK)),
    ("blank captions.png", RGB, [" \t", "\u3000"], left_out(ALL_BLANK)),
    ("one blank caption.png", RGB, ["", "a cat"], encoded(1, BLANK, first="a cat")),
    ("half an emoji.png", RGB, ["a \ud83d"], encoded(1, REPLACED, first="a \ufffd")),
    ("20,000.png", RGB, ["x" * 20_000], encoded(1, CUT, TOO_LONG, first="x" * 10_000)),
    ("14 words.png", RGB, ["a " * 14], encoded(1)),  # this text encoder reads 16 tokens
    ("15 words.png", RGB, ["a " * 15], encoded(1, TOO_LONG)),
    ("control.png", RGB, ["a\x1b[31m\0\x07"], encoded(1, first="a\x1b[31m\0\x07")),
    ("line separator.png", RGB, ["a\u2028b\r\nc"], encoded(1, first="a\u2028b\r\nc")),
    ("equal.png", RGB, ["a", "a"], encoded(2)),
]
LONG = "n" * 195
NAMES: list[Row] = [
    ("plain.png", RGB, TEXT, encoded(1)),
    ("two words.png", RGB, TEXT, encoded(1)),
    ("a#b?c.png", RGB, TEXT, encoded(1)),
    ("a%20b.png", RGB, TEXT, encoded(1)),
    ("a b.png", RGB, TEXT, encoded(1)),
    ("r\u00e9gion.png", RGB, ["composed"], encoded(1, first="composed")),
    ("re\u0301gion.png", RGB, ["decomposed"], encoded(1, first="decomposed")),
    ("10\u202fPM.png", RGB, TEXT, encoded(1)),
    ("v1.5_01.png", RGB, ["one"], encoded(1, first="one")),
    ("v1.5_02.png", RGB, ["two"], encoded(1, first="two")),
    (f"{LONG}0.png", RGB, ["zero"], encoded(1, first="zero")),
    (f"{LONG}1.png", RGB, ["one"], encoded(1, first="one")),
    ("a/same.png", RGB, ["in a"], encoded(1, first="in a")),
    ("b/same.png", RGB, ["in b"], encoded(1, first="in b")),
    ("a_same.png", RGB, ["beside a"], encoded(1, first="beside a")),
    ("UPPER.PNG", RGB, TEXT, encoded(1)),
    ("\u2028line\u0085.png", RGB, TEXT, encoded(1)),
]
"""Names that every kind of source must keep apart."""

CSV: list[Row] = [
    *[row for row in NAMES if "\u0085" not in row[0]],  # control codes are in no path of a table
    ("quoted.png", RGB, ['a "big", dog\r\nruns'], encoded(1, first='a "big", dog\r\nruns')),
    ("lines.png", RGB, ["a\u2028b\u0085c\fd"], encoded(1, first="a\u2028b\u0085c\fd")),
    ("five.png", RGB, list("abcde"), encoded(5, first="a")),
    ("blank.png", RGB, ["", " "], left_out(ALL_BLANK)),
    ("one blank.png", RGB, ["", "b"], encoded(1, BLANK, first="b")),
    ("long.png", RGB, ["y" * 20_000], encoded(1, CUT, TOO_LONG)),
    ("missing.png", MISSING, TEXT, left_out("no such file")),
    (".hidden.png", RGB, TEXT, encoded(1)),
]
JSONL: list[Row] = [
    ("list.png", RGB, [["a", "b"]], encoded(2, first="a")),
    ("null.png", RGB, [None], left_out(ALL_BLANK)),
    ("empty list.png", RGB, [[]], left_out(ALL_BLANK)),
    ("null in list.png", RGB, [[None, "b"]], encoded(1, BLANK, first="b")),
    ("half an emoji.png", RGB, ["a \ud83d", "b"], encoded(2, REPLACED, first="a \ufffd")),
    ("backslash.png", RGB, ["a \\ud83d \U0001f600"], encoded(1, first="a \\ud83d \U0001f600")),
    ("turned.jpg", turned(6), TEXT, encoded(1, TURNED)),
]
TEXTS: list[Row] = [
    *[(name, image, "\n".join(texts).encode(), result) for name, image, texts, result in NAMES],
    ("mark.png", RGB, b"\xef\xbb\xbfa dog\r\n", encoded(1, first="a dog")),
    ("animated.gif", animated("GIF"), b"a dog", encoded(1, FIRST_FRAME, like="mark.png")),
    ("old mac.png", RGB, b"a\rb", encoded(2, first="a")),
    ("five.png", RGB, b"a\n\nb\nc\nd\ne\n", encoded(5, first="a")),
    ("lines.png", RGB, "a\u2028b\u0085c\fd".encode(), encoded(1, first="a\u2028b\u0085c\fd")),
    ("empty.png", RGB, b"", left_out(ALL_BLANK)),
    ("blank.png", RGB, b" \n\t\r\n", left_out(ALL_BLANK)),
    ("latin.png", RGB, b"de\xe9", left_out("its text: not UTF-8 at byte 2")),
    ("utf16.png", RGB, "a".encode("utf-16"), left_out("its text: not UTF-8")),
    ("long.png", RGB, b"z" * 20_000, encoded(1, CUT, TOO_LONG)),
    ("no text.png", RGB, None, left_out("no text file of the same name")),
    ("link.png", LINK_OUT, b"a dog", left_out(LINK)),
    ("nothing.jpg", b"", b"a dog", left_out(UNKNOWN)),
    (".hidden.png", RGB, b"a dog", IGNORED_FILE),
    ("._plain.png", b"\0\5\x16\7", None, IGNORED_FILE),
    ("__MACOSX/plain.png", b"x", None, IGNORED_FILE),
    (".cache/plain.png", RGB, b"a dog", IGNORED_FILE),
    ("README.md", b"x", None, IGNORED_FILE),
]
CLASSES: list[Row] = [
    *[(f"cat/{row[0].replace('/', ' in ')}", RGB, None, encoded(0)) for row in NAMES],
    ("dog #1/plain.png", RGB, None, encoded(0, like="cat/plain.png")),
    ("dog #1/turned.jpg", turned(6), None, encoded(0, TURNED)),
    ("dog #1/link.png", LINK_OUT, None, left_out(LINK)),
    ("dog #1/folder.jpg", FOLDER, None, left_out("not a regular file")),
    ("dog #1/animated.gif", animated("GIF"), None, encoded(0, FIRST_FRAME)),
    ("dog #1/empty.jpg", b"", None, left_out(UNKNOWN)),
    ("dog #1/._plain.png", b"x", None, IGNORED_FILE),
    ("dog #1/notes.txt", b"x", None, IGNORED_FILE),
    ("__MACOSX/x.png", b"x", None, IGNORED_FILE),
    (".DS_Store", b"x", None, IGNORED_FILE),
    ("README.md", b"x", None, IGNORED_FILE),
]
TARS: list[Row] = [
    *[
        (name, image, {"txt": texts[0].encode()}, result)
        for name, image, texts, result in NAMES
        if not name.startswith("v1")
    ],
    ("v1.5_01.png", RGB, {"txt": b"one"}, left_out(SHARED)),
    ("v1.5_02.png", RGB, {"txt": b"two"}, left_out(SHARED)),
    ("mark.png", RGB, {"txt": b"\xef\xbb\xbfa dog\r\n"}, encoded(1)),
    ("empty.png", RGB, {"txt": b"", "json": b'{"caption": "a dog"}'}, left_out(ALL_BLANK)),
    ("json.png", RGB, {"json": b'{"caption": ["a", "b", ""]}'}, encoded(2, BLANK, first="a")),
    ("null.png", RGB, {"json": b'{"caption": null}'}, left_out(ALL_BLANK)),
    ("blank.png", RGB, {"json": b'{"caption": " "}'}, left_out(ALL_BLANK)),
    ("none.png", RGB, {"json": b'{"title": "a"}'}, left_out("the tar contains no caption")),
    ("./dotted/x.png", RGB, {"txt": b"a"}, encoded(1)),
    ("emoji.png", RGB, {"json": b'{"caption": "a \\ud83d"}'}, encoded(1, REPLACED)),
    ("number.png", RGB, {"json": b'{"caption": 7}'}, left_out("no text and no list of texts")),
    ("list.png", RGB, {"json": b'["a"]'}, left_out("malformed json")),
    ("latin.png", RGB, {"txt": b"de\xe9"}, left_out("the caption is not UTF-8")),
    ("alone.png", RGB, {}, left_out("the tar contains no caption")),
    ("two.png", RGB, {"txt": b"a"}, left_out(SHARED)),
    ("two.jpg", JPEG, {}, left_out(SHARED)),
    ("mask.png", RGB, {"txt": b"a", "mask.png": RGB}, encoded(1, BESIDE)),
    ("turned.jpg", turned(6), {"txt": b"a"}, encoded(1, TURNED)),
    ("animated.gif", animated("GIF"), {"txt": b"a"}, encoded(1, FIRST_FRAME, like="mark.png")),
    ("link.png", LINK_OUT, {"txt": b"a"}, left_out("a link in the tar")),
    ("._plain.png", b"x", {}, IGNORED_FILE),
    ("__MACOSX/plain.png", b"x", {}, IGNORED_FILE),
    ("README.md", b"x", {"txt": b"x"}, IGNORED_FILE),
    ("LICENSE", b"x", {}, IGNORED_FILE),
    ("readme.1.png", RGB, {}, left_out("as readme.1.png; .*--tar_keys last_dot")),
    ("licenses.png", RGB, {"txt": b"a"}, encoded(1)),
]
LAST_DOT: list[Row] = [
    (name, image, {"txt": texts[0].encode()}, result) for name, image, texts, result in NAMES
]
PARQUET: list[Row] = [
    ("rgb.png", RGB, "a dog", encoded(1, first="a dog")),
    ("rgb.png", RGB, "of an equal name", encoded(1, first="of an equal name")),
    ("", RGB, ["a", "b", "c", "d", "e"], encoded(5, first="a")),
    ("rgba.png", made("RGBA", ALPHA, "PNG"), ["x"], encoded(1, ON_WHITE)),
    ("blank.png", RGB, [" ", None], left_out(ALL_BLANK)),
    ("null.png", RGB, None, left_out(ALL_BLANK)),
    ("one blank.png", RGB, ["", "b"], encoded(1, BLANK, first="b")),
    ("lines.png", RGB, ["a\u2028b"], encoded(1, first="a\u2028b")),
    ("no bytes.png", b"", ["a"], left_out("the row holds no bytes")),
    ("page.png", b"<html>", ["a"], left_out(UNKNOWN)),
]


def write_images(folder: Path, rows: Sequence[Row]) -> None:
    for name, image, *_ in rows:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image == FOLDER:
            path.mkdir()
        elif image == LINK_OUT:
            outside = folder.parent / "outside.png"
            outside.write_bytes(RGB)
            path.symlink_to(outside)
        elif isinstance(image, bytes):
            path.write_bytes(image)


def write_coco(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    write_images(folder, rows)
    content = {
        "images": [{"id": number, "file_name": row[0]} for number, row in enumerate(rows)],
        "annotations": [
            {"image_id": number, "caption": caption}
            for number, row in enumerate(rows)
            for caption in row[2]
        ],
    }
    captions = folder.parent / "captions.json"
    captions.write_text(json.dumps(content))
    return replace(config, images=str(folder), captions=str(captions))


def write_csv(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    write_images(folder, rows)
    captions = folder.parent / "table.csv"
    with captions.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([row[0], caption] for row in rows for caption in row[2])
    return replace(config, source="table", images=str(folder), captions=str(captions))


def write_jsonl(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    write_images(folder, rows)
    captions = folder.parent / "table.jsonl"
    lines = [json.dumps({"path": row[0], "caption": text}) for row in rows for text in row[2]]
    captions.write_text("\r\n".join(["", *lines]), "utf-8-sig")
    return replace(config, source="table", images=str(folder), captions=str(captions))


def write_texts(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    write_images(folder, rows)
    for name, _, text, _ in rows:
        if text is not None:
            (folder / name).with_suffix(".txt").write_bytes(text)
    return replace(config, source="captioned_folder", images=str(folder), captions=None)


def write_classes(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    write_images(folder, rows)
    return replace(config, source="folder", images=str(folder), captions=None, text_encoder=None)


def write_tar(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, image, texts, _ in rows:
            stem = name.rpartition(".")[0]
            for member, data in {
                name: image,
                **{f"{stem}.{k}": v for k, v in texts.items()},
            }.items():
                info = tarfile.TarInfo(member)
                if data == LINK_OUT:
                    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                    tar.addfile(info)
                else:
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return replace(config, source="webdataset", images=str(folder), captions=None)


def write_last_dot(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    return replace(write_tar(folder, config, rows), tar_keys="last_dot")


def write_parquet(folder: Path, config: EncodeConfig, rows: Sequence[Row]) -> EncodeConfig:
    folder.mkdir()
    columns = {
        "image": [{"bytes": row[1], "path": row[0]} for row in rows],
        "text": [[row[2]] if isinstance(row[2], str) else row[2] for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "x.parquet", row_group_size=3)
    images, key = str(folder), "text"
    return replace(config, source="parquet", images=images, captions=None, caption_key=key)


def first_dot_key(_: int, name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


KINDS: dict[str, tuple[list[Row], Callable[..., EncodeConfig], Callable[[int, str], int | str]]] = {
    # rows, how they are written, and the id that an image has in the data set
    "coco": (COCO, write_coco, lambda number, _: number),
    "csv": (CSV, write_csv, lambda _, name: name),
    "jsonl": (JSONL, write_jsonl, lambda _, name: name),
    "texts": (TEXTS, write_texts, lambda _, name: name),
    "classes": (CLASSES, write_classes, lambda _, name: name),
    "tar": (TARS, write_tar, first_dot_key),
    "tar, last dot": (LAST_DOT, write_last_dot, lambda _, name: name.rpartition(".")[0]),
    "parquet": (PARQUET, write_parquet, lambda number, _: f"x.parquet:{number}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_encoded_or_named_as_its_row_says(
    kind: str, config: EncodeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, write, name_id = KINDS[kind]
    expected = {name_id(number, row[0]): row[3] for number, row in enumerate(rows)}
    names = {row[0]: name_id(number, row[0]) for number, row in enumerate(rows)}
    config = replace(
        write(tmp_path / "rows #1 [50%20] ré?*", config, rows),
        image_size=16,
        samples_per_shard=1000,
        batch_size=16,
        max_aspect_ratio=10.0,
        max_megapixels=0.03,
        tolerate=sum(bool(row[3].reason) for row in rows),
    )
    manifest = finish(config)
    verify(ShardsConfig(url=config.output))
    reader = ShardReader(config.output)
    (shard,) = manifest.shards
    marker = read_marker(config.output, shard.name)

    failures = {failure.image_id: failure for failure in marker.failures}
    for image_id, failure in failures.items():
        reason = expected[image_id].reason
        assert reason, f"{failure} is left out"
        assert re.search(reason, failure.reason), failure
    assert sum(failure.num_images for failure in marker.failures) == config.tolerate

    samples = {reader.metadata(n).image_id: n for n in range(len(reader))}
    assert len(samples) == len(reader)
    wanted = {image_id: row for image_id, row in expected.items() if row.reason is None}
    assert set(samples) == set(wanted)
    for image_id, row in wanted.items():
        captions = reader.metadata(samples[image_id]).captions
        assert len(captions) == row.num_captions, image_id
        assert row.first is None or captions[0] == row.first
        if row.looks_like:
            other = reader.moments(samples[names[row.looks_like]])
            np.testing.assert_allclose(reader.moments(samples[image_id]), other, atol=0.02)
    remarks = Counter(remark for row in wanted.values() for remark in row.remarks)
    assert {remark.text: remark.num_images for remark in marker.remarks} == remarks

    capsys.readouterr()
    inspect_shards(InspectConfig(url=config.output, num_samples=1000))
    lines = capsys.readouterr().out.splitlines()[-len(samples) :]
    for image_id, line in zip(samples, lines, strict=True):
        assert line.lstrip().startswith(shorten(image_id).lstrip())
        num = wanted[image_id].num_captions
        assert f"  {num}: " in line or not num
