"""`ifvit submit train | encode | evaluate | sweep`: recipes => jobs."""

import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import submitit
from submitit import Executor
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from data_pipeline.config import EncodeConfig
from ifvit import storage
from ifvit.config import dump_config, read_config
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.training.config import TrainConfig
from slurm.config import (
    ClusterConfig,
    SubmitConfig,
    SubmitEncodeConfig,
    SubmitEvaluateConfig,
    SubmitSweepConfig,
    SubmitTrainConfig,
    SweepConfig,
    recipe_of,
    sbatch_parameters,
)
from slurm.jobs import (
    JobRecord,
    Revision,
    SubmissionRecord,
    VerbJob,
    read_revision,
    take_snapshot,
    write_record,
)

_NEVER_MIND_TIMEOUTS = 1_000_000  # submitit's own limit; slurm.supervise decides instead


class Submission:
    """Adds jobs one array after the other and keeps the record of `home` up to date."""

    def __init__(self, config: SubmitConfig, home: str, name: str) -> None:
        self._config, self._home, self._name = config, home, name
        self._submitted = datetime.now(UTC)
        self._jobs: list[JobRecord] = []
        root = Path(config.cluster.folder).expanduser().absolute()
        stem = f"{self._submitted:%Y-%m-%dT%H-%M-%S}_{name}_"
        if config.dry_run:
            self.folder, self._code = root / stem, root / "code"
            self._revision = Revision(commit="", diff="")
            return
        self._code = take_snapshot(root / "code")
        self.folder = Path(tempfile.mkdtemp(prefix=stem, dir=root))
        self._revision = read_revision()

    def add(
        self, jobs: Sequence[VerbJob], after: Sequence[str] = (), ended: Sequence[str] = ()
    ) -> list[str]:
        """Submit jobs of one shape, several as an array.

        They start once the jobs `after` have succeeded and the jobs `ended` have ended, however;
        they are cancelled when one of the former fails. Returns their ids. Raises UserError when
        SLURM is not there or refuses, which takes back the whole submission, or when a job that is
        run here fails.
        """
        name = f"ifvit-{jobs[0].verb}"
        parameters = sbatch_parameters(jobs[0].cluster, name, self.folder, self._code)
        waits = {"afterok": after, "afterany": ended}
        dependency = ",".join(f"{how}:{':'.join(ids)}" for how, ids in waits.items() if ids)
        if dependency:
            parameters["dependency"] = dependency
            parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        if self._config.dry_run:
            sys.stdout.write(self._script(parameters, len(jobs)) + "\n")
            return [f"<{job.verb}_{number}>" for number, job in enumerate(jobs)]
        executor = self._executor(jobs[0].cluster, parameters)
        if self._config.executor != "slurm":
            submitted = executor.submit_array(jobs)
            self._record(jobs, submitted)
            self._wait(submitted)
            return []
        try:
            submitted = executor.submit_array(jobs)
            self._record(jobs, submitted)
        except FailedJobError as error:
            self._take_back()
            raise UserError(f"sbatch: {' '.join(str(error).split())}") from None
        except BaseException:  # whoever interrupts it must not search the queue for its jobs
            self._take_back()
            raise
        self._say(jobs[0], submitted)
        return [job.job_id for job in submitted]

    def _executor(self, cluster: ClusterConfig, parameters: dict[str, Any]) -> Executor:
        match self._config.executor:
            case "debug":
                return submitit.DebugExecutor(self.folder)
            case "local":
                local = submitit.LocalExecutor(self.folder, _NEVER_MIND_TIMEOUTS)
                local.update_parameters(
                    timeout_min=cluster.time_min,
                    tasks_per_node=cluster.tasks,
                    gpus_per_node=cluster.gpus_per_node,
                    setup=parameters["setup"],
                    stderr_to_stdout=True,
                )
                return local
            case "slurm":
                return self._slurm_executor(cluster, parameters)

    def _slurm_executor(self, cluster: ClusterConfig, parameters: dict[str, Any]) -> Executor:
        try:
            python = shlex.quote(cluster.python)
            executor = submitit.SlurmExecutor(self.folder, _NEVER_MIND_TIMEOUTS, python=python)
        except RuntimeError:
            raise UserError(
                "no `srun` on this machine; submit from a login node of the cluster, "
                "or run here with --executor local"
            ) from None
        executor.update_parameters(**parameters)
        return executor

    def _script(self, parameters: dict[str, Any], num_jobs: int) -> str:
        python = shlex.quote(self._config.cluster.python)
        return _make_sbatch_string(
            command=f"{python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}",
            folder=self.folder,
            map_count=num_jobs if num_jobs > 1 else None,
            **parameters,
        )

    def _record(self, jobs: Sequence[VerbJob], submitted: Sequence[submitit.Job[None]]) -> None:
        self._jobs += [
            JobRecord(job_id=known.job_id, verb=job.verb, run=job.run)
            for job, known in zip(jobs, submitted, strict=True)
        ]
        record = SubmissionRecord(
            submitted=self._submitted.isoformat(timespec="seconds"),
            command=sys.argv,
            commit=self._revision.commit,
            folder=str(self.folder),
            executor=self._config.executor,
            jobs=self._jobs,
        )
        write_record(self._home, record, self._revision.diff)
        for run in {job.run for job in jobs} - {self._home}:
            own = [job for job in self._jobs if job.run == run]
            write_record(run, replace(record, jobs=own), self._revision.diff)

    def _take_back(self) -> None:
        """Half a pipeline is of no use."""
        if self._jobs:
            subprocess.run(["scancel", *(job.job_id for job in self._jobs)], check=True)

    def _say(self, job: VerbJob, submitted: Sequence[submitit.Job[None]]) -> None:
        cluster, number = job.cluster, submitted[0].job_id.partition("_")[0]
        array = f"array of {len(submitted)}, " if len(submitted) > 1 else ""
        sys.stdout.write(
            f"{number}: {job.verb}, {array}{cluster.nodes} nodes x {cluster.tasks} "
            f"tasks; see ifvit submit status {self._home}\n"
        )

    def _wait(self, submitted: Sequence[submitit.Job[None]]) -> None:
        for job in submitted:
            job.wait()
            if job.exception() is not None:
                raise UserError(f"job {job.job_id} failed; its log is {job.paths.stdout}")


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
