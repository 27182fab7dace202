"""`ifvit submit pipeline`: all stages from images to pages as jobs that wait for each other.

A failed run cancels only its own evaluations: jobs about several runs wait until all runs have
ended, and use those that finished. A failed encoding cancels everything that needs its data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.config import read_config
from slurm.config import PipelineConfig, SubmitTrainConfig
from slurm.jobs import VerbJob
from slurm.submit import Submission, absolute, add_evaluate, encode_jobs, expand_axes, train_job


def submit_pipeline(config: PipelineConfig) -> list[str]:
    """Submit all stages; return the ids of all jobs."""
    return _Pipeline(config).submit()


class _Pipeline:
    """The stages of one pipeline recipe, with the runs of its sweep as separate runs."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._arrays = [[recipe] for recipe in config.train]
        self._sweep: dict[str, list[str]] = {}
        if config.sweep:
            flag = "--config" if Path(config.sweep).suffix else "--recipe"
            sweep = read_config(SubmitTrainConfig, [flag, config.sweep], prog="ifvit submit train")
            self._arrays.append(expand_axes(sweep))
            self._sweep[sweep.run] = [recipe.run for recipe in self._arrays[-1]]
        self._submission = Submission(config, absolute(config.run), "pipeline")

    def submit(self) -> list[str]:
        config, cluster = self._config, self._config.cluster
        encoded = self._add_each(encode_jobs(recipe, cluster) for recipe in config.encode)
        trained = self._add_each(
            ([train_job(recipe, cluster) for recipe in array] for array in self._arrays), encoded
        )
        referenced = self._add_each(
            [self._job("evaluate --make_reference", recipe)] for recipe in config.references
        )
        evaluated = self._add_evaluations(trained, encoded, referenced)
        analysed = self._add_each(
            (
                [replace(self._job("analyze attention", recipe), last_weights=self._last_weights())]
                for recipe in config.attention
            ),
            encoded,
            trained,
        )
        cpu = replace(cluster.single_task(), gpus_per_node=0)
        reported = self._add_each(
            (
                [replace(self._job(verb, recipe), cluster=cpu)]
                for verb, recipe in (("report", config.report), ("report paper", config.paper))
                if recipe
            ),
            encoded,
            [*trained, *evaluated, *analysed],
        )
        return [*encoded, *trained, *referenced, *evaluated, *analysed, *reported]

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
        """Add evaluations; each waits for its own run, or for all runs when it has another one."""
        runs = [recipe.run for array in self._arrays for recipe in array]
        job_of = dict(zip(runs, trained, strict=False))  # without SLURM there are no ids
        return [
            i
            for recipe in self._config.evaluate
            for run in self._expand([recipe.weights])
            for i in add_evaluate(
                self._submission,
                replace(recipe, weights=run),
                self._config.cluster,
                after=[*([job_of[run]] if run in job_of else trained or encoded), *referenced],
            )
        ]

    def _job(self, verb: str, recipe: Any) -> VerbJob:
        """Return a job of one task; the sweep's folder in `runs` becomes the sweep's runs."""
        if hasattr(recipe, "runs"):
            recipe = replace(recipe, runs=self._expand(recipe.runs))
        return VerbJob(
            verb=verb,
            config=recipe,
            run=absolute(self._config.run),
            cluster=self._config.cluster.single_task(),
        )

    def _expand(self, folders: Sequence[str]) -> list[str]:
        return [run for folder in folders for run in self._sweep.get(folder, [folder])]

    def _last_weights(self) -> dict[str, str]:
        """Run => folder of its last weights."""
        return {
            recipe.run: storage.join(recipe.run, "weights", f"step_{recipe.max_steps:08d}")
            for array in self._arrays
            for recipe in array
        }
