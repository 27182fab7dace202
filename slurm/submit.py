"""`ifvit submit train | encode | evaluate | sweep | pipeline`: recipes => jobs."""

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
    PipelineConfig,
    SubmitEncodeConfig,
    SubmitEvaluateConfig,
    SubmitSweepConfig,
    SubmitTrainConfig,
    SweepConfig,
    recipe_of,
)
from slurm.jobs import VerbJob
from slurm.submission import Submission

_FOLLOW_UPS = {
    "reference": "ifvit.evaluation.reference_set:make_reference",
    "count": "ifvit.analysis.object_count:count_objects_of_runs",
    "attention": "ifvit.analysis.analyze_attention:analyze_attention",
    "report": "ifvit.analysis.report:report",
    "paper": "ifvit.analysis.paper:report_paper",
}
_PAGES = ("report", "paper")


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
    return _add_evaluate(Submission(config, _home(recipe), "evaluate"), [recipe], config.cluster)


def submit_sweep(config: SubmitSweepConfig) -> list[str]:
    """Submit a training run for every combination of the axes' values; returns the jobs' ids."""
    runs = [_train(recipe, config.cluster) for recipe in expand_axes(config)]
    return Submission(config, _absolute(config.run), "sweep").add(runs)


def submit_pipeline(config: PipelineConfig) -> list[str]:
    """Submit everything from images to pages; returns the ids of all jobs."""
    submission = Submission(config, _absolute(config.run), "pipeline")
    sweep = _read_sweep(config.sweep) if config.sweep else None
    swept = expand_axes(sweep) if sweep else []

    def add(arrays: Sequence[Sequence[VerbJob]], after: Sequence[str] = ()) -> list[str]:
        return [i for jobs in arrays if jobs for i in submission.add(jobs, after)]

    def job(verb: str, recipe: Any) -> list[VerbJob]:
        return [_follow_up(verb, recipe, config)]

    def runs_of(folders: Sequence[str]) -> list[str]:
        """A sweep's folder stands for its runs."""
        runs = {sweep.run: [recipe.run for recipe in swept]} if sweep else {}
        return [run for folder in folders for run in runs.get(folder, [folder])]

    encoded = add([_encode(recipe, config.cluster) for recipe in config.encode])
    arrays = [*([recipe] for recipe in config.train), swept]
    trained = add([[_train(r, config.cluster) for r in recipes] for recipes in arrays], encoded)
    referenced = add([job("reference", recipe) for recipe in config.references])
    made = [
        i
        for recipe in config.evaluate
        for i in _add_evaluate(
            submission,
            [replace(recipe, weights=run) for run in runs_of([recipe.weights])],
            config.cluster,
            after=[*(trained or encoded), *referenced],
        )
    ]
    for verb, recipes in (("count", config.count_objects), ("attention", config.attention)):
        whole = [replace(recipe, runs=runs_of(recipe.runs)) for recipe in recipes]
        made += add([job(verb, recipe) for recipe in whole], trained or encoded)
    pages = {"report": config.report, "paper": config.paper}
    told = {verb: replace(page, runs=runs_of(page.runs)) for verb, page in pages.items() if page}
    reported = add([job(verb, page) for verb, page in told.items()], made or trained)
    return [*encoded, *trained, *referenced, *made, *reported]


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


def _read_sweep(name: str) -> SweepConfig:
    flag = "--config" if Path(name).suffix else "--recipe"
    return read_config(SweepConfig, [flag, name], prog="ifvit submit sweep")


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
    recipes: Sequence[EvaluateConfig],
    cluster: ClusterConfig,
    after: Sequence[str] = (),
) -> list[str]:
    """Draw in one array, measure in a second one; `recipes` differ in their weights alone."""
    num_tasks = recipes[0].num_tasks
    if num_tasks > 1:
        shares = [replace(recipe, task=task) for recipe in recipes for task in range(num_tasks)]
        after = submission.add([_evaluate(share, cluster) for share in shares], after)
    measured = [replace(recipe, num_tasks=1, task=0) for recipe in recipes]
    return submission.add([_evaluate(recipe, cluster) for recipe in measured], after)


def _follow_up(verb: str, recipe: Any, config: PipelineConfig) -> VerbJob:
    """A job of one task; pages are written without a GPU."""
    cluster = config.cluster.single_task()
    return VerbJob(
        verb=verb,
        function=_FOLLOW_UPS[verb],
        config=recipe,
        run=_absolute(config.run),
        cluster=replace(cluster, gpus_per_node=0) if verb in _PAGES else cluster,
    )


def _home(recipe: EvaluateConfig) -> str:
    """The run whose weights are measured, or the folder that receives the rows."""
    return _absolute(recipe.output or recipe.weights.partition("/weights/")[0])


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else str(Path(url).absolute())
