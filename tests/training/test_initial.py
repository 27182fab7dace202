"""Fine-tuning: step 0 starts from the weights of another run, on other shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import losses, write_dataset

from ifvit.errors import UserError
from ifvit.models.weights import load_weights
from ifvit.shards import ShardReader
from ifvit.training.config import TrainConfig
from ifvit.training.train import initial_backbone, train

Recipe = Callable[..., TrainConfig]


def test_a_run_starts_from_weights_and_goes_on_without_them(recipe: Recipe, tmp_path: Path) -> None:
    first = recipe("first", max_steps=2, scaling_factor=0.5)
    train(first)
    other = write_dataset(tmp_path / "other", seed=1)
    tuned = recipe("tuned", shards=other, scaling_factor=0.5, initial_weights=first.run)
    start = initial_backbone(tuned, ShardReader(other)).state_dict()
    weights = load_weights(first.run)[0].state_dict()
    assert all(start[name].equal(tensor) for name, tensor in weights.items())

    train(replace(tuned, max_steps=5))
    Path(first.run).rename(tmp_path / "gone")
    train(tuned)
    train(replace(tuned, run=f"{tuned.run}_whole", initial_weights=str(tmp_path / "gone")))
    assert losses(tuned) == losses(replace(tuned, run=f"{tuned.run}_whole"))


def test_weights_that_do_not_fit_are_refused(recipe: Recipe) -> None:
    first = recipe("first", max_steps=1, scaling_factor=0.5)
    train(first)
    tuned = recipe("tuned", scaling_factor=0.25, initial_weights=first.run)
    with pytest.raises(UserError, match=r"has scaling_factor: 0\.5, the recipe 0\.25"):
        train(tuned)
    shape = replace(first.backbone, width=64)
    wider = replace(first, run=tuned.run, backbone=shape, initial_weights=first.run)
    with pytest.raises(UserError, match=r"has backbone\.width"):
        train(wider)
