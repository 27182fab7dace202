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
from ifvit.rng import Stream, uniform
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


def test_a_row_says_the_loss_of_each_quarter_of_the_timesteps(recipe: Recipe) -> None:
    whole, split = recipe(max_steps=3), recipe("split", max_steps=3, micro_batch_size=2)
    train(whole)
    train(split)
    for row, other in zip(rows(whole).values(), rows(split).values(), strict=True):
        times = uniform(whole.seed, int(row["step"]) - 1, torch.arange(8), Stream.TIMESTEP, 1)
        counts = (times[:, 0] * 4).long().bincount(minlength=4).tolist()
        assert [row[f"loss_q{n}"] is None for n in range(4)] == [not count for count in counts]
        drawn = {f"loss_q{n}": count for n, count in enumerate(counts) if count}
        total = sum(row[key] * count for key, count in drawn.items())
        assert total / 8 == pytest.approx(row["loss"], rel=1e-5)
        for key in drawn:
            assert other[key] == pytest.approx(row[key], rel=1e-5)


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
