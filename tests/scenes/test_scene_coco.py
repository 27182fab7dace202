"""A drawn set on disk: COCO's layout, the same bytes every time, nobody's images lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ifvit.errors import UserError
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.image_sets import render_scene_set
from ifvit.scenes.score import find_objects
from ifvit.storage import sha256_of


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "annotations" / name).read_text())


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        render_scene_set(tmp_path / name, "train2014", 30, seed=1)
    render_scene_set(tmp_path / "other", "train2014", 30, seed=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert hashes(tmp_path / "one") != hashes(tmp_path / "other")


def test_files_and_records_are_those_of_coco(tmp_path: Path) -> None:
    render_scene_set(tmp_path, "val2014", 20, seed=1)
    captions, instances = (read(tmp_path, f"{n}_val2014.json") for n in ("captions", "instances"))
    assert {"info", "licenses", "images", "annotations"} == set(captions)
    assert set(instances) == set(captions) | {"categories"}
    for image in captions["images"]:
        assert image["file_name"] == f"COCO_val2014_{image['id']:012d}.jpg"
        with Image.open(tmp_path / "val2014" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (64, 64)
    assert len(captions["annotations"]) == 5 * 20
    assert {"image_id", "id", "caption"} == set(captions["annotations"][0])
    assert [record["name"] for record in instances["categories"]] == [
        "circle",
        "square",
        "triangle",
    ]


def test_instances_captions_and_pixels_tell_the_same_story(tmp_path: Path) -> None:
    render_scene_set(tmp_path, "train2014", 20, seed=3)
    instances = read(tmp_path, "instances_train2014.json")
    kinds = {record["id"]: record["name"] for record in instances["categories"]}
    told = {
        record["image_id"]: parse_caption(record["caption"])
        for record in read(tmp_path, "captions_train2014.json")["annotations"]
    }
    for image in instances["images"]:
        drawn = [one for one in instances["annotations"] if one["image_id"] == image["id"]]
        assert len(drawn) == sum(group.count for group in told[image["id"]].groups)
        pixels = np.asarray(Image.open(tmp_path / "train2014" / image["file_name"]))
        seen = sorted((one.colour, one.kind) for one in find_objects(pixels))
        assert seen == sorted((one["colour"], kinds[one["category_id"]]) for one in drawn)
        for one in drawn:
            corners = np.reshape(one["segmentation"][0], (-1, 2))
            x, y, width, height = one["bbox"]
            np.testing.assert_allclose(corners.min(axis=0), (x, y), atol=0.05)
            np.testing.assert_allclose(corners.max(axis=0), (x + width, y + height), atol=0.05)
            assert 0.4 * width * height < one["area"] < 1.01 * width * height


def test_no_two_splits_share_an_image_or_annotation_id(tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {"images": set(), "annotations": set()}
    for split in ("train2014", "val2014", "train2017", "val2017"):
        render_scene_set(tmp_path, split, 5, seed=1)
        for part, ids in seen.items():
            found = {record["id"] for record in read(tmp_path, f"captions_{split}.json")[part]}
            assert not found & ids
            ids |= found


def test_a_finished_set_is_left_alone_and_an_interrupted_one_is_completed(tmp_path: Path) -> None:
    render_scene_set(tmp_path, "train2014", 10, seed=1)
    finished = hashes(tmp_path)
    image = next((tmp_path / "train2014").iterdir())
    time = image.stat().st_mtime_ns
    render_scene_set(tmp_path, "train2014", 10, seed=1)
    assert image.stat().st_mtime_ns == time
    image.unlink()
    (tmp_path / "annotations" / "captions_train2014.json").unlink()
    render_scene_set(tmp_path, "train2014", 10, seed=1)
    assert hashes(tmp_path) == finished


def test_other_parameters_replace_the_set(tmp_path: Path) -> None:
    render_scene_set(tmp_path, "train2014", 10, seed=1)
    render_scene_set(tmp_path, "train2014", 4, seed=1)
    assert len(list((tmp_path / "train2014").iterdir())) == 4


def test_images_of_another_origin_are_never_touched(tmp_path: Path) -> None:
    own = tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(UserError, match="another origin"):
        render_scene_set(tmp_path, "train2014", 10, seed=1)
    assert own.read_bytes() == b"mine"


@pytest.mark.parametrize(("split", "count"), [("test2015", 5), ("train2014", 0)])
def test_an_impossible_set_is_a_user_error(tmp_path: Path, split: str, count: int) -> None:
    with pytest.raises(UserError, match="need a split of"):
        render_scene_set(tmp_path, split, count, seed=1)
