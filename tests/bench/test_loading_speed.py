"""`ifvit bench loader`: the promised keys, and no files left behind."""

import json
import tempfile
from pathlib import Path
from typing import Literal

import fsspec
import pytest

from ifvit.bench import loading_speed
from ifvit.bench.config import BenchLoaderConfig

BYTES = ["bytes_per_caption", "bytes_per_caption_int8"]


@pytest.mark.parametrize(
    ("context", "store", "keys"),
    [
        ("clip", None, ["vs_int8", "vs_webdataset", *BYTES]),
        ("gemma", None, ["vs_int8", "vs_padded", "vs_webdataset", *BYTES, f"{BYTES[0]}_padded"]),
        ("clip", "memory://bench", ["vs_download"]),
    ],
)
def test_it_prints_ratios_and_cleans_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    context: Literal["clip", "gemma"],
    store: str | None,
    keys: list[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(loading_speed, "SECONDS", 0.05)
    config = BenchLoaderConfig(
        context=context,
        num_samples=32,
        batch_size=8,
        num_workers=1,
        rounds=1,
        store=store,
        json=True,
    )
    loading_speed.bench_loader(config)
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["samples_per_s", *keys]
    assert all(value > 0 for value in result.values())
    assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").find("/bench") == []
