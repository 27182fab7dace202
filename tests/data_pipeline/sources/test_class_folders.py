"""Source `folder`: classes by name, labels instead of captions, in memory and in shards."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from encoded_files import finish, image_files
from PIL import Image, ImageOps

from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig
from data_pipeline.shard_tools import inspect_shards, stats, verify
from data_pipeline.sources import open_source
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader

LABELS = [0, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.fixture
def labelled(config: EncodeConfig) -> EncodeConfig:
    """Seven images of zebras and two of ants, and a recipe for them without a text encoder."""
    folder = Path(config.images).parent / "classes"
    for number, path in enumerate(image_files(config)[:9]):
        place = folder / ("ant" if number in (3, 5) else "zebra") / f"{number}.v1.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return replace(
        config, source="folder", images=str(folder), captions=None, text_encoder=None, flip=True
    )


def test_images_alternate_between_sorted_classes(labelled: EncodeConfig) -> None:
    Path(labelled.images, "ant", "notes.txt").touch()
    Path(labelled.images, "README.txt").touch()
    Path(labelled.images, "__MACOSX").mkdir()
    Path(labelled.images, "ant", "._3.v1.JPEG").touch()
    source = open_source(labelled)
    images = [image for unit in source.units(4) for image in unit.open()]
    assert source.classes == ("ant", "zebra")
    assert [image.label for image in images] == LABELS
    names = ["ant/3.v1.JPEG", "zebra/0.v1.JPEG", "ant/5.v1.JPEG"]
    assert [image.name for image in images[:3]] == names
    assert "9 images in 2 classes" in source.report()
    assert "3 files and folders are not images" in source.report()


def test_a_folder_inside_a_class_is_counted_and_named(labelled: EncodeConfig) -> None:
    Path(labelled.images, "ant", "more").mkdir()
    report = open_source(labelled).report()
    assert "1 files and folders are not images and are ignored; the first is ant/more" in report


def test_shards_hold_labels_and_flips(
    labelled: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = finish(labelled)
    assert (manifest.classes, manifest.text, manifest.num_captions) == (("ant", "zebra"), None, 0)
    assert not Path(labelled.output, "null_context.npy").exists()
    reader = ShardReader(labelled.output)
    assert [reader.label(sample) for sample in range(9)] == LABELS
    assert reader.metadata(2).image_id == "ant/5.v1.JPEG"
    verify(ShardsConfig(url=labelled.output))
    stats(ShardsConfig(url=labelled.output))
    inspect_shards(InspectConfig(url=labelled.output))
    out = capsys.readouterr().out
    assert "2 classes: every hash" in out
    assert "2; 2 to 7, mean 4.50 images per class" in out
    assert "horizontal flips" in out
    assert "zebra\n" in out
    url = f"{labelled.output}/shard-{{00000..00002}}.tar"
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [sample["cls"] for sample in found] == LABELS
    assert found[0]["flipped.npy"].shape == found[0]["moments.npy"].shape


def test_flipped_moments_are_those_of_the_flipped_image(labelled: EncodeConfig) -> None:
    other = replace(labelled, images=labelled.images + "_flipped", output=labelled.output + "2")
    for path in Path(labelled.images).rglob("*.JPEG"):
        flipped = Path(other.images, path.relative_to(labelled.images))
        flipped.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.save(path, format="PNG")  # lossless, unlike JPEG
        ImageOps.mirror(image).save(flipped, format="PNG")
    finish(labelled)
    finish(other)
    left, right = ShardReader(labelled.output), ShardReader(other.output)
    for sample in range(9):
        np.testing.assert_array_equal(left.moments(sample, hflip=True), right.moments(sample))
        np.testing.assert_array_equal(left.moments(sample), right.moments(sample, hflip=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (shutil.rmtree, "missing or empty folder"),
        (lambda folder: (folder / "bee").mkdir(), "bee: no images"),
        (lambda folder: (folder / "loose.png").touch(), "loose.png: image without a class"),
        (
            lambda folder: (folder / "out").symlink_to("/etc"),
            "out: a link leads out .*--allow_links",
        ),
        (lambda folder: (folder / "loop").symlink_to("loop"), "loop: Too many levels"),
        (lambda folder: (folder / "a\033[2J").mkdir(), r"a\\x1b\[2J: rename this class"),
        (
            lambda folder: (folder / "x\udce9").mkdir(),
            r"x\\udce9: rename this class",
        ),
    ],
)
def test_a_malformed_folder_is_one_line(
    labelled: EncodeConfig, change: Callable[[Path], object], named: str
) -> None:
    change(Path(labelled.images))
    with pytest.raises(UserError, match=named) as caught:
        open_source(labelled)
    assert "\n" not in str(caught.value)


def test_captions_are_an_error(labelled: EncodeConfig) -> None:
    with pytest.raises(UserError, match=r"captions: x\.json is set, but source folder has no use"):
        open_source(replace(labelled, captions="x.json"))
