"""Images that cannot be read: named, counted, tolerated, and encoded once they are repaired."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_files import (
    finish,
    hashes,
    image_files,
    record_shards,
    truncate,
    undisturbed_hashes,
)

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.sources.base import CaptionedImage
from data_pipeline.units import read_or_fail
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader


def test_a_broken_image_fails_the_end_of_the_job_by_name(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = image_files(config)[5]
    truncate(broken)
    with pytest.raises(UserError, match=rf"1 of 10 images .*{broken.name} \(.*truncated"):
        encode(config)
    assert broken.name in capsys.readouterr().err
    assert not Path(config.output, "manifest.json").exists()
    markers = sorted(Path(config.output, "completed").iterdir())
    counts = [json.loads(path.read_text())["shard"]["num_samples"] for path in markers]
    assert counts == [4, 3, 2]  # everything else was encoded


def test_missing_files_count_as_broken_and_the_first_are_named(config: EncodeConfig) -> None:
    files = image_files(config)
    for path in files[:5]:
        path.unlink()
    with pytest.raises(UserError, match=r"5 of 10 images .*no such file.*completed") as caught:
        encode(config)
    assert [path.name in str(caught.value) for path in files] == [True] * 3 + [False] * 7


def test_tolerated_failures_are_left_out_of_a_finished_dataset(config: EncodeConfig) -> None:
    for path in image_files(config)[8:]:  # all images of the last shard
        truncate(path)
    with pytest.raises(UserError, match="2 of 10"):
        encode(replace(config, tolerate=1))
    manifest = finish(replace(config, tolerate=2))
    assert [entry.num_samples for entry in manifest.shards] == [4, 4, 0]
    reader = ShardReader(config.output)
    assert [reader.metadata(n).image_id for n in range(len(reader))] == [
        7 * number + 3 for number in range(8)
    ]
    for path in image_files(config)[:8]:
        path.unlink()
    with pytest.raises(UserError, match="10 of 10 images could not be read"):
        encode(replace(config, tolerate=10, output=config.output + "_of_nothing"))


def test_a_failing_store_does_not_count_as_a_broken_image(config: EncodeConfig) -> None:
    def fail() -> bytes:
        raise StoreError("unreachable")

    image = CaptionedImage(key="0", image_id=0, name="x.jpg", read=fail, label=0)
    with pytest.raises(StoreError, match="unreachable"):
        read_or_fail(image, config)


def test_only_the_shard_of_a_repaired_image_is_encoded_again(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed_hashes(config)
    broken = image_files(config)[5]
    times = broken.stat()
    data = truncate(broken)
    with pytest.raises(UserError):
        encode(config)
    broken.write_bytes(data)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    names = record_shards(monkeypatch)
    encode(config)
    assert names == ["shard-00001"]
    assert hashes(config) == expected


def test_recorded_reasons_do_not_depend_on_folder_or_process(config: EncodeConfig) -> None:
    missing, garbage, empty, cut = image_files(config)[:4]
    missing.unlink()
    garbage.write_text("<html>not found</html>")
    empty.write_bytes(b"")
    truncate(cut)
    moved = Path(config.images + "_moved")
    shutil.copytree(config.images, moved)
    other = replace(config, images=str(moved), output=config.output + "_moved", tolerate=4)
    encode(replace(config, tolerate=4))
    encode(other)
    assert hashes(other) == hashes(config)
    marker = json.loads(Path(config.output, "completed", "shard-00000.json").read_text())
    reasons = [failure["reason"] for failure in marker["failures"]]
    assert reasons[:3] == [
        "no such file",
        *["not an image of a known format (JPEG, PNG, WEBP, GIF, BMP)"] * 2,
    ]
    assert "truncated" in reasons[3]
