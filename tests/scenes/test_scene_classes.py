"""Class folders say what their images show, and are the encode job's `folder` source."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.class_folders import ClassFolders
from ifvit.errors import UserError
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.image_sets import class_scenes, render_class_set
from ifvit.scenes.score import score_image


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    render_class_set(folder, "train2014", 80)
    return folder


def test_a_class_name_is_a_caption_of_its_scene() -> None:
    scenes = class_scenes()
    assert len(scenes) == 75
    for name, scene in scenes.items():
        assert parse_caption(name.replace("_", " ")) == scene


def test_every_image_shows_what_its_folder_says(drawn: Path) -> None:
    scenes = class_scenes()
    paths = sorted(Path(drawn, "train2014").rglob("*.jpg"))
    assert len(paths) == 80
    scores = [score_image(np.asarray(Image.open(p)), scenes[p.parent.name]) for p in paths]
    assert all(score.colour and score.relation is None for score in scores)
    assert sum(score.count and score.kind for score in scores) >= 76  # JPEG costs a shape or two


def test_the_folder_source_reads_all_classes(drawn: Path) -> None:
    source = ClassFolders(str(drawn / "train2014"), None)
    assert source.classes == tuple(sorted(class_scenes()))


def test_the_same_set_is_drawn_again_and_splits_share_no_image(drawn: Path, tmp_path: Path) -> None:
    render_class_set(tmp_path, "train2014", 80)
    assert contents(tmp_path) == contents(drawn)
    render_class_set(tmp_path, "val2014", 75)
    images = contents(tmp_path / "train2014"), contents(tmp_path / "val2014")
    assert not set(images[0].values()) & set(images[1].values())


def test_an_unfinished_set_is_drawn_anew_and_others_images_are_left_alone(
    drawn: Path, tmp_path: Path
) -> None:
    render_class_set(tmp_path, "train2014", 90)
    (tmp_path / "annotations" / "classes_train2014.json").unlink()
    render_class_set(tmp_path, "train2014", 80)
    assert contents(tmp_path) == contents(drawn)
    (tmp_path / "val2014" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="holds images of another origin"):
        render_class_set(tmp_path, "val2014", 75)
