"""Source `webdataset`: tars of images and captions as img2dataset writes them."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import hashes

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.sources.tars import WebDatasetTars
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import Manifest, ShardReader

Members = dict[str, bytes]


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(config: EncodeConfig, number: int) -> Members:
    """One sample of img2dataset: image, caption twice, and what else it knows."""
    image = sorted(Path(config.images).iterdir())[number].read_bytes()
    metadata = json.dumps({"caption": f"photo {number}", "url": "http://…", "key": str(number)})
    return {
        f"{number:09d}.jpg": image,
        f"{number:09d}.txt": f"photo {number}".encode(),
        f"{number:09d}.json": metadata.encode(),
    }


@pytest.fixture
def tars(config: EncodeConfig) -> EncodeConfig:
    """00000.tar of three samples with statistics, 00001.tar of four without."""
    folder = Path(config.images).parent / "tars"
    members = [sample(config, number) for number in range(7)]
    for name, part in (("00000", members[:3]), ("00001", members[3:])):
        write_tar(folder / f"{name}.tar", {k: v for one in part for k, v in one.items()})
    (folder / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return replace(config, source="webdataset", images=str(folder), captions=None)


def finished(config: EncodeConfig) -> Manifest:
    manifest = encode(config)
    assert manifest is not None
    return manifest


def test_one_tar_becomes_one_shard(tars: EncodeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = finished(tars)
    assert "2 tars, 0.00 GB; 3 samples in the 1 tars with statistics" in capsys.readouterr().out
    assert [entry.num_samples for entry in manifest.shards] == [3, 4]
    reader = ShardReader(tars.output)
    for number in range(7):
        assert reader.metadata(number).image_id == f"{number:09d}"
        assert reader.metadata(number).captions == (f"photo {number}",)


def test_the_images_are_those_of_a_coco_source(tars: EncodeConfig, config: EncodeConfig) -> None:
    finished(tars)
    other = replace(config, output=config.output + "_coco", samples_per_shard=3)
    finished(other)
    left, right = ShardReader(tars.output), ShardReader(other.output)
    assert [left.moments(n).tobytes() for n in range(3)] == [
        right.moments(n).tobytes() for n in range(3)
    ]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00001}.tar", "/0000?.tar"])
def test_tars_are_found_by_folder_and_by_pattern(tars: EncodeConfig, pattern: str) -> None:
    source = WebDatasetTars(tars.images + pattern, None)
    assert [unit.open()[0].name[:9] for unit in source.units(1)] == ["00000.tar", "00001.tar"]
    assert [unit.num_images for unit in source.units(1)] == [3, None]


def test_captions_come_from_json_when_there_is_no_text(tars: EncodeConfig) -> None:
    members = sample(tars_of(tars), 0) | sample(tars_of(tars), 1)
    write_tar(Path(tars.images, "00000.tar"), {k: v for k, v in members.items() if "txt" not in k})
    images = WebDatasetTars(tars.images, None).units(1)[0].open()
    assert [image.captions for image in images] == [("photo 0",), ("photo 1",)]


def tars_of(tars: EncodeConfig) -> EncodeConfig:
    """The recipe of the images that the tars were made from."""
    return replace(tars, images=str(Path(tars.images).parent / "images"))


def test_a_sample_without_image_or_caption_is_a_named_failure(tars: EncodeConfig) -> None:
    members = {"a.txt": b"no image", **sample(tars_of(tars), 0), "b.jpg": b"", "b.json": b"{}"}
    write_tar(Path(tars.images, "00000.tar"), members)
    with pytest.raises(UserError, match=r"2 of 7 images .*00000.tar/a \(the tar contains no image"):
        encode(tars)
    manifest = finished(replace(tars, tolerate=2))
    assert manifest.num_samples == 5
    marker = storage.read_json(f"{tars.output}/completed/shard-00000.json")
    assert [failure["reason"] for failure in marker["failures"]] == [
        "the tar contains no image (jpg, png, webp) for this key",
        "the tar contains no caption (txt, or in json) for this key",
    ]
    path = Path(tars.images, "00000.tar")
    path.write_bytes(b"x" * path.stat().st_size)  # an error if a rerun read the tar again
    assert finished(replace(tars, tolerate=2)) == manifest


def test_an_empty_tar_is_an_empty_shard(tars: EncodeConfig) -> None:
    write_tar(Path(tars.images, "00000.tar"), {})
    assert [entry.num_samples for entry in finished(tars).shards] == [0, 4]


def test_two_tasks_write_the_same_bytes_as_one(tars: EncodeConfig) -> None:
    other = replace(tars, output=tars.output + "_shared", num_tasks=2)
    finished(tars)
    encode(replace(other, task=1))
    encode(replace(other, task=0))
    assert hashes(other) == hashes(tars)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("nowhere", "nowhere: no such tar"),
        ("/{00000..00002}.tar", "00002.tar: no such tar"),
        ("/{00000.tar", "Unbalanced braces"),
    ],
)
def test_missing_tars_are_named(tars: EncodeConfig, pattern: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        WebDatasetTars(tars.images + pattern, None)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def cut_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])


def overwrite(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 100)


def repeat(path: Path) -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("000000001.txt")
        tar.addfile(info, io.BytesIO())


def break_json(path: Path) -> None:
    write_tar(path, {"x.jpg": b"", "x.json": b"{"})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut, "not a complete tar"),
        (cut_between_members, "not a complete tar"),
        (overwrite, "not a complete tar"),
        (repeat, "contains 000000001.txt twice"),
        (break_json, "x: malformed caption"),
        (
            lambda path: write_tar(path, {"a/b.jpg": b"", "a_b.jpg": b""}),
            "differ only by / and _",
        ),
    ],
)
def test_a_malformed_tar_is_one_line(tars: EncodeConfig, damage: object, named: str) -> None:
    assert callable(damage)
    damage(Path(tars.images, "00000.tar"))
    with pytest.raises(UserError, match=f"00000.tar: .*{named}") as caught:
        encode(tars)
    assert "\n" not in str(caught.value)


def test_captions_outside_the_tars_are_an_error(tars: EncodeConfig) -> None:
    with pytest.raises(UserError, match="tars contain their captions"):
        encode(replace(tars, captions="captions.json"))


def test_a_replaced_tar_is_another_job(tars: EncodeConfig) -> None:
    finished(tars)
    with tarfile.open(Path(tars.images, "00001.tar"), "a") as tar:
        info = tarfile.TarInfo("new.txt")
        info.size = 10240
        tar.addfile(info, io.BytesIO(bytes(10240)))
    with pytest.raises(UserError, match="source_sha256"):
        encode(tars)
