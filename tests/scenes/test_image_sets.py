"""Image sets on disk: their layouts, equal bytes for equal arguments, foreign images kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.folders import ClassFolders
from ifvit.errors import UserError
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.image_sets import class_scenes, render_class_set, render_scene_set
from ifvit.scenes.score import score_image

Render = Callable[..., None]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "annotations" / name).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images in class folders."""
    folder = tmp_path_factory.mktemp("classes")
    render_class_set(folder, "train2014", 80)
    return folder


def test_files_and_records_are_those_of_coco_and_captions_describe_the_pixels(
    tmp_path: Path,
) -> None:
    render_scene_set(tmp_path, "val2014", 20, seed=3)
    captions = read(tmp_path, "captions_val2014.json")
    assert {"info", "images", "annotations"} == set(captions)
    assert len(captions["annotations"]) == 5 * 20
    assert {"image_id", "id", "caption"} == set(captions["annotations"][0])
    scenes = {one["image_id"]: parse_caption(one["caption"]) for one in captions["annotations"]}
    for image in captions["images"]:
        assert image["file_name"] == f"COCO_val2014_{image['id']:012d}.jpg"
        picture = Image.open(tmp_path / "val2014" / image["file_name"])
        assert picture.size == (image["width"], image["height"]) == (64, 64)
        score = score_image(np.asarray(picture), scenes[image["id"]])
        assert (score.count, score.colour, score.kind) == (True, True, True)


def test_no_two_splits_share_an_image_or_annotation_id(tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {"images": set(), "annotations": set()}
    for split in ("train2014", "val2014", "train2017", "val2017"):
        render_scene_set(tmp_path, split, 5, seed=1)
        for part, ids in seen.items():
            found = {record["id"] for record in read(tmp_path, f"captions_{split}.json")[part]}
            assert not found & ids
            ids |= found


def test_a_class_name_is_a_caption_and_its_images_show_it(classes: Path) -> None:
    scenes = class_scenes()
    assert len(scenes) == 75
    assert all(parse_caption(name.replace("_", " ")) == scene for name, scene in scenes.items())
    recipe = EncodeConfig(source="folder", images=str(classes / "train2014"), output="", vae="")
    assert ClassFolders(recipe).classes == tuple(sorted(scenes))
    paths = sorted(Path(classes, "train2014").rglob("*.jpg"))
    assert len(paths) == 80
    scores = [score_image(np.asarray(Image.open(p)), scenes[p.parent.name]) for p in paths]
    assert all(score.colour and score.relation is None for score in scores)
    assert sum(score.count and score.kind for score in scores) >= 76  # JPEG costs a shape or two


@pytest.mark.parametrize("render", [render_scene_set, render_class_set])
def test_the_arguments_decide_the_bytes(render: Render, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        render(tmp_path / name, "train2014", 30, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")
    render(tmp_path / "one", "val2014", 30, seed=1)
    splits = [contents(tmp_path / "one" / split) for split in ("train2014", "val2014")]
    assert not set(splits[0].values()) & set(splits[1].values())


@pytest.mark.parametrize("render", [render_scene_set, render_class_set])
def test_a_finished_set_is_kept_and_any_other_is_rendered_again(
    render: Render, tmp_path: Path
) -> None:
    render(tmp_path, "train2014", 10, seed=1)
    finished = contents(tmp_path)
    image = next((tmp_path / "train2014").rglob("*.jpg"))
    time = image.stat().st_mtime_ns
    render(tmp_path, "train2014", 10, seed=1)
    assert image.stat().st_mtime_ns == time
    image.unlink()
    last = "captions" if render is render_scene_set else "classes"
    (tmp_path / "annotations" / f"{last}_train2014.json").unlink()
    render(tmp_path, "train2014", 10, seed=1)
    assert contents(tmp_path) == finished
    render(tmp_path, "train2014", 4, seed=1)
    assert len(list((tmp_path / "train2014").rglob("*.jpg"))) == 4


@pytest.mark.parametrize("render", [render_scene_set, render_class_set])
def test_images_of_another_origin_are_never_touched(render: Render, tmp_path: Path) -> None:
    own = tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(UserError, match="another origin"):
        render(tmp_path, "train2014", 10, seed=1)
    assert own.read_bytes() == b"mine"


@pytest.mark.parametrize(("split", "count"), [("test2015", 5), ("train2014", 0)])
def test_an_impossible_set_is_a_user_error(tmp_path: Path, split: str, count: int) -> None:
    with pytest.raises(UserError, match="need a split of"):
        render_scene_set(tmp_path, split, count, seed=1)


def test_only_files_of_the_set_are_deleted_and_none_through_a_link(tmp_path: Path) -> None:
    folder, private = tmp_path / "set", tmp_path / "private"
    render_class_set(folder, "train2014", 2)
    private.mkdir()
    own, precious = folder / "train2014/mine.jpg", private / "000000000001.jpg"
    for path in (own, precious):
        path.write_bytes(b"precious")
    render_class_set(folder, "train2014", 3)
    assert own.read_bytes() == b"precious"
    for place in (folder / "train2014", folder / "train2014/one_red_circle"):
        place.rename(tmp_path / "moved")
        place.symlink_to(private)
        with pytest.raises(UserError, match="does not lead inside"):
            render_class_set(folder, "train2014", 4)
        place.unlink()
        (tmp_path / "moved").rename(place)
    mark = folder / "annotations/scenes_train2014.json"
    mark.write_text(mark.read_text().replace('"num_images": 4', '"num_images": 5'))
    with pytest.raises(UserError, match=r"scenes_train2014\.json: damaged"):
        render_class_set(folder, "train2014", 5)
    assert precious.read_bytes() == own.read_bytes() == b"precious"
