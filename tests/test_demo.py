"""The demo runs all stages; here a hundred times smaller than `make demo`."""

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ifvit import demo as demo_module
from ifvit.bench.scene_runs import SceneSets
from ifvit.demo import DemoConfig, build_recipe, demo
from ifvit.models.presets import PRESETS, with_setting


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """A demo with 48 training scenes, one training step and 24 generated images."""
    monkeypatch.setattr(demo_module, "NUM_TRAIN", 48)
    monkeypatch.setattr(demo_module, "NUM_HELD_OUT", 24)
    monkeypatch.setattr(demo_module, "STEPS_PER_MINUTE", {"early": 1, "modern": 1})
    return DemoConfig(folder=str(tmp_path / "demo"), minutes=1)


def written(folder: str) -> dict[str, int]:
    """Files of finished stages, with their time of writing."""
    patterns = ("images/*/*", "shards/*/*.tar", "*/checkpoints/*/*", "*/evaluation/*/*/*/0*.png")
    paths = [path for pattern in patterns for path in Path(folder).glob(pattern)]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_the_demo_sets_the_papers_baseline_beside_todays_model() -> None:
    sets = SceneSets(folder="runs/demo")
    early, modern = (build_recipe(sets, model, 4.5) for model in ("early", "modern"))
    assert early.backbone == with_setting(PRESETS["tiny"], "concat_early")
    assert (early.objective.prediction, modern.objective.prediction) == ("epsilon", "flow")
    assert (early.run, early.shards) == ("runs/demo/early", "runs/demo/shards/train2014")
    assert early.optim.cooldown_steps == early.max_steps * 1333 // 2000


@pytest.mark.slow
def test_demo_goes_the_whole_way_and_repeats_nothing(
    config: DemoConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo(config)
    folder = Path(config.folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["early", "modern"]
    for row in summary.values():
        shares = ("retrieval_at_16", "count_accuracy", "colour_accuracy")
        assert all(0 <= row[key] <= 1 for key in shares)
        assert -1 <= row["clip_score"] <= 1
        assert row["frechet_distance"] > 0
        assert row["train_seconds"] > 0
    page = (folder / "report.html").read_text()
    assert "early" in page
    assert 'src="http' not in page
    last_lines = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "report.html" in last_lines[0]
    assert [line.split()[0] for line in last_lines[1:]] == ["early", "modern"]

    before = written(config.folder)
    assert len(before) > 48 + 24
    # A second demo repeats nothing; without worker processes, which import torch, it is faster.
    here = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(demo_module, "worker_processes", lambda *_: here)
    demo(config)
    assert written(config.folder) == before
    again = json.loads((folder / "summary.json").read_text())
    assert again == summary


@pytest.mark.slow
def test_a_killed_demo_takes_its_workers_along() -> None:
    program = (
        "import os, signal\n"
        "from ifvit.studies.processes import worker_processes\n"
        "print(worker_processes(1, 1).submit(os.getpid).result(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # Ends when no process, no worker either, holds standard output open.
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout)
