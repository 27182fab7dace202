"""300 images from all kinds of source, 30 inputs of which are bad: exact counts and repairs."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encoded_files import finish, hashes, record_shards, undisturbed_hashes, without_markers
from PIL import Image

from data_pipeline.config import EncodeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import verify
from ifvit.errors import UserError

NUM_IMAGES = 50
BAD_IMAGES = {0: "truncated", 3: b"", 7: b"<html>not found</html>", 21: None}
"""Content of broken files by number; None is a missing file. They are in units 0 and 2 of 5."""
BLANK = 25


def make_picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG" if number % 2 else "PNG")
    return buffer.getvalue()


def broken(number: int) -> bytes | None:
    bad = BAD_IMAGES[number]
    data = make_picture(number)
    return data[: len(data) // 2] if isinstance(bad, str) else bad


def write_images(folder: Path, name: Callable[[int], str], *, is_good: bool) -> None:
    for number in range(NUM_IMAGES):
        path = folder / name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = make_picture(number)
        is_bad = not is_good and number in BAD_IMAGES
        wanted = broken(number) if is_bad else data
        if wanted is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != wanted:
            path.write_bytes(wanted)


def caption(number: int, *, is_good: bool) -> str:
    return f"picture {number}" if is_good or number != BLANK else " \t"


def write_coco(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    write_images(folder / "images", "{:03}.jpg".format, is_good=is_good)
    numbers = range(NUM_IMAGES)
    content = {
        "images": [{"id": n, "file_name": f"{n:03}.jpg"} for n in numbers],
        "annotations": [{"image_id": n, "caption": caption(n, is_good=is_good)} for n in numbers],
    }
    (folder / "c.json").write_text(json.dumps(content), "utf-8-sig")
    return replace(config, images=str(folder / "images"), captions=str(folder / "c.json"))


def write_table(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    write_images(folder / "images", "{:03}.png".format, is_good=is_good)
    with (folder / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows(
            [f"{n:03}.png", caption(n, is_good=is_good)] for n in reversed(range(NUM_IMAGES))
        )
    images = str(folder / "images")
    return replace(config, source="table", images=images, captions=str(folder / "c.csv"))


def write_texts(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    """NAME.txt beside NAME.png; one text is missing, because a missing image is not listed."""
    images = folder / "texts"
    write_images(images, "{:03}.png".format, is_good=is_good)
    for number in range(NUM_IMAGES):
        text = f"\ufeff{caption(number, is_good=is_good)}\r\nthe same\u2028again\r\n"
        (images / f"{number:03}.txt").write_bytes(text.encode())
    (images / "021.png").write_bytes(make_picture(21))
    if not is_good:
        (images / "021.txt").unlink()
        (images / "025.txt").write_bytes(b"K\xe4se")
    (images / "._000.png").write_bytes(b"x")
    return replace(config, source="captioned_folder", images=str(images), captions=None)


def write_parquet(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    """Five files of ten rows, the third of which is cut off."""
    (folder / "parquet").mkdir(parents=True, exist_ok=True)
    bad = {number: broken(number) for number in (0, 3, 7)} if not is_good else {}
    for first in range(0, NUM_IMAGES, 10):
        numbers = range(first, first + 10)
        table = pyarrow.table(
            {
                "image": [
                    {"bytes": bad.get(n, make_picture(n)), "path": f"{n}.png"} for n in numbers
                ],
                "caption": [f"picture {n}" if is_good or n != 9 else "" for n in numbers],
            }
        )
        path = folder / "parquet" / f"{first // 10}.parquet"
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        data = buffer.getvalue()[: 5000 if first == 20 and not is_good else None]
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    images = str(folder / "parquet")
    return replace(config, source="parquet", images=images, captions=None)


def write_classes(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    """Ten classes of five images; units hold the images of equal rank."""

    def name(number: int) -> str:
        return f"{number % 10}/{number // 10}.jpg"

    write_images(folder / "classes", name, is_good=is_good)
    for number in (21, 25):  # a folder cannot list a missing file
        data = make_picture(number)
        (folder / "classes" / name(number)).write_bytes(data if is_good else data[:60])
    for hidden in (".DS_Store", "README.txt", "0/._0.jpg", "__MACOSX/0/0.jpg", "1/Thumbs.db"):
        path = folder / "classes" / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    images = str(folder / "classes")
    return replace(config, source="folder", images=images, captions=None, text_encoder=None)


def write_tars(folder: Path, config: EncodeConfig, *, is_good: bool) -> EncodeConfig:
    """Five tars of ten images; with bad captions in the first, and the third is cut off."""
    bad = {
        0: {"0.png": broken(0)},
        1: {"1.txt": "K\xe4se".encode("latin-1")},
        2: {"2.txt": None, "2.json": b'["a", "list"]'},
        3: {"3.txt": None},
    }
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    for first in range(0, NUM_IMAGES, 10):
        members: dict[str, bytes | None] = {"._0.jpg": b"x", "__MACOSX/1.jpg": b"x"}
        for n in range(first, first + 10):
            members[f"{n}.{'jpg' if n % 2 else 'png'}"] = make_picture(n)
            members[f"{n}.txt"] = f"\ufeffpicture {n}\r\n".encode()
            members |= bad.get(n, {}) if not is_good else {}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        path = folder / "tars" / f"{first // 10:05}.tar"
        data = buffer.getvalue()[: 9000 if first == 20 and not is_good else None]
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    (folder / "tars" / "00002_stats.json").write_text('{"successes": 10}')
    images = str(folder / "tars")
    return replace(config, source="webdataset", images=images, captions=None)


@pytest.mark.parametrize(
    ("write", "num_bad", "num_known"),
    [
        (write_coco, 5, NUM_IMAGES),
        (write_table, 5, NUM_IMAGES),
        (write_classes, 5, NUM_IMAGES),
        (write_texts, 5, NUM_IMAGES),
        (write_tars, 4 + 10, NUM_IMAGES),  # statistics tell how many images the bad tar has
        (write_parquet, 4 + 1, NUM_IMAGES - 10 + 1),
    ],
)
def test_counts_are_exact_and_mended_inputs_alone_are_encoded(
    write: Callable[..., EncodeConfig],
    num_bad: int,
    num_known: int,
    config: EncodeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "mixed"
    config = replace(config, samples_per_shard=10, batch_size=8)
    recipe = write(folder, config, is_good=False)
    with pytest.raises(UserError, match=rf"^{num_bad} of {num_known} images could not be read"):
        encode(recipe)
    assert not Path(recipe.output, "manifest.json").exists()
    written = record_shards(monkeypatch)
    assert finish(replace(recipe, tolerate=num_bad)).num_samples == num_known - num_bad
    assert written == []
    verify(ShardsConfig(url=recipe.output))
    recipe = write(folder, config, is_good=True)
    assert finish(recipe).num_samples == NUM_IMAGES
    assert [name[:11] for name in written] == ["shard-00000", "shard-00002"]
    verify(ShardsConfig(url=recipe.output))
    assert without_markers(hashes(recipe)) == without_markers(undisturbed_hashes(recipe))
