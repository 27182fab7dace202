"""`ifvit bench checkpoint` with the tiny preset."""

import json
from pathlib import Path

import pytest

from ifvit.bench.checkpoint_speed import bench_checkpoint
from ifvit.bench.config import BenchCheckpointConfig
from ifvit.errors import UserError
from ifvit.models.presets import PRESETS
from ifvit.storage import list_names


def test_the_cost_of_saves_is_printed_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "small", PRESETS["tiny"])
    run = str(tmp_path / "run")
    bench_checkpoint(BenchCheckpointConfig(run=run, every=2, num_steps=4, batch_size=2, json=True))
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["stall_share"] < 1
    assert result["gigabytes"] > 0
    assert list_names(f"{run}/checkpoints") == ["latest", "step_00000002", "step_00000004"]


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("of a data set")
    with pytest.raises(UserError, match="not empty"):
        bench_checkpoint(BenchCheckpointConfig(run=str(tmp_path)))
    assert (tmp_path / "manifest.json").read_text() == "of a data set"
