"""`ifvit bench quality`: arithmetic of its ratios, its arms, and one small run of everything."""

import json
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ifvit.bench import quality
from ifvit.bench.config import BenchQualityConfig
from ifvit.bench.quality import (
    Plan,
    Point,
    bench_quality,
    find_equal,
    median_ratio_or_none,
    summarise,
    without_ingredients,
)
from ifvit.bench.scene_runs import SceneSets
from ifvit.config import read_config
from ifvit.evaluation.config import EvaluateConfig
from ifvit.studies.recipes import with_length
from ifvit.training.config import TrainConfig


class HereExecutor(Executor):
    """Calls functions in this process."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> "Future[Any]":  # type: ignore[override]
        done: Future[Any] = Future()
        done.set_result(function(*arguments, **named))
        return done


def recipe(name: str) -> TrainConfig:
    """A shipped recipe on scenes."""
    return read_config(TrainConfig, ["--recipe", name], prog="ifvit train")


def point(step: int, quality: float) -> Point:
    """Weights whose accuracy is half their retrieval."""
    return Point(step=step, retrieval=quality, accuracy=quality / 2)


def test_each_arm_lacks_one_ingredient_and_all_of_them_make_the_papers_recipe() -> None:
    paper, modern = recipe("scenes_paper"), recipe("scenes")
    arms = without_ingredients(modern, paper)
    assert {"prediction", "timesteps"} <= set(arms)
    assert arms["prediction"].objective.prediction == "epsilon"
    assert arms["prediction"].objective.timesteps == "logit_normal"
    assert arms["prediction"].objective.min_snr_gamma == paper.objective.min_snr_gamma
    bare = modern
    for number in range(len(arms), 0, -1):
        left = without_ingredients(bare, paper)
        assert len(left) == number
        bare = next(iter(left.values()))
    assert without_ingredients(bare, paper) == {}
    assert (bare.backbone, bare.objective) == (paper.backbone, paper.objective)
    assert (bare.optim, bare.ema_decays) == (paper.optim, paper.ema_decays)


def test_the_first_saved_step_of_equal_quality_is_found_by_few_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = replace(recipe("scenes"), max_steps=120, checkpoint_every=10)
    evaluation = EvaluateConfig(weights="w", shards="s")
    asked: list[int] = []

    def measure(config: TrainConfig, how: EvaluateConfig, step: int, *, first: int) -> Point:
        asked.append(step)
        return point(step, 0.6 if step >= first else 0.4)

    for first in range(10, 130, 10):
        asked.clear()
        monkeypatch.setattr(quality, "measure_quality", partial(measure, first=first))
        found = find_equal(trained, evaluation, point(120, 0.7), point(1500, 0.5))
        assert found is not None
        assert found.step == first
        assert len(asked) <= 4
    assert find_equal(trained, evaluation, point(120, 0.4), point(1500, 0.5)) is None


def test_equal_quality_is_equal_in_both_respects() -> None:
    target = Point(step=1, retrieval=0.5, accuracy=0.4)
    assert replace(target, accuracy=0.5).reaches(target)
    assert not replace(target, retrieval=0.6, accuracy=0.39).reaches(target)
    assert not replace(target, retrieval=0.49, accuracy=0.9).reaches(target)


def test_ratios_are_of_the_processor_time_of_steps() -> None:
    plan = Plan(
        steps={"paper": 100, "modern": 50},
        step_seconds={"paper": 0.1, "modern": 0.2},
    )
    ends = {("paper", seed): point(100, 0.5) for seed in (1, 2)}
    ends |= {("modern", seed): point(50, 0.8) for seed in (1, 2)}
    reached = {("modern", 1): point(20, 0.6), ("modern", 2): None}
    row = summarise("modern", recipe("scenes"), plan, ends, reached)
    assert row["time_ratios"] == [pytest.approx(0.4), None]
    assert row["time_ratio"] is None
    assert row["cpu_seconds"] == pytest.approx(10)
    assert (row["steps"], row["retrieval"], row["accuracy"]) == (50, 0.8, 0.4)
    assert "time_ratio" not in summarise("paper", recipe("scenes_paper"), plan, ends, reached)


@pytest.mark.parametrize(
    ("ratios", "median"),
    [
        ([0.3], 0.3),
        ([0.5, 0.2, None], 0.5),
        ([None, 0.2, None], None),
        ([0.2, 0.4], pytest.approx(0.3)),
        ([0.2, None], None),
    ],
)
def test_an_unknown_ratio_counts_as_the_largest(
    ratios: list[float | None], median: float | None
) -> None:
    assert median_ratio_or_none(ratios) == median


def test_a_shorter_run_keeps_the_shares_of_its_schedule() -> None:
    short = with_length(recipe("scenes_paper"), 1000)
    assert (short.optim.warmup_steps, short.optim.cooldown_steps) == (100, 666)
    assert with_length(recipe("scenes_paper"), 1).optim.warmup_steps == 1
    kept = replace(recipe("scenes"), optim=replace(recipe("scenes").optim, cooldown_steps=0))
    assert with_length(kept, 10).optim.cooldown_steps == 0


@pytest.mark.slow
def test_a_small_benchmark_gives_one_json_object_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "SceneSets", partial(SceneSets, num_train=40, num_held_out=20))
    monkeypatch.setattr(quality, "NUM_SAVES", 2)
    # In this process: worker processes would take seconds to import torch.
    monkeypatch.setattr(quality, "worker_processes", lambda *_: HereExecutor())
    monkeypatch.setattr(quality, "without_ingredients", lambda modern, paper: {})
    config = BenchQualityConfig(folder=str(tmp_path / "q"), seeds=1, steps=2, share=1, json=True)
    bench_quality(config)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result)[:4] == ["time_ratio", "paper", "modern", "ingredients"]
    assert result["paper"]["steps"] == 2
    assert result["paper"]["cpu_seconds"] > 0
    assert 0 <= result["modern"]["retrieval"] <= 1
    metrics = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    assert len(metrics) == 2
    bench_quality(config)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")} == metrics
