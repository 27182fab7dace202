"""`ifvit submit pipeline`: all stages from images to pages, each waiting for what it needs.

A run that fails takes its own evaluations with it and nothing else: what is about several runs
waits until all have ended, and is made of those that are there. Without data there is nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.config import read_config
from slurm.config import PipelineConfig, SweepConfig
from slurm.jobs import VerbJob
from slurm.submit import Submission, absolute, add_evaluate, encode_jobs, expand_axes, train_job

_FUNCTIONS = {
    "reference": "ifvit.evaluation.references:make_reference",
    "count": "ifvit.studies.object_counts:count_objects_of_runs",
    "attention": "ifvit.analysis.attention_analysis:analyze_attention",
    "report": "ifvit.studies.report:report",
    "paper": "ifvit.studies.paper:report_paper",
}
_PAGES = ("report", "paper")


def submit_pipeline(config: PipelineConfig) -> list[str]:
    """Submit everything from images to pages; returns the ids of all jobs."""
    return _Pipeline(config).submit()


class _Pipeline:
    """The stages of one recipe, with the runs of its sweep spelled out."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        sweep = _read_sweep(config.sweep) if config.sweep else None
        swept = expand_axes(sweep) if sweep else []
        self._swept = {sweep.run: [recipe.run for recipe in swept]} if sweep else {}
        self._arrays = [*([recipe] for recipe in config.train), *([swept] if swept else [])]
        self._submission = Submission(config, absolute(config.run), "pipeline")

    def submit(self) -> list[str]:
        """Submit stage after stage; returns the ids of all jobs."""
        config, cluster = self._config, self._config.cluster
        encoded = self._add_each(encode_jobs(recipe, cluster) for recipe in config.encode)
        trained = self._add_each(
            ([train_job(recipe, cluster) for recipe in array] for array in self._arrays), encoded
        )
        referenced = self._add_each([self._job("reference", r)] for r in config.references)
        measured = self._add_evaluations(trained, encoded, referenced)
        stages = (("count", config.count_objects), ("attention", config.attention))
        analysed = self._add_each(
            (
                [replace(self._of_runs(verb, recipe), last_weights=self._last_weights())]
                for verb, recipes in stages
                for recipe in recipes
            ),
            encoded,
            trained,
        )
        pages = {"report": config.report, "paper": config.paper}
        reported = self._add_each(
            ([self._of_runs(verb, page)] for verb, page in pages.items() if page),
            encoded,
            [*trained, *measured, *analysed],
        )
        return [*encoded, *trained, *referenced, *measured, *analysed, *reported]

    def _add_each(
        self,
        arrays: Iterable[Sequence[VerbJob]],
        after: Sequence[str] = (),
        ended: Sequence[str] = (),
    ) -> list[str]:
        return [i for jobs in arrays for i in self._submission.add(jobs, after, ended)]

    def _add_evaluations(
        self, trained: Sequence[str], encoded: Sequence[str], referenced: Sequence[str]
    ) -> list[str]:
        """Each waits for its own run, one of weights from elsewhere for all."""
        runs = [recipe.run for array in self._arrays for recipe in array]
        job_of = dict(zip(runs, trained, strict=False))  # what ran here has no ids any more
        return [
            i
            for recipe in self._config.evaluate
            for run in self._spell_out([recipe.weights])
            for i in add_evaluate(
                self._submission,
                replace(recipe, weights=run),
                self._config.cluster,
                after=[*([job_of[run]] if run in job_of else trained or encoded), *referenced],
            )
        ]

    def _of_runs(self, verb: str, recipe: Any) -> VerbJob:
        return self._job(verb, replace(recipe, runs=self._spell_out(recipe.runs)))

    def _job(self, verb: str, recipe: Any) -> VerbJob:
        """A job of one task; pages are written without a GPU."""
        cluster = self._config.cluster.single_task()
        return VerbJob(
            verb=verb,
            function=_FUNCTIONS[verb],
            config=recipe,
            run=absolute(self._config.run),
            cluster=replace(cluster, gpus_per_node=0) if verb in _PAGES else cluster,
        )

    def _spell_out(self, folders: Sequence[str]) -> list[str]:
        """A sweep's folder stands for its runs."""
        return [run for folder in folders for run in self._swept.get(folder, [folder])]

    def _last_weights(self) -> dict[str, str]:
        """Run => folder of the weights that it ends with."""
        return {
            recipe.run: storage.join(recipe.run, "weights", f"step_{recipe.max_steps:08d}")
            for array in self._arrays
            for recipe in array
        }


def _read_sweep(name: str) -> SweepConfig:
    flag = "--config" if Path(name).suffix else "--recipe"
    return read_config(SweepConfig, [flag, name], prog="ifvit submit sweep")
