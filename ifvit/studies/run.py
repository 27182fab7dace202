"""The verb `study run`: prepares data, then trains and evaluates the runs that a study lacks.

Every run has a process of its own; `stages` holds what it does.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.encode import encode
from ifvit.connections import is_remote
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.evaluation.config import EvaluationSettings
from ifvit.evaluation.references import make_reference
from ifvit.evaluation.rows import read_training_rows
from ifvit.models.cost import count_cost
from ifvit.records import part_of
from ifvit.scenes.image_sets import render_scenes
from ifvit.studies.config import PLAN, StudyConfig, StudyReportConfig, StudyRunConfig
from ifvit.studies.processes import Event, Job, JobProcesses
from ifvit.studies.recipes import StudyRun, arm_recipes, count_operations, list_runs
from ifvit.studies.stages import is_finished, run_stages
from ifvit.studies.step_time import find_step_seconds
from ifvit.studies.study_page import report_study
from ifvit.training.lease import Lease

_MAX_ENCODERS = 8
"""Processes that encode one dataset, unless it says `num_tasks`; each holds all encoders."""


def run_study(config: StudyRunConfig) -> None:
    """Do what the study lacks, then write its page.

    Raises UserError that names the runs that failed, after all others have ended.
    """
    if config.only is not None:
        _run_only(config, config.only)
        return
    with Lease.acquire(config.folder).held(), _exit_on_sigterm():
        processes = JobProcesses(config.processes, ["ifvit.studies.run"])
        log = _log_folder(config)
        if config.match == "seconds":
            call = partial(list_study_runs, part_of(StudyConfig, config))
            _prepare(processes, [Job(name="measure steps", call=call, log=log / "plan.txt")])
        runs = list_study_runs(config)
        missing = [run for run in runs if not is_finished(config, run)]
        if missing:
            for jobs in _preparations(config, processes.number, log / "data"):
                _prepare(processes, jobs)
        failed = _run_missing(config, processes, runs, missing, log)
        report_study(part_of(StudyReportConfig, config))
    if failed:
        raise UserError(
            f"{config.folder}: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; "
            "repair that and run the same command again to continue"
        )


def list_study_runs(config: StudyConfig) -> list[StudyRun]:
    """Return all runs; a study that matches seconds first measures the steps of its arms."""
    if config.match != "seconds":
        return list_runs(config)
    recipes = arm_recipes(config)
    return list_runs(config, find_step_seconds(config.folder, recipes, config.reference_arm))


def _run_only(config: StudyRunConfig, name: str) -> None:
    runs = {run.name: run for run in list_study_runs(config)}
    if name == PLAN:
        return
    if name not in runs:
        raise UserError(f"only: no run {name}; runs are {', '.join(runs)}")
    run_stages(config, runs[name])


def _log_folder(config: StudyConfig) -> Path:
    """Return the folder of the logs; those of a study in an object store are temporary files."""
    if is_remote(config.folder):
        return Path(tempfile.mkdtemp(prefix="ifvit_study_"))
    return Path(config.folder)


def _preparations(config: StudyConfig, number: int, log: Path) -> Iterator[list[Job]]:
    """Yield the jobs of each stage before the runs; a stage needs the data of the one before."""

    def build(verb: str, function: Callable[[Any], object], configs: Sequence[Any]) -> list[Job]:
        return [
            Job(name=f"{verb} {n}", call=partial(function, each), log=log / f"{verb}_{n}.txt")
            for n, each in enumerate(configs)
        ]

    yield build("scenes", render_scenes, config.scenes)
    tasks = [
        replace(each, num_tasks=num_tasks, task=task)
        for each in config.encode
        for num_tasks in [each.num_tasks or min(number, _MAX_ENCODERS)]
        for task in range(num_tasks)
    ]
    yield build("encode", encode, tasks)
    yield build("reference", make_reference, config.references)


def _prepare(processes: JobProcesses, jobs: Sequence[Job]) -> None:
    """Run jobs that all runs need. Raises UserError when one of them fails."""
    hidden = not sys.stderr.isatty()
    with (
        closing(processes.run(jobs)) as events,
        tqdm(total=len(jobs), desc="prepare", unit="job", leave=False, disable=hidden) as bar,
    ):
        for event in events:
            bar.update(event.ended is not None)
            if event.ended and event.error:
                raise UserError(f"{event.ended.name}: {event.error}; see {event.ended.log}")


def _run_missing(
    config: StudyConfig,
    processes: JobProcesses,
    runs: Sequence[StudyRun],
    missing: Sequence[StudyRun],
    log: Path,
) -> list[str]:
    """Do the missing runs, and show progress; return the names of those that failed."""
    study = part_of(StudyConfig, config)
    jobs = [
        Job(
            name=run.name,
            call=partial(run_stages, study, run),
            log=log / run.name / "log.txt",
            after=run.after,
        )
        for run in missing
    ]
    failed: list[str] = []
    events = processes.run(jobs, 1.0 if sys.stderr.isatty() else None)
    with Progress(config, runs, missing) as progress, closing(events):
        for event in events:
            progress.show(event)
            if event.ended and event.error:
                failed.append(event.ended.name)
    return failed


class Progress:
    """Finished runs, speed and time left of the whole study, on standard error.

    The time left is that of the remaining floating-point operations of training and sampling, at
    the speed since the start.
    """

    def __init__(
        self, config: StudyConfig, runs: Sequence[StudyRun], missing: Sequence[StudyRun]
    ) -> None:
        self._num_runs, self._runs = len(runs), {run.name: run for run in missing}
        self._left, self._num_failed = set(self._runs), 0
        step_costs = count_operations({run.arm: run.recipe for run in missing})
        self._step_costs = {run.name: step_costs[run.arm] for run in missing}
        self._costs = {
            run.name: run.recipe.max_steps * self._step_costs[run.name]
            + sum(_sampling_operations(run, settings) for settings in config.evaluate)
            for run in missing
        }
        self._steps = {run.name: _count_steps(run) for run in missing}
        self._first, self._started = self._count(), time.monotonic()

    def __enter__(self) -> "Progress":
        total = sum(self._costs.values())
        hidden = not sys.stderr.isatty()
        shape = "{desc} {percentage:3.0f}%|{bar}|"
        self._bar = tqdm(total=total, initial=self._first[1], bar_format=shape, disable=hidden)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def _count(self) -> tuple[int, float]:
        """Return steps and operations of the missing runs that are done."""
        ended = [self._costs[name] for name in self._costs if name not in self._left]
        begun = [self._steps[name] * self._step_costs[name] for name in self._left]
        return sum(self._steps.values()), sum(ended) + sum(begun)

    def show(self, event: Event) -> None:
        """Read how far the runs are; print a line for a run that has ended."""
        for job in (*event.running, *filter(None, [event.ended])):
            self._steps[job.name] = _count_steps(self._runs[job.name])
        if event.ended:
            self._left.remove(event.ended.name)
            self._num_failed += event.error is not None
        seconds = time.monotonic() - self._started
        steps, operations = self._count()
        speed = (operations - self._first[1]) / seconds
        num_done = self._num_runs - len(self._left) - self._num_failed
        text = f"{num_done}/{self._num_runs} runs"
        text += f", {self._num_failed} failed" if self._num_failed else ""
        text += f", {(steps - self._first[0]) / seconds:.1f} steps/s"
        if speed:
            left = (sum(self._costs.values()) - operations) / speed
            text += f", {timedelta(seconds=round(min(left, 1e9)))} left"
        if event.ended:
            failed = f"failed: {event.error}; see {event.ended.log}"
            end = failed if event.error else "finished"
            tqdm.write(f"{event.ended.name} {end}; {text}", sys.stderr)
        self._bar.n = operations
        self._bar.set_description_str(text)


def _count_steps(run: StudyRun) -> int:
    """Return the number of logged steps."""
    rows = read_training_rows(run.recipe.run, newest=1)
    return rows[-1].step if rows else 0


def _sampling_operations(run: StudyRun, settings: EvaluationSettings) -> float:
    """Return the operations of the backbone for the images of an evaluation."""
    sampling = settings.protocol.sampling
    num_steps = len(settings.steps) if isinstance(settings.steps, list) else 1
    num_rows = num_steps * len(settings.guidance_scales or [0]) * len(settings.methods or [0])
    num_images = num_rows * settings.protocol.num_samples
    return 2.0 * sampling.num_steps * num_images * count_cost(run.recipe.backbone).flops


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends its children."""

    def stop(*_: Any) -> None:
        sys.exit(EXIT_PREEMPTED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
