"""Source `coco`: order, completeness, and one clear line for each kind of wrong file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sources.coco import CocoCaptions
from ifvit.errors import UserError


def read(coco: Path) -> CocoCaptions:
    return CocoCaptions(str(coco / "images"), str(coco / "captions_train2014.json"))


def load(coco: Path) -> Any:
    return json.loads((coco / "captions_train2014.json").read_text())


def save(coco: Path, content: object) -> None:
    (coco / "captions_train2014.json").write_text(json.dumps(content))


def test_images_are_sorted_by_id_and_keep_all_captions_in_file_order(coco: Path) -> None:
    images = [image for unit in read(coco).units(4) for image in unit.open()]
    assert [image.image_id for image in images] == [7 * number + 3 for number in range(10)]
    assert images[2].captions == ("a dog", "cat number 2", "a dog")
    path = coco / "images" / "COCO_train2014_000000000017.jpg"
    assert images[2].read() == path.read_bytes()
    assert "10 images, 19 captions" in read(coco).report()


def test_the_2017_layout_is_read_the_same_way(coco: Path) -> None:
    content = load(coco)
    for image in content["images"]:
        old = coco / "images" / image["file_name"]
        image["file_name"] = image["file_name"].removeprefix("COCO_train2014_")
        old.rename(coco / "images" / image["file_name"])
    save(coco, content)
    assert read(coco).units(4)[0].open()[0].name == "000000000003.jpg"
    assert read(coco).missing == []


def test_the_hash_depends_on_captions_but_not_on_the_folder(coco: Path) -> None:
    before = read(coco).sha256
    moved = (coco / "images").rename(coco / "moved")
    assert CocoCaptions(str(moved), str(coco / "captions_train2014.json")).sha256 == before
    moved.rename(coco / "images")
    content = load(coco)
    content["annotations"][0]["caption"] += "!"
    save(coco, content)
    assert read(coco).sha256 != before


def test_an_incomplete_split_is_reported_before_encoding(coco: Path) -> None:
    assert "warning" not in read(coco).report()
    save(coco, {**load(coco), "info": {"description": "COCO 2014 Dataset"}})
    assert "the complete split has 82,783 images, 414,113 captions" in read(coco).report()
    (coco / "images" / "COCO_train2014_000000000017.jpg").unlink()
    assert "1 image files are missing" in read(coco).report()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("annotations"), "needs a list under the key 'annotations'"),
        (lambda content: content.pop("images"), "needs a list under the key 'images'"),
        (lambda content: content["images"][0].pop("file_name"), "'images' has no 'file_name'"),
        (lambda content: content["annotations"][0].pop("caption"), "has no 'caption'"),
        (lambda content: content["annotations"].pop(0), r"image id 3 \(.*\) has no caption"),
        (lambda content: content["images"].append(content["images"][0]), "is listed twice"),
        (lambda content: content["images"].pop(), "a caption has image id 3, which is not in"),
    ],
)
def test_wrong_annotations_are_one_line_that_names_the_key(
    coco: Path, change: Any, named: str
) -> None:
    content = load(coco)
    change(content)
    save(coco, content)
    with pytest.raises(UserError, match=f"captions_train2014.json: .*{named}") as caught:
        read(coco)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{not json", "[]", '"text"'])
def test_a_file_without_coco_captions_is_an_error(coco: Path, text: str) -> None:
    (coco / "captions_train2014.json").write_text(text)
    with pytest.raises(UserError, match=r"captions_train2014\.json: (not|Invalid)"):
        read(coco)


@pytest.mark.parametrize(
    ("images", "captions", "named"),
    [
        ("nowhere", "captions_train2014.json", "nowhere: no such folder"),
        ("images", "nothing.json", r"nothing\.json: no such file"),
        ("images", "", "is a folder"),
        ("", "captions_train2014.json", "contains none of the 10 images"),
    ],
)
def test_wrong_paths_are_named(coco: Path, images: str, captions: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        CocoCaptions(str(coco / images), str(coco / captions))
