"""Source `coco`: order, completeness, and one clear line for each kind of wrong file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sources.coco import CocoCaptions
from ifvit.errors import UserError


def read(coco: Path) -> CocoCaptions:
    return CocoCaptions(str(coco / "images"), str(coco / "captions_train2014.json"))


def edit(coco: Path) -> dict[str, Any]:
    content = json.loads((coco / "captions_train2014.json").read_text())
    assert isinstance(content, dict)
    return content


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
    content = edit(coco)
    for image in content["images"]:
        old = coco / "images" / image["file_name"]
        image["file_name"] = image["file_name"].removeprefix("COCO_train2014_")
        old.rename(coco / "images" / image["file_name"])
    save(coco, content)
    assert read(coco).units(4)[0].open()[0].name == "000000000003.jpg"
    assert read(coco).missing == []


def test_source_hash_follows_captions_and_ignores_where_the_folder_is(coco: Path) -> None:
    before = read(coco).sha256
    (coco / "images").rename(coco / "moved")
    assert CocoCaptions(str(coco / "moved"), str(coco / "captions_train2014.json")).sha256 == before
    (coco / "moved").rename(coco / "images")
    content = edit(coco)
    content["annotations"][0]["caption"] += "!"
    save(coco, content)
    assert read(coco).sha256 != before


def test_an_incomplete_coco_split_is_reported_before_encoding(coco: Path) -> None:
    assert "warning" not in read(coco).report()
    save(coco, {**edit(coco), "info": {"description": "COCO 2014 Dataset"}})
    assert "the complete split has 82,783 images, 414,113 captions" in read(coco).report()


def test_missing_image_files_are_reported_before_encoding(coco: Path) -> None:
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
    content = edit(coco)
    change(content)
    save(coco, content)
    with pytest.raises(UserError, match=f"captions_train2014.json: .*{named}") as caught:
        read(coco)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{not json", "[]", '"text"'])
def test_a_file_without_coco_captions_is_an_error(coco: Path, text: str) -> None:
    (coco / "captions_train2014.json").write_text(text)
    with pytest.raises(UserError, match=r"captions_train2014\.json: not"):
        read(coco)


def test_a_missing_folder_or_file_is_named(coco: Path) -> None:
    annotations = str(coco / "captions_train2014.json")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        CocoCaptions(str(coco / "nowhere"), annotations)
    with pytest.raises(UserError, match=r"nothing\.json: no such file"):
        CocoCaptions(str(coco / "images"), str(coco / "nothing.json"))
    with pytest.raises(UserError, match="is a folder"):
        CocoCaptions(str(coco / "images"), str(coco))


def test_a_folder_without_any_of_the_images_is_an_error(coco: Path) -> None:
    (coco / "other").mkdir()
    with pytest.raises(UserError, match="contains none of the 10 images"):
        CocoCaptions(str(coco / "other"), str(coco / "captions_train2014.json"))
