"""The verb `demo`: all stages from images to the report, small enough for two slow cores.

Modules that import torch are imported inside functions, because `ifvit demo --help` reads
`DemoConfig` from here.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from ifvit.bench.scene_runs import SceneSets
from ifvit.evaluation.config import EvaluateConfig
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.presets import with_setting
from ifvit.records import PositiveFloat, record
from ifvit.storage import join, write_json
from ifvit.studies.config import ReportConfig
from ifvit.studies.processes import worker_processes
from ifvit.training.config import TrainConfig

NUM_TRAIN, NUM_HELD_OUT = 6000, 256
NUM_WORKERS = 2
RECIPES = {"early": "scenes_paper", "modern": "scenes"}
"""Model => its recipe; the early one has the paper's baseline as its backbone."""
STEPS_PER_MINUTE = {"early": 520, "modern": 320}
"""Optimizer steps per minute of `--minutes`, of equal processor time; fixed, so that the demo
repeats."""
SUMMARY_KEYS = (
    "retrieval_at_16",
    "clip_score",
    "frechet_distance",
    "count_accuracy",
    "colour_accuracy",
    "kind_accuracy",
    "relation_accuracy",
    "empty_share",
)

Summary = dict[str, float | None]


@record
class DemoConfig:
    """Render scenes, encode, train the paper's baseline and today's model, evaluate, report."""

    folder: str = "runs/demo"
    """Output folder; run the demo again to continue there."""
    minutes: PositiveFloat = 4.5
    """Training time of both models together on a machine with two slow cores, in minutes."""


def demo(config: DemoConfig) -> None:
    """Write `report.html` and `summary.json` to the folder; finished stages are not repeated."""
    from ifvit.studies.study_page import report

    started = time.perf_counter()
    sets = SceneSets(folder=config.folder, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    recipes = [build_recipe(sets, model, config.minutes) for model in RECIPES]
    _announce("1/4", "render scenes in COCO's layout")
    sets.render()
    with worker_processes(NUM_WORKERS, max(1, (os.cpu_count() or 1) // NUM_WORKERS)) as workers:
        _announce("2/4", "encode them into shards of VAE moments and CLIP contexts")
        sets.encode(workers)
        _announce("3/4", "train both models, generate from held-out captions, evaluate")
        evaluations = [sets.evaluation(recipe.run) for recipe in recipes]
        rows = list(workers.map(_train_and_evaluate, recipes, evaluations))
    _announce("4/4", "report")
    page = join(config.folder, "report.html")
    report(ReportConfig(runs=[recipe.run for recipe in recipes], output=page))
    summary = dict(zip(RECIPES, rows, strict=True))
    write_json(join(config.folder, "summary.json"), summary)
    _finish(config.folder, summary, time.perf_counter() - started)


def build_recipe(sets: SceneSets, model: str, minutes: float) -> TrainConfig:
    """Return the recipe of one of the two models."""
    max_steps = max(1, round(minutes * STEPS_PER_MINUTE[model]))
    recipe = replace(sets.recipe(RECIPES[model], max_steps), run=join(sets.folder, model))
    if model != "early":
        return recipe
    assert isinstance(recipe.backbone, FusionTransformerConfig)
    return replace(recipe, backbone=with_setting(recipe.backbone, "concat_early"))


def _train_and_evaluate(recipe: TrainConfig, evaluation: EvaluateConfig) -> Summary:
    """Return one model's row of the summary."""
    from ifvit.evaluation.evaluate import evaluate
    from ifvit.training.train import train

    seconds = train(recipe).seconds
    (row,) = evaluate(evaluation)
    estimates = {key: getattr(row, key) for key in SUMMARY_KEYS}
    values = {key: estimate.value if estimate else None for key, estimate in estimates.items()}
    return {**values, "train_seconds": seconds}


def _announce(number: str, what: str) -> None:
    print(f"\n[{number}] {what}", flush=True)


def _finish(folder: str, summary: dict[str, Summary], seconds: float) -> None:
    print(f"\nDone in {seconds / 60:.1f} minutes: {Path(folder, 'report.html')}")
    for name, row in summary.items():
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if v is not None)
        print(f"{name:>12}  {numbers}")
