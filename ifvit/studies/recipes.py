"""A study: the recipes of its runs, and how their lengths are matched."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from graphlib import CycleError, TopologicalSorter

from ifvit.config import dump_config, read_config
from ifvit.errors import UserError
from ifvit.models.cost import count_cost
from ifvit.records import shorten
from ifvit.storage import join
from ifvit.studies.config import StudyConfig
from ifvit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study; `recipe.run` is its folder FOLDER/ARM/seedSEED."""

    arm: str
    seed: int
    recipe: TrainConfig
    after: str | None = None
    """Name of the run of the study that this one branches from."""

    @property
    def name(self) -> str:
        """ARM/seedSEED."""
        return f"{self.arm}/seed{self.seed}"


def list_runs(
    config: StudyConfig, step_seconds: Mapping[str, float] | None = None
) -> list[StudyRun]:
    """Return all runs of a study, all arms of the first seed first.

    `step_seconds` is the processor time of a training step of each arm, which a study that matches
    seconds needs. Raises UserError for an arm whose fields the recipe does not have.
    """
    recipes = match_lengths(config, arm_recipes(config), step_seconds)
    runs = [
        _build_run(config, arm, recipe, seed)
        for seed in config.seeds
        for arm, recipe in recipes.items()
    ]
    try:
        TopologicalSorter({run.name: [run.after] for run in runs if run.after}).prepare()
    except CycleError as error:
        raise UserError(f"arms: {error.args[1][0]} branches from itself") from None
    return runs


def _build_run(config: StudyConfig, arm: str, recipe: TrainConfig, seed: int) -> StudyRun:
    """Return one run; `branch` may name a run of the study by its folder or as ARM/seedSEED."""
    recipe, after = replace(recipe, run=join(config.folder, arm, f"seed{seed}"), seed=seed), None
    if recipe.branch is not None:
        parent, _, step = recipe.branch.replace("{seed}", str(seed)).rpartition("@")
        name = parent.removeprefix(join(config.folder, ""))
        if name in {f"{other}/seed{seed}" for other in config.arms for seed in config.seeds}:
            parent, after = join(config.folder, name), name
        recipe = replace(recipe, branch=f"{parent}@{step}")
    return StudyRun(arm=arm, seed=seed, recipe=recipe, after=after)


def arm_recipes(config: StudyConfig) -> dict[str, TrainConfig]:
    """Return the recipe of each arm, with the length of the baseline.

    Raises UserError for a field that the recipe does not have, or that only a flag may set.
    """
    base = _with_fields(config.train, config.fields, "fields")
    base = with_length(base, config.steps or base.max_steps)
    return {
        arm: _with_fields(base, changes, f"arms: {arm}") for arm, changes in config.arms.items()
    }


def _with_fields(recipe: TrainConfig, changes: Mapping[str, object], where: str) -> TrainConfig:
    if not changes:
        return recipe
    known = {field.name for field in fields(TrainConfig) if not field.metadata.get("flag_only")}
    for key in changes:
        if key in ("run", "seed"):
            raise UserError(f"{where}: the study sets {key} of every run; remove it")
        if key.partition(".")[0] not in known:
            raise UserError(f"{where}: unknown key {shorten(key)}; known are {', '.join(known)}")
    flags = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changes.items()
    ]
    return read_config(TrainConfig, ["--config", dump_config(recipe), *flags], prog=where)


def match_lengths(
    config: StudyConfig,
    recipes: Mapping[str, TrainConfig],
    step_seconds: Mapping[str, float] | None = None,
) -> dict[str, TrainConfig]:
    """Return the recipes with lengths that agree with the baseline's in what the study matches."""
    if config.match == "steps":
        return dict(recipes)
    step_costs = step_seconds if config.match == "seconds" else count_operations(recipes)
    assert step_costs is not None
    budget = recipes[config.reference_arm].max_steps * step_costs[config.reference_arm]
    return {
        arm: with_length(recipe, max(1, round(budget / step_costs[arm])))
        for arm, recipe in recipes.items()
    }


def count_operations(recipes: Mapping[str, TrainConfig]) -> dict[str, float]:
    """Return the floating-point operations of a training step of each arm.

    A backward pass costs two forward passes.
    """
    return {
        arm: 3.0 * count_cost(recipe.backbone).flops * recipe.global_batch_size
        for arm, recipe in recipes.items()
    }


def with_length(recipe: TrainConfig, max_steps: int) -> TrainConfig:
    """Return the recipe for a run of `max_steps`; all numbers of steps keep their shares of it.

    They are rounded down. Validations stay at steps that are logged, exports at checkpoints.
    """

    def scale(steps: int) -> int:
        return steps and max(1, steps * max_steps // recipe.max_steps)

    rows = max(1, scale(recipe.validation.every) // recipe.log_every)
    checkpoint_every, export_every = scale(recipe.checkpoint_every), recipe.export_every

    optim = replace(
        recipe.optim,
        warmup_steps=scale(recipe.optim.warmup_steps),
        cooldown_steps=scale(recipe.optim.cooldown_steps),
    )
    return replace(
        recipe,
        max_steps=max_steps,
        optim=optim,
        sample_grid=replace(recipe.sample_grid, every=scale(recipe.sample_grid.every)),
        validation=replace(recipe.validation, every=rows * recipe.log_every),
        checkpoint_every=checkpoint_every,
        export_every=export_every and export_every // recipe.checkpoint_every * checkpoint_every,
    )
