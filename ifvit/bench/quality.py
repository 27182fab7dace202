"""The verb `bench quality`: processor time until today's recipe is as good as the paper's.

An arm is a recipe on scenes: the paper's, today's, or today's with one ingredient as the paper's.
Every run trains one arm with one seed. Its quality at a saved step is the retrieval and the mean
accuracy of colour, kind and count of images for held-out captions, by the protocol `scenes`.
"""

import os
import statistics
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from tqdm import tqdm

from ifvit.bench.config import BenchQualityConfig
from ifvit.bench.measurement import print_result
from ifvit.bench.scene_runs import SceneSets
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.rows import MetricsRow
from ifvit.models.cost import count_cost
from ifvit.storage import join
from ifvit.studies.processes import worker_processes
from ifvit.studies.recipes import with_length
from ifvit.studies.step_time import find_step_seconds
from ifvit.training.config import MAY_CHANGE, TrainConfig
from ifvit.training.train import train

PAPER, MODERN = "paper", "modern"
NUM_SAVES = 12
"""Saved steps of a run, at equal distances."""
OBJECTIVE_GROUPS = {
    "prediction": ("prediction", "min_snr_gamma"),
    "timesteps": ("timesteps", "logit_mean", "logit_std", "shift"),
}
"""Ingredients of an objective, and the fields that make sense only together."""

Arms = dict[str, TrainConfig]
Run = tuple[str, int]
"""Arm and seed."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Quality of the weights of one step."""

    step: int
    retrieval: float
    accuracy: float
    """Mean of the shares of images with the right colours, kinds and counts."""

    def reaches(self, other: "Point") -> bool:
        """Whether these weights are at least as good in both respects."""
        return self.retrieval >= other.retrieval and self.accuracy >= other.accuracy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time and number of steps of every arm."""

    steps: dict[str, int]
    step_seconds: dict[str, float]
    """Processor time of a step in one thread, without the loader."""

    def seconds(self, arm: str) -> float:
        """Processor time of a whole run."""
        return self.steps[arm] * self.step_seconds[arm]


def bench_quality(config: BenchQualityConfig) -> None:
    """Train and evaluate all arms, and print the ratios; finished runs are not repeated."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's work is no processor time
    sets = SceneSets(folder=config.folder)
    paper, modern = (sets.recipe(name, config.steps) for name in ("scenes_paper", "scenes"))
    arms = {PAPER: paper, MODERN: modern, **without_ingredients(modern, paper)}
    sets.render()
    with worker_processes(config.processes, 1, join(config.folder, "log.txt")) as workers:
        sets.encode(workers)
        plan = make_plan(workers, arms, config)
        jobs = {
            (arm, seed): _plan_run(sets, recipe, arm, seed, plan.steps[arm])
            for seed in range(1, config.seeds + 1)
            for arm, recipe in arms.items()
        }
        ends = _run_all(workers, train_to_end, jobs, "train and evaluate")
        searches = {
            (arm, seed): (*job, ends[arm, seed], ends[PAPER, seed])
            for (arm, seed), job in jobs.items()
            if arm != PAPER
        }
        reached = _run_all(workers, find_equal, searches, "find equal quality")
    rows = {arm: summarise(arm, recipe, plan, ends, reached) for arm, recipe in arms.items()}
    result = {
        "time_ratio": rows[MODERN]["time_ratio"],
        "paper": rows.pop(PAPER),
        "modern": rows.pop(MODERN),
        "ingredients": rows,
        **asdict(config),
        "num_images": sets.num_held_out,
    }
    if config.json:
        print_result(result, as_json=True)
    else:
        _print_table(result)


def without_ingredients(modern: TrainConfig, paper: TrainConfig) -> Arms:
    """Return `modern` with one ingredient as in `paper`, by the name of the ingredient.

    An ingredient is a field of the recipe in which they differ. Each field of the backbone and each
    group of fields of the objective is one of its own.
    """
    arms = {}
    for name in [field.name for field in fields(TrainConfig)]:
        new, old = getattr(modern, name), getattr(paper, name)
        if new == old or name in MAY_CHANGE or name == "seed":
            continue
        groups: Mapping[str, Sequence[str]] = {}
        if name == "objective":
            groups = OBJECTIVE_GROUPS
        elif name == "backbone":
            groups = {field.name: [field.name] for field in fields(new)}
        else:
            arms[name] = replace(modern, **{name: old})
        for ingredient, group in groups.items():
            values = {field: getattr(old, field) for field in group}
            part = replace(new, **values)
            if part != new:
                arms[ingredient] = replace(modern, **{name: part})
    return arms


def make_plan(workers: Executor, arms: Arms, config: BenchQualityConfig) -> Plan:
    """Measure a step of every arm, and choose the number of steps, a multiple of NUM_SAVES.

    Arms beside the paper's get `share` of its processor time.
    """
    seconds = workers.submit(find_step_seconds, config.folder, arms).result()
    budget = config.share * config.steps * seconds[PAPER]
    steps = {arm: whole_length(budget / one) for arm, one in seconds.items()}
    steps[PAPER] = whole_length(config.steps)
    return Plan(steps=steps, step_seconds=seconds)


def whole_length(steps: float) -> int:
    """The nearest multiple of NUM_SAVES, at least one."""
    return NUM_SAVES * max(1, round(steps / NUM_SAVES))


def _in_one_batch(recipe: TrainConfig) -> TrainConfig:
    return replace(recipe, micro_batch_size=recipe.global_batch_size)


def _plan_run(
    sets: SceneSets, recipe: TrainConfig, arm: str, seed: int, steps: int
) -> tuple[TrainConfig, EvaluateConfig]:
    """Recipe and evaluation of one run."""
    recipe = with_length(_in_one_batch(recipe), steps)
    every = steps // NUM_SAVES
    recipe = replace(
        recipe,
        run=join(sets.folder, arm, f"seed{seed}"),
        seed=seed,
        sample_grid=replace(recipe.sample_grid, every=0),
        log_every=every,
        checkpoint_every=every,
        export_every=None,
        keep_exports=NUM_SAVES,
    )
    return recipe, sets.evaluation(recipe.run)


def _run_all(
    workers: Executor,
    function: Callable[..., Result],
    jobs: Mapping[Run, Sequence[Any]],
    title: str,
) -> dict[Run, Result]:
    """Call `function` with the arguments of every job, and show progress and the time left."""
    futures = {workers.submit(function, *arguments): key for key, arguments in jobs.items()}
    done = tqdm(as_completed(futures), title, len(futures), unit="run", smoothing=0)
    return {futures[future]: future.result() for future in done}


def train_to_end(recipe: TrainConfig, evaluation: EvaluateConfig) -> Point:
    """Train a run, and evaluate its last weights."""
    train(recipe)
    return measure_quality(recipe, evaluation, recipe.max_steps)


def measure_quality(recipe: TrainConfig, evaluation: EvaluateConfig, step: int) -> Point:
    """Evaluate the weights of a saved step."""
    (row,) = evaluate(replace(evaluation, steps=[step]))
    assert isinstance(row, MetricsRow)
    scores = (row.colour_accuracy, row.kind_accuracy, row.count_accuracy)
    assert row.retrieval_at_16 is not None
    return Point(
        step=step,
        retrieval=row.retrieval_at_16.value,
        accuracy=statistics.mean(score.value for score in scores if score is not None),
    )


def find_equal(
    recipe: TrainConfig, evaluation: EvaluateConfig, end: Point, target: Point
) -> Point | None:
    """Find the first saved step of a trained run that reaches `target`; None if the end does not.

    Bisects, because quality rises with the steps.
    """
    points = {end.step: end}

    def reaches(step: int) -> bool:
        if step not in points:
            points[step] = measure_quality(recipe, evaluation, step)
        return points[step].reaches(target)

    steps = range(recipe.checkpoint_every, end.step + 1, recipe.checkpoint_every)
    if not reaches(end.step):
        return None
    return points[steps[bisect_left(steps, True, hi=len(steps) - 1, key=reaches)]]


def summarise(
    arm: str,
    recipe: TrainConfig,
    plan: Plan,
    ends: Mapping[Run, Point],
    reached: Mapping[Run, Point | None],
) -> dict[str, Any]:
    """Cost of an arm, its quality at the end, and its ratios of processor time; seeds in order.

    `time_ratio` is the median over seeds, where a run that is not good enough counts as infinite;
    None stands for infinity.
    """
    seeds = sorted(seed for name, seed in ends if name == arm)
    own = [ends[arm, seed] for seed in seeds]
    step_seconds, paper_seconds = plan.step_seconds[arm], plan.seconds(PAPER)
    cost = count_cost(recipe.backbone)
    row = {
        "params": cost.params,
        "gflops": cost.layer_flops / 1e9,
        "steps": plan.steps[arm],
        "cpu_seconds": plan.seconds(arm),
        "retrieval": statistics.mean(point.retrieval for point in own),
        "accuracy": statistics.mean(point.accuracy for point in own),
    }
    if arm == PAPER:
        return row
    points = [reached[arm, seed] for seed in seeds]
    ratios = [point.step * step_seconds / paper_seconds if point else None for point in points]
    return {"time_ratio": median_ratio_or_none(ratios), "time_ratios": ratios, **row}


def median_ratio_or_none(ratios: Sequence[float | None]) -> float | None:
    """Median, with None for a ratio that is too large to be known."""
    ordered = sorted(ratios, key=lambda ratio: float("inf") if ratio is None else ratio)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return None if low is None or high is None else (low + high) / 2


def _print_table(result: Mapping[str, Any]) -> None:
    removed = {f"without {name}": row for name, row in result["ingredients"].items()}
    head = f"{'':<28}{'parameters':>11}{'GFLOPs':>8}{'steps':>7}{'CPU s':>7}{'retrieval':>11}"
    sys.stdout.write(head + f"{'accuracy':>10}{'time ratio':>12}\n")
    for name, row in {PAPER: result[PAPER], MODERN: result[MODERN], **removed}.items():
        ratio = row.get("time_ratio")
        shown = "-" if ratio is None else format(ratio, ".2f")
        sys.stdout.write(
            f"{name:<28}{row['params']:11,}{row['gflops']:8.3f}{row['steps']:7}"
            f"{row['cpu_seconds']:7.0f}{row['retrieval']:11.1%}{row['accuracy']:10.1%}{shown:>12}\n"
        )
    sys.stdout.write(
        "\ntime ratio: processor time until both are the final ones of the paper's recipe\n"
        f"/ its own time; median over {result['seeds']} seeds, - above {result['share']:g}.\n"
    )
