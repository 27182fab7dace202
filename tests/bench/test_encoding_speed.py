"""`ifvit bench encode --json` on a few small images."""

import json
from pathlib import Path

import pytest

from ifvit.bench.config import BenchEncodeConfig
from ifvit.bench.encoding_speed import bench_encode


def test_the_result_is_one_json_object(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench_encode(BenchEncodeConfig(num_images=4, batch_size=2, image_size=64, rounds=1, json=True))
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_s"] > 0
    assert result["vs_models_alone"] > 0
    assert (result["vae"], result["image_size"], result["num_images"]) == ("scenes/vae", 64, 4)
    assert list(tmp_path.iterdir()) == []
