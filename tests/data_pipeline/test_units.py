"""Images of any source get safe keys and bounded, valid captions before they are encoded."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from encoded_files import finish

from data_pipeline.config import EncodeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import verify
from data_pipeline.sources.base import MAX_CAPTION, CaptionedImage, Unit
from data_pipeline.units import open_unit
from ifvit.errors import UserError
from ifvit.models.text_encoders import load_text_encoder
from ifvit.shards.reader import ShardReader


def prepare(config: EncodeConfig, *images: CaptionedImage) -> list[CaptionedImage]:
    unit = Unit(name="x", open=partial(list, images), is_listed=True)
    return open_unit(unit, config)


def make_image(key: str = "x", *captions: str) -> CaptionedImage:
    return CaptionedImage(key=key, image_id=key, name=f"{key}.jpg", captions=captions or ("a",))


def test_keys_become_safe_and_stay_distinct(config: EncodeConfig) -> None:
    wishes = ["a/b", "a_b", "a_b-1", "a.b", "a/b", "", " ", "\n", "é" * 300, "é" * 301, "x\udcff"]
    keys = [image.key for image in prepare(config, *map(make_image, wishes))]
    assert len(set(keys)) == len(wishes)
    assert keys[:2] == ["a_b", "a_b-1"]
    assert all(key and not set("./\\\n") & set(key) for key in keys)
    assert max(len(key.encode()) for key in keys) < 160


def test_ids_and_names_become_valid_unicode(config: EncodeConfig) -> None:
    (image,) = prepare(config, make_image("x\udce9"))
    assert (image.image_id, image.name) == ("x\ufffd", "x\ufffd.jpg")


def test_captions_are_bounded_valid_and_not_blank(config: EncodeConfig) -> None:
    (image,) = prepare(config, make_image("x", "y" * 20_000, "a \ud800 b", " ", "fine"))
    assert image.captions == ("y" * MAX_CAPTION, "a \ufffd b", "fine")
    assert len(image.remarks) == 3
    (good,) = prepare(config, make_image("x", "fine"))
    assert good == make_image("x", "fine")


def test_images_without_a_single_caption_are_left_out_unless_allowed(config: EncodeConfig) -> None:
    (image,) = prepare(config, make_image("x", "", " \n"))
    assert image.problem == "all its captions are blank; --allow_blank_captions allows this"
    (image,) = prepare(replace(config, allow_blank_captions=True), make_image("x", "", " \n"))
    assert (image.captions, image.problem) == (("",), "")
    (image,) = prepare(config, make_image("x", *["a"] * 1001))
    assert image.problem == "it has 1,001 captions, more than 1,000"


def test_the_summary_counts_what_was_changed_once_and_names_the_first(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(str(config.captions))
    content = json.loads(path.read_text())
    for entry, caption in zip(content["annotations"][:4], ["x" * 10_001] * 3 + [""], strict=True):
        entry["caption"] = caption
    path.write_text(json.dumps(content))
    finish(config)
    assert "2 images: captions of more than 10,000 characters were cut; the first is COCO_tr" in (
        out := capsys.readouterr().out
    )
    assert "1 images: blank captions beside others were left out" in out
    verify(ShardsConfig(url=config.output))
    assert len(ShardReader(config.output).metadata(0).captions[0]) == MAX_CAPTION
    finish(config)  # a rerun that encodes nothing counts the same
    assert "2 images: captions of more than 10,000 characters" in capsys.readouterr().out


def test_captions_of_too_many_tokens_are_counted_and_the_first_is_named(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(str(config.captions))
    content = json.loads(path.read_text())
    captions = ["red " * 14, "red " * 15, "é" * 8, "word " * 50]  # the tower reads 16 tokens
    for entry, caption in zip(content["annotations"][:4], captions, strict=True):
        entry["caption"] = caption
    path.write_text(json.dumps(content))
    finish(config)
    encoder = load_text_encoder(str(config.text_encoder))
    assert encoder.find_cut(captions) == set(captions[1:])
    assert re.search(
        r"2 images: captions have more tokens .*; the first is COCO_.*10\.jpg",
        (capsys.readouterr().out),
    )


def test_rejected_images_are_counted_by_reason(config: EncodeConfig) -> None:
    files = sorted(Path(config.images).iterdir())
    for path in files[:3]:
        path.write_bytes(b"<html>")
    for path in files[3:5]:
        path.unlink()
    with pytest.raises(UserError, match=r"5 of 10 .*by reason: 3 not an image .*, 2 no such file"):
        encode(config)


@pytest.mark.slow
def test_a_caption_of_100_megabytes_costs_neither_memory_nor_minutes(config: EncodeConfig) -> None:
    path = Path(str(config.captions))
    content = json.loads(path.read_text())
    content["annotations"][0]["caption"] = "word " * 20_000_000
    path.write_text(json.dumps(content))
    code = (
        "import resource, sys; from ifvit.cli import main; main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    flags = {
        "images": config.images,
        "captions": config.captions,
        "output": config.output,
        "vae": config.vae,
        "text_encoder": config.text_encoder,
        "image_size": config.image_size,
    }
    argv = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, "encode", *argv],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < 2_000_000  # in kB; the libraries take 0.8 GB
