"""The encode job counts the images that each rule touched, and leaves out small and long ones."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import finish, image_files
from PIL import Image

from data_pipeline.completion import read_marker
from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.errors import UserError
from ifvit.image_rules import CMYK, CUT_TO_8_BITS, PLACED, ImageRules
from ifvit.shards.format import read_manifest


def test_the_summary_counts_the_images_that_each_rule_touched_and_names_the_first(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    files = image_files(config)
    for path in files[2:5]:
        Image.new("RGBA", (40, 40), (0, 255, 0, 0)).save(path, "PNG")
    Image.new("I;16", (40, 40)).save(files[6], "PNG")
    Image.new("CMYK", (40, 40)).save(files[7], "JPEG")
    config = replace(config, image_rules=ImageRules(background="gray"))
    manifest = finish(config)
    said = capsys.readouterr().out
    assert f"note: 3 images: {PLACED.format('gray')}; the first is {files[2].name}\n" in said
    assert f"note: 1 images: {CUT_TO_8_BITS}; the first is {files[6].name}\n" in said
    assert f"note: 1 images: {CMYK}; the first is {files[7].name}\n" in said
    assert said.count("note: ") == 3
    assert manifest.image_rules == read_manifest(config.output).image_rules == config.image_rules
    with pytest.raises(UserError, match=r"job \(background is gray there, white now"):
        encode(replace(config, image_rules=ImageRules()))


def test_small_and_long_images_are_left_out_counted_and_allowed_by_a_field(
    config: EncodeConfig,
) -> None:
    files = image_files(config)
    Image.new("RGB", (15, 40)).save(files[0])
    Image.new("RGB", (40, 12)).save(files[1])
    Image.new("RGB", (16, 33)).save(files[9])  # just half of the image size of 32
    with pytest.raises(UserError, match=r"2 of 10 .*fewer than 16; --min_side allows less"):
        encode(config)
    finish(replace(config, min_side=12))
    narrow = replace(config, min_side=12, max_aspect_ratio=2.0)
    with pytest.raises(UserError, match=r"3 of 10 .*above 2; --max_aspect_ratio allows more"):
        encode(narrow)
    assert finish(replace(narrow, tolerate=3)).num_samples == 7
    assert read_marker(config.output, "shard-00002").failures[0].file == files[9].name
    assert finish(replace(config, min_side=12)).num_samples == 10


def test_a_tar_is_opened_again_for_its_small_images_only_when_the_limit_was_lowered(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, side in (("large", 40), ("small", 9)):
            Image.new("RGB", (side, side)).save(tmp_path / f"{key}.png")
            (tmp_path / f"{key}.txt").write_text("a dog")
            for suffix in ("png", "txt"):
                tar.add(tmp_path / f"{key}.{suffix}", f"{key}.{suffix}")
    config = replace(config, source="webdataset", images=str(tmp_path / "a.tar"), captions=None)
    assert finish(replace(config, tolerate=1)).num_samples == 1
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.sources.tars.open_tar", lambda *_: pytest.fail("opened"))
        assert finish(replace(config, tolerate=1)).num_samples == 1
    assert finish(replace(config, min_side=9)).num_samples == 2
