"""`ifvit submit pipeline`: all stages from images to reports as jobs that wait for each other.

A failed run cancels only its own evaluations. Jobs about several runs wait until all runs have
ended, and use the runs that finished. A failed encoding cancels all jobs that need its data.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ifvit import storage
from ifvit.analysis.config import AttentionConfig
from ifvit.config import read_config
from ifvit.studies.config import PaperConfig, ReportConfig
from ifvit.training.config import TrainConfig
from slurm.config import PipelineConfig, SubmitTrainConfig
from slurm.jobs import VerbJob
from slurm.submit import Submission, absolute, add_evaluate, encode_jobs, expand_axes, train_job

_OfRuns = TypeVar("_OfRuns", AttentionConfig, ReportConfig, PaperConfig)


def submit_pipeline(config: PipelineConfig) -> list[str]:
    """Submit all stages; return the ids of all jobs."""
    arrays, config = _expand_sweep(config)
    recipes = [recipe for array in arrays for recipe in array]
    cluster, home = config.cluster, absolute(config.run)
    single = cluster.single_task()
    submission = Submission(config, home, "pipeline")
    encoded = [i for recipe in config.encode for i in submission.add(encode_jobs(recipe, cluster))]
    trained = [
        i
        for array in arrays
        for i in submission.add([train_job(recipe, cluster) for recipe in array], encoded)
    ]
    referenced = []
    for reference in config.references:
        verb = "evaluate --make_reference"
        job = VerbJob(verb=verb, config=reference, run=home, cluster=single)
        referenced += submission.add([job])
    # An evaluation waits for its run, or for all runs if its run is not among them.
    job_of = dict(zip((r.run for r in recipes), trained, strict=False))  # no ids if run locally
    evaluated = []
    for recipe in config.evaluate:
        needed = [job_of[recipe.weights]] if recipe.weights in job_of else trained or encoded
        evaluated += add_evaluate(submission, recipe, cluster, after=[*needed, *referenced])
    last_weights = {
        recipe.run: storage.join(recipe.run, "weights", f"step_{recipe.max_steps:08d}")
        for recipe in recipes
    }
    analysed = []
    for attention in config.attention:
        job = VerbJob(verb="analyze attention", config=attention, run=home, cluster=single)
        analysed += submission.add([replace(job, last_weights=last_weights)], encoded, trained)
    reported = []
    for verb, report in (("report", config.report), ("report paper", config.paper)):
        if report:
            cpu = replace(single, gpus_per_node=0)
            job = VerbJob(verb=verb, config=report, run=home, cluster=cpu)
            reported += submission.add([job], encoded, [*trained, *evaluated, *analysed])
    return [*encoded, *trained, *referenced, *evaluated, *analysed, *reported]


def _expand_sweep(config: PipelineConfig) -> tuple[list[list[TrainConfig]], PipelineConfig]:
    """Return the arrays of training runs, and the pipeline with the sweep replaced by its runs."""
    arrays = [[recipe] for recipe in config.train]
    runs_of: dict[str, list[str]] = {}
    if config.sweep:
        flag = "--config" if Path(config.sweep).suffix else "--recipe"
        sweep = read_config(SubmitTrainConfig, [flag, config.sweep], prog="ifvit submit train")
        arrays.append(expand_axes(sweep))
        runs_of[sweep.run] = [recipe.run for recipe in arrays[-1]]
    evaluate = [
        replace(recipe, weights=run)
        for recipe in config.evaluate
        for run in runs_of.get(recipe.weights, [recipe.weights])
    ]
    return arrays, replace(
        config,
        evaluate=evaluate,
        attention=[_expand_runs(recipe, runs_of) for recipe in config.attention],
        report=config.report and _expand_runs(config.report, runs_of),
        paper=config.paper and _expand_runs(config.paper, runs_of),
    )


def _expand_runs(recipe: _OfRuns, runs_of: dict[str, list[str]]) -> _OfRuns:
    runs = [run for folder in recipe.runs for run in runs_of.get(folder, [folder])]
    return replace(recipe, runs=runs)
