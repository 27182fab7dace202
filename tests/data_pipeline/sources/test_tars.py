"""Source `webdataset`: tars of images and captions as img2dataset writes them."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, image_files

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.sources.tars import WebDatasetTars
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader

Members = dict[str, bytes]


def write_tar(path: Path, members: Members, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_sample(image: Path, number: int) -> Members:
    """One sample of img2dataset: image, caption, and metadata that contain the caption too."""
    metadata = {"caption": f"photo {number}", "url": "http://…", "key": str(number)}
    return {
        f"{number:09d}.jpg": image.read_bytes(),
        f"{number:09d}.txt": f"photo {number}".encode(),
        f"{number:09d}.json": json.dumps(metadata).encode(),
    }


@pytest.fixture
def samples(config: EncodeConfig) -> list[Members]:
    return [make_sample(path, number) for number, path in enumerate(image_files(config)[:7])]


@pytest.fixture
def tars(config: EncodeConfig, samples: list[Members]) -> EncodeConfig:
    """00000.tar with three samples and statistics, 00001.tar with four samples."""
    folder = Path(config.images).parent / "tars"
    for name, part in (("00000", samples[:3]), ("00001", samples[3:])):
        write_tar(folder / f"{name}.tar", {k: v for sample in part for k, v in sample.items()})
    (folder / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return replace(config, source="webdataset", images=str(folder), captions=None)


def test_one_tar_becomes_one_shard_with_the_latents_of_its_images(
    tars: EncodeConfig, config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = finish(tars)
    assert "2 tars, 0.00 GB; 3 samples in the 1 tars with statistics" in capsys.readouterr().out
    assert [entry.num_samples for entry in manifest.shards] == [3, 4]
    reader = ShardReader(tars.output)
    for number in range(7):
        assert reader.metadata(number).image_id == f"{number:09d}"
        assert reader.metadata(number).captions == (f"photo {number}",)
    coco = replace(config, output=config.output + "_coco", samples_per_shard=3)
    finish(coco)
    for number in range(3):
        expected = ShardReader(coco.output).moments(number)
        assert reader.moments(number).tobytes() == expected.tobytes()


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00001}.tar", "/0000?.tar"])
def test_tars_are_found_by_folder_and_by_pattern(tars: EncodeConfig, pattern: str) -> None:
    units = WebDatasetTars(tars.images + pattern, None).units(1)
    assert [unit.open()[0].name[:9] for unit in units] == ["00000.tar", "00001.tar"]
    assert [unit.num_images for unit in units] == [3, None]


def test_captions_come_from_json_when_there_is_no_text(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    members = {k: v for k, v in (samples[0] | samples[1]).items() if not k.endswith("txt")}
    write_tar(Path(tars.images, "00000.tar"), members)
    images = WebDatasetTars(tars.images, None).units(1)[0].open()
    assert [image.captions for image in images] == [("photo 0",), ("photo 1",)]


def test_a_sample_without_image_or_caption_is_a_named_failure(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    path = Path(tars.images, "00000.tar")
    write_tar(path, {"a.txt": b"no image", **samples[0], "b.jpg": b"", "b.json": b"{}"})
    with pytest.raises(UserError, match=r"2 of 7 images .*00000.tar/a \(the tar contains no image"):
        encode(tars)
    manifest = finish(replace(tars, tolerate=2))
    assert manifest.num_samples == 5
    marker = storage.read_json(f"{tars.output}/completed/shard-00000.json")
    assert [failure["reason"] for failure in marker["failures"]] == [
        "the tar contains no image (jpg, png, webp) for this key",
        "the tar contains no caption (txt, or in json) for this key",
    ]
    path.write_bytes(b"x" * path.stat().st_size)  # an error if a rerun read the tar again
    assert finish(replace(tars, tolerate=2)) == manifest


def test_an_empty_tar_is_an_empty_shard(tars: EncodeConfig) -> None:
    write_tar(Path(tars.images, "00000.tar"), {})
    assert [entry.num_samples for entry in finish(tars).shards] == [0, 4]


@pytest.mark.parametrize(
    ("pattern", "captions", "named"),
    [
        ("nowhere", None, "nowhere: no such tar"),
        ("/{00000..00002}.tar", None, "00002.tar: no such tar"),
        ("/{00000.tar", None, "Unbalanced braces"),
        ("", "captions.json", r"captions\.json is set, but tars contain their captions"),
    ],
)
def test_missing_tars_and_superfluous_captions_are_named(
    tars: EncodeConfig, pattern: str, captions: str | None, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        WebDatasetTars(tars.images + pattern, captions)


def cut_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a complete tar"),
        (cut_between_members, "not a complete tar"),
        (lambda path: path.write_bytes(b"<html>not found" * 100), "not a complete tar"),
        (lambda path: write_tar(path, {"000000001.txt": b""}, "a"), "contains 000000001.txt twice"),
        (lambda path: write_tar(path, {"x.jpg": b"", "x.json": b"{"}), "x: malformed caption"),
        (lambda path: write_tar(path, {"a/b.jpg": b"", "a_b.jpg": b""}), "differ only by / and _"),
    ],
)
def test_a_malformed_tar_is_one_line(
    tars: EncodeConfig, damage: Callable[[Path], object], named: str
) -> None:
    damage(Path(tars.images, "00000.tar"))
    with pytest.raises(UserError, match=f"00000.tar: .*{named}") as caught:
        encode(tars)
    assert "\n" not in str(caught.value)


def test_a_replaced_tar_is_another_job(tars: EncodeConfig) -> None:
    finish(tars)
    write_tar(Path(tars.images, "00001.tar"), {"new.txt": bytes(10240)}, "a")
    with pytest.raises(UserError, match="source_sha256"):
        encode(tars)
