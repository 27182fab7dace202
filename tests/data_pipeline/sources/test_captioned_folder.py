"""Source `captioned_folder`: images with texts beside them, and what lacks its counterpart."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, image_files

from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import inspect_shards, verify
from data_pipeline.sources import open_source
from data_pipeline.sources.base import CaptionedImage
from data_pipeline.units import open_unit
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader


@pytest.fixture
def recipe(config: EncodeConfig) -> EncodeConfig:
    """Six images, the last two in a subfolder; image n has n + 1 captions."""
    folder = Path(config.images).parent / "photos"
    for number, path in enumerate(image_files(config)[:6]):
        place = folder / ("b" if number > 3 else "") / f"v1.{number}.JPG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        lines = "\r\n".join(f"photo {number}.{line}" for line in range(number + 1))
        place.with_suffix(".txt").write_bytes(f"\ufeff{lines}\r\n\r\n".encode())
    return replace(config, source="captioned_folder", images=str(folder), captions=None)


def images_of(recipe: EncodeConfig) -> list[CaptionedImage]:
    (unit,) = open_source(recipe).units(100)
    return open_unit(unit, recipe)


def test_lines_beside_images_are_their_captions(
    recipe: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".DS_Store", "._v1.0.JPG", "README.txt", "LICENSE", ".cache/x.jpg"):
        path = Path(recipe.images, name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    finish(recipe)
    verify(ShardsConfig(url=recipe.output))
    inspect_shards(InspectConfig(url=recipe.output))
    out = capsys.readouterr().out
    assert "6 images, 21 captions\n" in out
    assert "warning" not in out
    assert "6 images, 21 captions: every hash" in out
    reader = ShardReader(recipe.output)
    names = [f"b/v1.{n}.JPG" for n in (4, 5)] + [f"v1.{n}.JPG" for n in range(4)]
    assert [reader.metadata(sample).image_id for sample in range(6)] == names
    assert reader.metadata(3).captions == ("photo 1.0", "photo 1.1")


def test_images_and_texts_without_counterpart_are_counted_and_named(
    recipe: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(recipe.images)
    (folder / "v1.2.txt").rename(folder / "v2.txt")
    (folder / "notes.csv").touch()
    (folder / "v1.3.txt").write_text("\n \n")
    (folder / "b" / "v1.4.txt").write_bytes(b"K\xe4se")
    (folder / "b" / "v1.5.txt").write_bytes(bytes(1 << 21))
    with pytest.raises(UserError, match="4 of 6 images could not be read"):
        encode(recipe)
    captured = capsys.readouterr()
    assert "warning: 1 images have no text; the first is v1.2.JPG" in captured.out
    assert "warning: 1 texts have no image; the first is v2.txt" in captured.out
    assert "warning: 1 files are neither images nor texts; the first is notes.csv" in captured.out
    assert "v1.2.JPG: no text file of the same name beside it" in captured.err
    assert "v1.3.JPG: all its captions are blank" in captured.err
    assert "b/v1.4.JPG: its text: not UTF-8" in captured.err
    assert "b/v1.5.JPG: its text: larger than the allowed 1,048,576 bytes" in captured.err
    manifest = finish(replace(recipe, tolerate=4))
    assert (manifest.num_samples, manifest.num_captions) == (2, 3)


def test_lines_end_at_line_feeds_and_carriage_returns_only(recipe: EncodeConfig) -> None:
    Path(recipe.images, "v1.0.txt").write_text("a\u2028b\x85c\x0cd\re\n", newline="")
    assert images_of(recipe)[2].captions == ("a\u2028b\x85c\x0cd", "e")


def test_texts_may_have_other_suffixes(recipe: EncodeConfig) -> None:
    Path(recipe.images, "v1.0.Caption").write_text("one")
    Path(recipe.images, "v1.0.en.tags").write_text("two")
    Path(recipe.images, "v1.1.caption").write_text("three")
    images = images_of(replace(recipe, caption_key="caption, .en.tags"))
    assert [image.captions for image in images[2:5]] == [("one", "two"), ("three",), ("",)]
    assert images[4].problem == "no text file of the same name beside it"


def test_links_out_are_not_read(recipe: EncodeConfig) -> None:
    text, secret = Path(recipe.images, "v1.0.txt"), Path(recipe.images).parent / "secret"
    secret.write_text("secret")
    text.unlink()
    text.symlink_to(secret)
    Path(recipe.images, "outside").symlink_to("/etc")
    image = images_of(recipe)[2]
    assert image.captions == ("",)
    assert image.problem.endswith("--allow_links allows it")
    assert images_of(replace(recipe, allow_links=True))[2].captions == ("secret",)
    linked = Path(recipe.images).parent / "link"
    linked.symlink_to(recipe.images)
    assert len(images_of(replace(recipe, images=str(linked)))) == 6


def test_folders_without_captioned_images_are_one_line(
    recipe: EncodeConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for images in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match="no images in this folder; expected NAME"):
            open_source(replace(recipe, images=str(images)))
    with pytest.raises(
        UserError, match=r"captions: x\.csv is set, but source captioned_folder has"
    ):
        open_source(replace(recipe, captions="x.csv"))
    with pytest.raises(UserError, match=r"image without a class; .*--source captioned_folder"):
        open_source(replace(recipe, source="folder"))


@pytest.mark.s3
def test_a_folder_in_a_store_gives_the_same_shards(recipe: EncodeConfig, s3_bucket: str) -> None:
    for name in storage.walk_files(recipe.images):
        storage.upload(Path(recipe.images, name), f"{s3_bucket}/photos/{name}")
    assert storage.walk_files(f"{s3_bucket}/photos/") == storage.walk_files(recipe.images)
    remote = replace(recipe, images=f"{s3_bucket}/photos", output=recipe.output + "2")
    assert finish(remote) == finish(recipe)


def test_a_text_that_is_added_costs_its_shard_only(recipe: EncodeConfig) -> None:
    text = Path(recipe.images, "v1.3.txt")
    content = text.read_bytes()
    text.unlink()
    with pytest.raises(UserError, match=r"1 of 6 images .*v1.3.JPG \(no text file"):
        encode(recipe)
    shard = Path(recipe.output, "shard-00000.tar")
    before = shard.stat().st_mtime_ns
    text.write_bytes(content)
    manifest = finish(recipe)
    assert (manifest.num_samples, manifest.num_captions) == (6, 21)
    assert shard.stat().st_mtime_ns == before
