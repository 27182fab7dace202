"""`ifvit submit train | encode | evaluate | sweep | pipeline`: recipes => jobs."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.config import EncodeConfig
from ifvit import storage
from ifvit.analysis.config import ReportConfig
from ifvit.config import dump_config, read_config
from ifvit.evaluation.config import EvaluateConfig
from ifvit.training.config import TrainConfig
from slurm.cluster import ClusterConfig
from slurm.config import (
    PipelineConfig,
    SubmitEncodeConfig,
    SubmitEvaluateConfig,
    SubmitSweepConfig,
    SubmitTrainConfig,
    recipe_of,
)
from slurm.jobs import VerbJob
from slurm.submission import Submission


def submit_train(config: SubmitTrainConfig) -> list[str]:
    """Submit one training run; returns the job's id."""
    recipe = recipe_of(TrainConfig, config)
    return Submission(config, _absolute(recipe.run), "train").add([_train(recipe, config.cluster)])


def submit_encode(config: SubmitEncodeConfig) -> list[str]:
    """Submit the encoding of one dataset; returns the ids of the array's jobs."""
    recipe = recipe_of(EncodeConfig, config)
    submission = Submission(config, _absolute(recipe.output), "encode")
    return submission.add(_encode(recipe, config.cluster))


def submit_evaluate(config: SubmitEvaluateConfig) -> list[str]:
    """Submit the drawing, split over jobs, and the measuring after it; returns the latter's id."""
    recipe = recipe_of(EvaluateConfig, config)
    return _add_evaluate(Submission(config, _home(recipe), "evaluate"), recipe, config.cluster)


def submit_sweep(config: SubmitSweepConfig) -> list[str]:
    """Submit a training run for every combination of the axes' values; returns the jobs' ids."""
    runs = [_train(recipe, config.cluster) for recipe in expand_axes(config)]
    return Submission(config, _absolute(config.run), "sweep").add(runs)


def submit_pipeline(config: PipelineConfig) -> list[str]:
    """Submit everything from images to report; returns the ids of all jobs."""
    submission = Submission(config, _absolute(config.run), "pipeline")
    encoded = [
        i for recipe in config.encode for i in submission.add(_encode(recipe, config.cluster))
    ]
    trained = [
        i
        for recipe in config.train
        for i in submission.add([_train(recipe, config.cluster)], after=encoded)
    ]
    evaluated = [
        i
        for recipe in config.evaluate
        for i in _add_evaluate(submission, recipe, config.cluster, after=trained or encoded)
    ]
    reported: list[str] = []
    if config.report:
        job = _report(config.report, config.run, config.cluster)
        reported = submission.add([job], after=evaluated or trained)
    return [*encoded, *trained, *evaluated, *reported]


def expand_axes(config: SubmitSweepConfig) -> list[TrainConfig]:
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


def _train(recipe: TrainConfig, cluster: ClusterConfig) -> VerbJob:
    return VerbJob(
        verb="train",
        function="ifvit.training.train:train",
        config=recipe,
        run=_absolute(recipe.run),
        cluster=cluster,
    )


def _encode(recipe: EncodeConfig, cluster: ClusterConfig) -> list[VerbJob]:
    num_tasks = recipe.num_tasks or 1
    return [
        VerbJob(
            verb="encode",
            function="data_pipeline.encode:encode",
            config=replace(recipe, num_tasks=num_tasks, task=task),
            run=_absolute(recipe.output),
            cluster=cluster.single_task(),
        )
        for task in range(num_tasks)
    ]


def _evaluate(recipe: EvaluateConfig, cluster: ClusterConfig) -> VerbJob:
    return VerbJob(
        verb="evaluate",
        function="ifvit.evaluation.evaluate:evaluate",
        config=recipe,
        run=_home(recipe),
        cluster=cluster.single_task(),
    )


def _add_evaluate(
    submission: Submission,
    recipe: EvaluateConfig,
    cluster: ClusterConfig,
    after: Sequence[str] = (),
) -> list[str]:
    if recipe.num_tasks > 1:
        shares = [replace(recipe, task=task) for task in range(recipe.num_tasks)]
        after = submission.add([_evaluate(share, cluster) for share in shares], after)
    return submission.add([_evaluate(replace(recipe, num_tasks=1, task=0), cluster)], after)


def _report(recipe: ReportConfig, run: str, cluster: ClusterConfig) -> VerbJob:
    return VerbJob(
        verb="report",
        function="ifvit.analysis.report:report",
        config=recipe,
        run=_absolute(run),
        cluster=replace(cluster.single_task(), gpus_per_node=0),
    )


def _home(recipe: EvaluateConfig) -> str:
    """The run whose weights are measured, or the folder that receives the rows."""
    return _absolute(recipe.output or recipe.weights.partition("/weights/")[0])


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else str(Path(url).absolute())
