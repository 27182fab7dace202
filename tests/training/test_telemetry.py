"""What a run tells of itself."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_files import rows

from ifvit.errors import UserError
from ifvit.training.config import TrainConfig
from ifvit.training.timing import PhaseTimer
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
PHASES = ("data", "forward", "backward", "optimizer", "ema")


def test_a_row_says_where_the_time_of_a_step_went(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(log_every=2, checkpoint_every=4)
    train(config)
    before = 0.0
    for row in rows(config).values():
        per_step = (row["seconds"] - before) / 2
        seconds = [row[f"{phase}_seconds"] for phase in PHASES]
        assert min(seconds) > 0
        assert sum(seconds) <= per_step
        before = row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["samples_per_s"] * (1 + 16 + 5))
        assert row["peak_memory"] > 10**7
        assert row["device"] == "cpu"
    assert rows(config)[6]["checkpoint_seconds"] > 0
    assert "checkpoint_seconds" not in rows(config)[4]
    summary = capsys.readouterr().err.splitlines()[-1]
    assert summary.startswith(f"{config.run}: step 8 in ")
    assert "0 loss spikes, 0 steps without an update" in summary


def test_phases_add_up_and_start_anew() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    started = time.perf_counter()
    for _ in range(3):
        with timer.phase("work"):
            sum(range(20_000))
    spent = timer.take()
    assert list(spent) == ["work"]
    assert 0 < spent["work"] <= time.perf_counter() - started
    assert timer.take() == {}


def test_a_profile_holds_the_phases_of_three_steps(recipe: Recipe) -> None:
    config = recipe(max_steps=12, profile=True)
    train(config)
    trace = json.loads(Path(config.run, "profile", "rank_0.json").read_text())
    names = [
        event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"
    ]
    for phase in ("forward", "backward", "optimizer", "ema"):
        assert names.count(phase) == 3


def test_a_tracker_that_is_not_installed_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="trackers: wandb is not installed"):
        train(recipe(trackers=("wandb",)))


def test_without_trackers_there_is_only_the_file(recipe: Recipe) -> None:
    config = recipe(max_steps=2, trackers=())
    train(config)
    assert not Path(config.run, "tensorboard").exists()
    assert list(rows(config)) == [1, 2]
