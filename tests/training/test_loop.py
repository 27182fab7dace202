"""A run is one sequence of losses, however it is carried out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_files import losses, rows

from ifvit.rng import Stream, uniform
from ifvit.storage import join, remove
from ifvit.training.config import OptimConfig, TrainConfig
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def test_a_resumed_run_repeats_the_uninterrupted_one(recipe: Recipe, whole: TrainConfig) -> None:
    broken = recipe(checkpoint_every=2)
    train(replace(broken, max_steps=5))
    remove(join(broken.run, "checkpoints", "step_00000005"))  # the rows of step 5 are dropped
    with Path(broken.run, "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')  # cut off where the process was killed
    train(broken)
    table, expected = rows(broken), rows(whole)
    assert list(table) == list(expected)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in table.values()] == [row[key] for row in expected.values()]
    rates = [row["learning_rate"] for row in table.values()]
    assert rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


def test_a_logged_loss_is_the_mean_over_all_steps_since_the_last_row(
    recipe: Recipe, whole: TrainConfig
) -> None:
    config = recipe(log_every=3, checkpoint_every=2)
    train(replace(config, max_steps=5))  # the row of step 5 is not a multiple of log_every
    remove(join(config.run, "checkpoints", "step_00000005"))
    train(config)
    single, table = losses(whole), rows(config)
    assert list(table) == [3, 6, 8]
    for step, count in ((3, 3), (6, 3), (8, 2)):
        assert table[step]["loss"] == pytest.approx(sum(single[step - count : step]) / count)
    steps = [rows(whole)[step] for step in (1, 2, 3)]
    times = [uniform(whole.seed, step, torch.arange(8), Stream.TIMESTEP, 1) for step in range(3)]
    counts = [(time[:, 0] * 4).long().bincount(minlength=4).tolist() for time in times]
    for n in range(4):
        sums = [
            (row[f"loss_q{n}"] or 0.0) * count[n] for row, count in zip(steps, counts, strict=True)
        ]
        mean = sum(sums) / sum(count[n] for count in counts)
        assert table[3][f"loss_q{n}"] == pytest.approx(mean, rel=1e-5)
    assert table[3]["grad_norm"] == steps[2]["grad_norm"]


def test_losses_do_not_depend_on_the_micro_batch_size(recipe: Recipe, whole: TrainConfig) -> None:
    split = recipe(micro_batch_size=2)
    train(split)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    for row, other in zip(rows(whole).values(), rows(split).values(), strict=True):
        times = uniform(whole.seed, int(row["step"]) - 1, torch.arange(8), Stream.TIMESTEP, 1)
        counts = (times[:, 0] * 4).long().bincount(minlength=4).tolist()
        assert [row[f"loss_q{n}"] is None for n in range(4)] == [not count for count in counts]
        sampled = {f"loss_q{n}": count for n, count in enumerate(counts) if count}
        total = sum(row[key] * count for key, count in sampled.items())
        assert total / 8 == pytest.approx(row["loss"], rel=1e-5)
        for key in sampled:
            assert other[key] == pytest.approx(row[key], rel=1e-5)


def test_the_loss_falls_on_a_small_dataset(recipe: Recipe) -> None:
    config = recipe(max_steps=60, optim=OptimConfig(learning_rate=3e-3, warmup_steps=5))
    train(config)
    history = losses(config)
    assert sum(history[-10:]) < 0.9 * sum(history[:10])
