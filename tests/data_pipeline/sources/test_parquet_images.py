"""Source `parquet`: files in the layout of Hugging Face datasets, whole and broken."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from encoded_files import finish, image_files
from faulty_proxy import Fault, FaultyProxy
from pyarrow import parquet

from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import inspect_shards, verify
from data_pipeline.sources import open_source
from data_pipeline.sources.base import CaptionedImage
from data_pipeline.units import open_unit, read_or_fail
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows, row_group_size: int = 3) -> None:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)


@pytest.fixture
def rows(config: EncodeConfig) -> Rows:
    """Ten rows, as `datasets` writes them."""
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "caption": [f"photo {number}", "a photo"][: 1 + number % 2],
            "alt": f"picture {number}",
        }
        for number, path in enumerate(image_files(config))
    ]


@pytest.fixture
def recipe(config: EncodeConfig, rows: Rows) -> EncodeConfig:
    """Two files of seven and three rows; a shard takes four rows."""
    folder = Path(config.images).parent / "data"
    write(folder / "train-00000-of-00002.parquet", rows[:7])
    write(folder / "train-00001-of-00002.parquet", rows[7:])
    (folder / "README.md").touch()
    (folder / "._train-00001-of-00002.parquet").touch()
    return replace(config, source="parquet", images=str(folder), captions=None)


def open_all(recipe: EncodeConfig) -> list[CaptionedImage]:
    units = open_source(recipe).units(recipe.samples_per_shard)
    return [image for unit in units for image in open_unit(unit, recipe)]


def test_rows_are_encoded(
    recipe: EncodeConfig, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = finish(recipe)
    assert [entry.num_samples for entry in manifest.shards] == [4, 3, 3]
    verify(ShardsConfig(url=recipe.output))
    inspect_shards(InspectConfig(url=recipe.output, num_samples=10))
    out = capsys.readouterr().out
    assert "2 Parquet files, 0.00 GB, 10 images; columns caption, image" in out
    assert "10 images, 15 captions: every hash" in out
    assert "36x49" in out
    reader = ShardReader(recipe.output)
    for sample, row in enumerate(rows):
        assert list(reader.metadata(sample).captions) == row["caption"]
    assert reader.metadata(8).image_id == "train-00001-of-00002.parquet:1"


@pytest.mark.parametrize(
    ("change", "captions"),
    [
        (lambda rows: rows, ["photo 1", "a photo"]),
        (lambda rows: [{**row, "image": row["image"]["bytes"]} for row in rows], ["photo 1", "a"]),
        (lambda rows: [{"jpg": row["image"], "caption": "one"} for row in rows], ["one"]),
        (lambda rows: [{**row, "caption": None} for row in rows], [""]),
        (lambda rows: [{**row, "caption": ["", None, "x"]} for row in rows], ["x"]),
    ],
)
def test_images_are_structs_or_bytes_and_captions_texts_or_lists(
    recipe: EncodeConfig, rows: Rows, change: Callable[[Rows], Rows], captions: list[str]
) -> None:
    path = Path(recipe.images).parent / "one.parquet"
    write(path, change(rows))
    image = open_all(replace(recipe, images=str(path)))[1]
    assert image.read() == rows[1]["image"]["bytes"]
    assert [text[: len(wish)] for text, wish in zip(image.captions, captions, strict=True)] == (
        captions
    )


def test_several_columns_of_captions(recipe: EncodeConfig) -> None:
    named = replace(recipe, caption_key="alt,caption")
    assert open_all(named)[3].captions == ("picture 3", "photo 3", "a photo")
    assert open_source(named).sha256 != open_source(recipe).sha256


def test_bad_rows_are_left_out_by_name(recipe: EncodeConfig, rows: Rows) -> None:
    rows[1]["image"] = {"bytes": None, "path": "x.jpg"}
    rows[2]["image"]["bytes"] = b""
    rows[3]["image"] = None
    rows[4]["image"]["bytes"] = b"no image"
    rows[5]["image"]["bytes"] = bytes(5000)
    write(Path(recipe.images, "train-00000-of-00002.parquet"), rows[:7])
    small = replace(recipe, max_megapixels=0.001)
    reasons = [getattr(read_or_fail(image, small), "reason", "") for image in open_all(small)[1:6]]
    assert reasons[:3] == ["the row holds no bytes of an image"] * 3
    assert "not an image" in reasons[3]
    assert "--max_megapixels allows more" in reasons[4]


def test_a_broken_file_costs_its_own_rows_only(recipe: EncodeConfig) -> None:
    path = Path(recipe.images, "train-00000-of-00002.parquet")
    before = [unit.name for unit in open_source(recipe).units(4)]
    path.write_bytes(path.read_bytes()[:-100])
    source = open_source(recipe)
    assert "warning: " in source.report()
    assert "train-00000-of-00002.parquet: not Parquet" in source.report()
    broken, good = source.units(4)
    assert (broken.name, good.name) == (before[0], before[2])
    with pytest.raises(UserError, match=r"00000-of-00002.parquet: not Parquet"):
        broken.open()
    assert len(good.open()) == 3


def test_a_broken_page_is_one_line(recipe: EncodeConfig) -> None:
    path = Path(recipe.images, "train-00000-of-00002.parquet")
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"00000-of-00002.parquet: not Parquet"):
        open_source(recipe).units(4)[0].open()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": "{images}/test-*.parquet"}, r"test-\*.parquet: no such .parquet file"),
        ({"captions": "x.csv"}, "captions: x.csv is set, but source parquet has no use"),
        ({"caption_key": "text"}, "no column 'text'; .*--caption_key; .* are image, caption, alt"),
    ],
)
def test_wrong_recipes_are_one_line(
    recipe: EncodeConfig, change: dict[str, str], named: str
) -> None:
    change = {key: value.format(images=recipe.images) for key, value in change.items()}
    with pytest.raises(UserError, match=named) as caught:
        open_source(replace(recipe, **change))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"image": "a.jpg"}, "no column of bytes; .* use --source table"),
        ({"a": b"", "b": b""}, "several columns of bytes, a, b; .* in a column 'image'"),
    ],
)
def test_files_without_images_are_one_line(
    recipe: EncodeConfig, columns: dict[str, object], named: str
) -> None:
    path = Path(recipe.images).parent / "one.parquet"
    write(path, [{**columns, "caption": "x"}])
    with pytest.raises(UserError, match=named):
        open_source(replace(recipe, images=str(path)))


def test_splits_in_one_folder_are_not_mixed(recipe: EncodeConfig, rows: Rows) -> None:
    write(Path(recipe.images, "test-00000-of-00001.parquet"), rows)
    with pytest.raises(UserError, match=r"holds the splits test, train; name one of them, as "):
        open_source(recipe)
    assert len(open_all(replace(recipe, images=f"{recipe.images}/train-*.parquet"))) == 10


def test_memory_does_not_grow_with_row_groups(recipe: EncodeConfig) -> None:
    path = Path(recipe.images).parent / "one.parquet"
    rows = [{"image": bytes([n]) * 1_000_000, "caption": f"{n}"} for n in range(60)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path, write_batch_size=1, use_dictionary=False, compression="none")
    tracemalloc.start()  # pyarrow reads files through Python
    images = open_source(replace(recipe, images=str(path))).units(50)[0].open()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 50
    assert images[49].read() == rows[49]["image"]
    assert peak < 20_000_000


@pytest.mark.s3
def test_files_come_from_a_store_by_ranges(
    recipe: EncodeConfig, s3_bucket: str, faulty_s3: FaultyProxy
) -> None:
    for path in Path(recipe.images).glob("train-*"):
        storage.upload(path, f"{s3_bucket}/data/{path.name}")
    expected = finish(recipe)
    faulty_s3.plan(Fault("truncate", method="GET", key="*.parquet", times=2))
    remote = replace(recipe, images=f"{s3_bucket}/data/train-*.parquet", output=recipe.output + "2")
    assert finish(remote) == expected
    assert len(faulty_s3.hits) == 2
    data = storage.read_bytes(f"{s3_bucket}/data/train-00000-of-00002.parquet")
    storage.write_bytes(f"{s3_bucket}/data/train-00000-of-00002.parquet", data[:-100])
    assert "not Parquet" in open_source(remote).report()


def test_a_mended_file_alone_is_encoded_again(
    recipe: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(recipe.images, "train-00000-of-00002.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"1 of 4 images .*00000-of-00002.parquet \(not Parquet"):
        encode(recipe)
    shard = Path(recipe.output, "shard-00001-00000.tar")
    before = shard.stat().st_mtime_ns
    path.write_bytes(data)
    manifest = finish(recipe)
    assert (manifest.num_samples, shard.stat().st_mtime_ns) == (10, before)
    verify(ShardsConfig(url=recipe.output))
    assert "10 images, 15 captions: every hash" in capsys.readouterr().out
