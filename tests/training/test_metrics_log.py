"""What a run logs about itself."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import losses, rows

from ifvit import storage
from ifvit.errors import UserError
from ifvit.training.config import TrainConfig
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def test_a_row_tells_where_the_time_of_a_step_went(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(log_every=2, checkpoint_every=4)
    train(config)
    before = 0.0
    for row in rows(config).values():
        per_step = (row["seconds"] - before) / 2
        phases = ("data", "forward", "backward", "optimizer", "ema")
        seconds = [row[f"{phase}_seconds"] for phase in phases]
        assert min(seconds) > 0
        assert sum(seconds) <= per_step
        before = row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["samples_per_s"] * (1 + 16 + 5))
        assert row["peak_memory"] > 10**7
        assert row["device"] == "cpu"
    assert rows(config)[6]["checkpoint_seconds"] > 0
    assert rows(config)[4]["checkpoint_seconds"] is None
    assert f"{config.run}: step 8 in " in capsys.readouterr().err.splitlines()[-1]
    train(config)
    assert "complete at step 8; raise max_steps to continue" in capsys.readouterr().err


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


@pytest.mark.parametrize("trackers", [("tensorboard",), ()])
def test_only_the_trackers_of_the_recipe_write_beside_the_file(
    recipe: Recipe, trackers: tuple[str, ...]
) -> None:
    config = recipe(max_steps=2, trackers=trackers)
    train(config)
    assert Path(config.run, "tensorboard").exists() == bool(trackers)
    assert len(losses(config)) == 2


def test_rows_are_on_disk_before_the_checkpoint_that_follows_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_on_disk: list[int] = []

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "metrics.jsonl":
            rows_on_disk.append(len(path.read_text().splitlines()))

    def write_json(url: str, value: object) -> None:
        assert rows_on_disk == [2]
        real(url, value)

    real = storage.write_json
    monkeypatch.setattr(storage, "write_json", write_json)
    monkeypatch.setattr(os, "fsync", sync)
    train(recipe(max_steps=2))
    assert rows_on_disk == [2]
