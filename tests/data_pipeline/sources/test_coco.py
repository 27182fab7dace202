"""Source `coco`: order, completeness, and one clear line for each kind of wrong file."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.caption_files import CocoCaptions
from ifvit.errors import UserError


def open_coco(images: Path, captions: Path, *, allow_links: bool = False) -> CocoCaptions:
    return CocoCaptions(
        EncodeConfig(
            images=str(images), captions=str(captions), output="", vae="", allow_links=allow_links
        )
    )


def read(coco: Path, *, allow_links: bool = False) -> CocoCaptions:
    captions = coco / "captions_train2014.json"
    return open_coco(coco / "images", captions, allow_links=allow_links)


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


def test_the_hash_depends_on_ids_but_not_on_captions_or_the_folder(coco: Path) -> None:
    before = read(coco).sha256
    moved = (coco / "images").rename(coco / "moved")
    assert open_coco(moved, coco / "captions_train2014.json").sha256 == before
    moved.rename(coco / "images")
    content = load(coco)
    content["annotations"][0]["caption"] += "!"
    save(coco, content)
    assert read(coco).sha256 == before
    save(coco, {**content, "images": content["images"] + [{"id": 1, "file_name": "x.jpg"}]})
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
        (lambda content: content.pop("annotations"), "annotations: Field required"),
        (lambda content: content.pop("images"), "images: Field required"),
        (lambda content: content.update(images=[]), "images: an empty list"),
        (lambda content: content["images"][0].pop("file_name"), "images.0.file_name: Field"),
        (lambda content: content["images"][0].update(id="3"), "images.0.id: .* valid integer"),
        (lambda content: content["images"][0].update(id=2**64), "id is .*beyond 64 bits"),
        (lambda content: content["annotations"][0].pop("caption"), "annotations.0.caption: Field"),
        (lambda content: content["annotations"][0].update(caption=7), "0.caption: .* string"),
        (lambda content: content["images"].append(content["images"][0]), "an id is listed twice"),
        (lambda content: content["images"].pop(), "image id 3 is not in 'images'"),
        *[
            (lambda content, name=name: content["images"][0].update(file_name=name), "file_name is")
            for name in ("../x.jpg", "/etc/x.jpg", "a//b.jpg", "x\0.jpg", "", "http://x/y.jpg")
        ],
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


@pytest.mark.parametrize(
    "text", ["{not json", "[]", '"text"', "", b"\xff", "[" * 100_000, '{"images": ' * 100_000]
)
def test_a_file_without_coco_captions_is_an_error(coco: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (coco / "captions_train2014.json").write_bytes(data)
    with pytest.raises(UserError, match=r"captions_train2014\.json: "):
        read(coco)


def test_an_image_without_captions_is_left_out_by_name(coco: Path) -> None:
    content = load(coco)
    content["annotations"].pop(0)
    save(coco, content)
    image = read(coco).images[0]
    assert (image.captions, image.problem) == ((), "the annotations hold no caption of it")


def test_a_caption_of_null_is_blank(coco: Path) -> None:
    content = load(coco)
    content["annotations"][0]["caption"] = None
    save(coco, content)
    captions = {image.image_id: image.captions for image in read(coco).images}
    assert "" in captions[content["annotations"][0]["image_id"]]


def test_a_link_out_of_the_folder_is_read_only_when_allowed(coco: Path) -> None:
    path = coco / "images" / "COCO_train2014_000000000003.jpg"
    path.rename(coco / "outside.jpg")
    path.symlink_to(coco / "outside.jpg")
    with pytest.raises(UserError, match=r"a link leads out .*--allow_links"):
        read(coco).images[0].read()
    assert read(coco, allow_links=True).images[0].read() == (coco / "outside.jpg").read_bytes()


def test_a_file_as_large_as_coco_is_parsed_within_seconds_and_half_a_gigabyte(
    tmp_path: Path,
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000000000.jpg").touch()
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "license": 3} for n in range(8_000)]
    annotations = [
        {"id": n, "image_id": n // 5, "caption": f"a photo of a dog on a beach number {n}"}
        for n in range(40_000)
    ]
    save(tmp_path, {"images": images, "annotations": annotations})
    tracemalloc.start()
    source = read(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.images) == 8_000
    assert peak < 50e6  # a tenth of COCO's training split


@pytest.mark.parametrize(
    ("images", "captions", "named"),
    [
        ("nowhere", "captions_train2014.json", "nowhere: no such folder"),
        ("images", "nothing.json", r"nothing\.json: no such file"),
        ("images", "", "is a folder"),
        ("", "captions_train2014.json", "contains none of the images"),
    ],
)
def test_wrong_paths_are_named(coco: Path, images: str, captions: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        open_coco(coco / images, coco / captions)
