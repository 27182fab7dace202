"""`ifvit submit train | encode | evaluate | sweep`: recipes => jobs."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.config import EncodeConfig
from ifvit import storage
from ifvit.config import dump_config, read_config
from ifvit.evaluation.config import EvaluateConfig
from ifvit.training.config import TrainConfig
from slurm.cluster import ClusterConfig
from slurm.config import (
    SubmitEncodeConfig,
    SubmitEvaluateConfig,
    SubmitSweepConfig,
    SubmitTrainConfig,
    SweepConfig,
    recipe_of,
)
from slurm.jobs import VerbJob
from slurm.submission import Submission


def submit_train(config: SubmitTrainConfig) -> list[str]:
    """Submit one training run; returns the job's id."""
    recipe = recipe_of(TrainConfig, config)
    return Submission(config, absolute(recipe.run), "train").add(
        [train_job(recipe, config.cluster)]
    )


def submit_encode(config: SubmitEncodeConfig) -> list[str]:
    """Submit the encoding of one dataset; returns the ids of the array's jobs."""
    recipe = recipe_of(EncodeConfig, config)
    submission = Submission(config, absolute(recipe.output), "encode")
    return submission.add(encode_jobs(recipe, config.cluster))


def submit_evaluate(config: SubmitEvaluateConfig) -> list[str]:
    """Submit the drawing, split over jobs, and the measuring after it; returns the latter's id."""
    recipe = recipe_of(EvaluateConfig, config)
    return add_evaluate(Submission(config, _home(recipe), "evaluate"), recipe, config.cluster)


def submit_sweep(config: SubmitSweepConfig) -> list[str]:
    """Submit a training run for every combination of the axes' values; returns the jobs' ids."""
    runs = [train_job(recipe, config.cluster) for recipe in expand_axes(config)]
    return Submission(config, absolute(config.run), "sweep").add(runs)


def expand_axes(config: SweepConfig) -> list[TrainConfig]:
    """The recipes of a sweep's runs; raises UserError for a field that no recipe has."""
    base = dump_config(recipe_of(TrainConfig, config))
    recipes = []
    for point in itertools.product(*(axis.items() for axis in config.axes)):
        name = "-".join(value for value, _ in point)
        flags = [flag for _, fields in point for flag in _flags(fields)]
        argv = ["--config", base, *flags, "--run", storage.join(config.run, name)]
        recipes.append(read_config(TrainConfig, argv, prog=f"ifvit submit sweep: {name}"))
    return recipes


def _flags(fields: dict[str, Any]) -> Iterator[str]:
    for key, value in fields.items():
        yield f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def train_job(recipe: TrainConfig, cluster: ClusterConfig) -> VerbJob:
    """One training run on all nodes of the cluster."""
    return VerbJob(
        verb="train",
        function="ifvit.training.train:train",
        config=recipe,
        run=absolute(recipe.run),
        cluster=cluster,
    )


def encode_jobs(recipe: EncodeConfig, cluster: ClusterConfig) -> list[VerbJob]:
    """The encoding of one dataset in `num_tasks` shares."""
    num_tasks = recipe.num_tasks or 1
    return [
        VerbJob(
            verb="encode",
            function="data_pipeline.encode:encode",
            config=replace(recipe, num_tasks=num_tasks, task=task),
            run=absolute(recipe.output),
            cluster=cluster.single_task(),
        )
        for task in range(num_tasks)
    ]


def add_evaluate(
    submission: Submission,
    recipe: EvaluateConfig,
    cluster: ClusterConfig,
    after: Sequence[str] = (),
) -> list[str]:
    """Draw in an array, then measure; returns the latter's id."""
    job = VerbJob(
        verb="evaluate",
        function="ifvit.evaluation.evaluate:evaluate",
        config=replace(recipe, num_tasks=1, task=0),
        run=_home(recipe),
        cluster=cluster.single_task(),
    )
    if recipe.num_tasks > 1:
        shares = [replace(recipe, task=task) for task in range(recipe.num_tasks)]
        after = submission.add([replace(job, config=share) for share in shares], after)
    return submission.add([job], after)


def _home(recipe: EvaluateConfig) -> str:
    """The run whose weights are measured, or the folder that receives the rows."""
    return absolute(recipe.output or recipe.weights.partition("/weights/")[0])


def absolute(url: str) -> str:
    """What jobs and people in other folders call it."""
    return url if storage.is_remote(url) else str(Path(url).absolute())
