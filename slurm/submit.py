"""`ifvit submit train | encode | evaluate | study`: submits recipes as SLURM jobs.

A study submits all stages at once as jobs that wait for each other. A failed run cancels no other
job; the page waits until all runs have ended. Failed data cancels all jobs that need it.
"""

import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from data_pipeline.config import EncodeConfig
from ifvit import connections
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.records import part_of
from ifvit.studies.config import PLAN, StudyConfig, StudyReportConfig, StudyRunConfig
from ifvit.studies.recipes import StudyRun, list_runs
from ifvit.training.config import TrainConfig
from ifvit.verbs import VERBS, load
from slurm.config import (
    ClusterConfig,
    SubmitConfig,
    SubmitEncodeConfig,
    SubmitEvaluateConfig,
    SubmitStudyConfig,
    SubmitTrainConfig,
)
from slurm.jobs import (
    TOKEN,
    JobRecord,
    SubmissionRecord,
    VerbJob,
    mark_of,
    run_git,
    write_record,
    write_snapshot,
)

_MAX_TIMEOUTS = 1_000_000
"""submitit's own limit of requeues; so large that only slurm.supervise decides."""


def submit_train(config: SubmitTrainConfig) -> None:
    """Submit one training run, on all nodes of the cluster."""
    recipe, run = part_of(TrainConfig, config), absolute(config.run)
    job = VerbJob(verb="train", config=recipe, run=run, cluster=config.cluster)
    Submission(config, run, "train").add([job])


def submit_encode(config: SubmitEncodeConfig) -> None:
    """Submit the encoding of a dataset as an array."""
    recipe = part_of(EncodeConfig, config)
    submission = Submission(config, absolute(recipe.output), "encode")
    submission.add(encode_jobs(recipe, config.cluster))


def submit_evaluate(config: SubmitEvaluateConfig) -> None:
    """Submit jobs that generate samples and a job that measures."""
    recipe = part_of(EvaluateConfig, config)
    submission = Submission(config, _evaluation_home(recipe), "evaluate")
    add_evaluate(submission, recipe, config.cluster)


def submit_study(config: SubmitStudyConfig) -> None:
    """Submit the stages of a study; its runs that branch start after those they branch from."""
    study = part_of(StudyConfig, config)
    if config.executor == "local" and not config.dry_run:
        load(VERBS["study run"].function)(StudyRunConfig(**vars(study)))
        return
    cluster, home = config.cluster, absolute(study.folder)
    one = VerbJob(verb="scenes", config=None, run=home, cluster=cluster.single_task())
    submission = Submission(config, home, "study")
    rendered: list[str] = []  # ids of jobs, here and below
    ready: list[str] = []
    for scenes in study.scenes:
        rendered += submission.add([replace(one, config=scenes)])
    for data in study.encode:
        ready += submission.add(encode_jobs(data, cluster), rendered)
    for reference in study.references:
        job = replace(one, verb="evaluate --make_reference", config=reference)
        ready += submission.add([job], rendered)
    if study.match == "seconds":
        plan = StudyRunConfig(**vars(study), only=PLAN)
        ready += submission.add([replace(one, verb="study run", config=plan)])
    ended: list[str] = []
    for runs in _generations(study):
        jobs = [
            VerbJob(
                verb="study run",
                config=StudyRunConfig(**vars(study), only=run.name),
                run=absolute(run.recipe.run),
                cluster=cluster,
            )
            for run in runs
        ]
        ended += submission.add(jobs, ready, ended)
    pages = StudyReportConfig(**vars(study))
    cpu = replace(one.cluster, gpus_per_node=0)
    report = replace(one, verb="study report", config=pages, cluster=cpu)
    submission.add([report], ready, ended)


def _generations(study: StudyConfig) -> list[list[StudyRun]]:
    """Return the runs that branch from no run of the study, then those that branch from these, …"""
    left = list_runs(study, dict.fromkeys(study.arms, 1.0))  # whatever their lengths are
    generations = []
    while left:
        names = {run.name for run in left}
        generations.append([run for run in left if run.after not in names])
        left = [run for run in left if run.after in names]
    return generations


def encode_jobs(recipe: EncodeConfig, cluster: ClusterConfig) -> list[VerbJob]:
    """Return `num_tasks` jobs that divide the shards of one dataset."""
    num_tasks = recipe.num_tasks or 1
    return [
        VerbJob(
            verb="encode",
            config=replace(recipe, num_tasks=num_tasks, task=task),
            run=absolute(recipe.output),
            cluster=cluster.single_task(),
        )
        for task in range(num_tasks)
    ]


def add_evaluate(
    submission: "Submission",
    recipe: EvaluateConfig,
    cluster: ClusterConfig,
    after: Sequence[str] = (),
) -> list[str]:
    """Add jobs that generate samples, and one that measures them; return the id of the last."""
    job = VerbJob(
        verb="evaluate",
        config=replace(recipe, num_tasks=1, task=0),
        run=_evaluation_home(recipe),
        cluster=cluster.single_task(),
    )
    if recipe.num_tasks > 1:
        parts = [replace(recipe, task=task) for task in range(recipe.num_tasks)]
        after = submission.add([replace(job, config=part) for part in parts], after)
    return submission.add([job], after)


def _evaluation_home(recipe: EvaluateConfig) -> str:
    """Return the output folder of the rows, by default the run of the measured weights."""
    run = recipe.weights.rpartition("/weights/step_")[0]
    return absolute(recipe.output or run or recipe.weights)


def absolute(url: str) -> str:
    """Return a path as an absolute path, because jobs run in another folder; return a URL as is."""
    return url if connections.is_remote(url) else str(Path(url).absolute())


class Submission:
    """One call of `ifvit submit`: adds jobs, one array at a time, and records them in `home`."""

    def __init__(self, config: SubmitConfig, home: str, name: str) -> None:
        self._config, self._home = config, home
        self._submitted = datetime.now(UTC)
        self._jobs: list[JobRecord] = []
        self._token = secrets.token_hex(32)
        root = Path(config.cluster.folder).expanduser().absolute()
        stem = f"{self._submitted:%Y-%m-%dT%H-%M-%S}_{name}_"
        if config.dry_run or config.executor == "local":
            self._code, self._folder = root / "code", root / stem
        else:
            self._code = write_snapshot(root / "code")
            self._folder = Path(tempfile.mkdtemp(prefix=stem, dir=root))
            (self._folder / TOKEN).write_text(self._token)
            self._commit, self._diff = run_git("rev-parse", "HEAD").strip(), run_git("diff", "HEAD")

    def add(
        self, jobs: Sequence[VerbJob], after: Sequence[str] = (), ended: Sequence[str] = ()
    ) -> list[str]:
        """Submit jobs of one verb, several jobs as an array; return their ids.

        The jobs start when all jobs of `after` have succeeded and all jobs of `ended` have ended;
        SLURM cancels them when a job of `after` fails. Raises UserError when there is no SLURM, or
        when sbatch rejects the jobs; then all jobs of this submission are cancelled.
        """
        waits = {"afterok": after, "afterany": ended}
        dependency = ",".join(f"{how}:{':'.join(ids)}" for how, ids in waits.items() if ids)
        parameters = sbatch_parameters(jobs[0], self._folder, self._code, dependency)
        parameters["job_name"] += f"-{mark_of(self._token)}"
        python = shlex.quote(self._config.cluster.python)
        if self._config.dry_run:
            self._print_script(len(jobs), python, parameters)
            return [f"<{job.name}_{number}>" for number, job in enumerate(jobs)]
        if self._config.executor == "local":
            for job in jobs:
                load(VERBS[job.verb].function)(job.config)
            return []
        try:
            executor = submitit.SlurmExecutor(self._folder, _MAX_TIMEOUTS, python=python)
        except RuntimeError:
            raise UserError(
                "no `srun` on this machine; submit from a login node of the cluster, "
                "or run here with --executor local"
            ) from None
        executor.update_parameters(**parameters)
        try:
            submitted = executor.submit_array(jobs)
            self._record(jobs, submitted)
        except BaseException as error:  # Ctrl-C, too, must not leave jobs in the queue
            if self._jobs:
                subprocess.run(["scancel", *(job.job_id for job in self._jobs)], check=True)
            if isinstance(error, FailedJobError):
                raise UserError(f"sbatch: {' '.join(str(error).split())}") from None
            raise
        cluster, number = jobs[0].cluster, submitted[0].job_id.partition("_")[0]
        array = f"array of {len(jobs)}, " if len(jobs) > 1 else ""
        sys.stdout.write(
            f"{number}: {jobs[0].verb}, {array}{cluster.nodes} nodes x {cluster.tasks_per_node} "
            f"tasks; see ifvit submit status {self._home}\n"
        )
        return [job.job_id for job in submitted]

    def _print_script(self, num_jobs: int, python: str, parameters: dict[str, Any]) -> None:
        script = _make_sbatch_string(
            command=f"{python} -u -m submitit.core._submit {shlex.quote(str(self._folder))}",
            folder=self._folder,
            map_count=num_jobs if num_jobs > 1 else None,
            **parameters,
        )
        sys.stdout.write(f"{script}\n")

    def _record(self, jobs: Sequence[VerbJob], submitted: Sequence[submitit.Job[None]]) -> None:
        self._jobs += [
            JobRecord(job_id=known.job_id, verb=job.verb, run=job.run)
            for job, known in zip(jobs, submitted, strict=True)
        ]
        record = SubmissionRecord(
            submitted=self._submitted.isoformat(timespec="seconds"),
            command=tuple(sys.argv),
            commit=self._commit,
            folder=str(self._folder),
            token=self._token,
            jobs=tuple(self._jobs),
        )
        write_record(self._home, record, self._diff)
        for run in {job.run for job in jobs} - {self._home}:
            own = tuple(job for job in self._jobs if job.run == run)
            write_record(run, replace(record, jobs=own), self._diff)


def sbatch_parameters(job: VerbJob, folder: Path, code: Path, dependency: str) -> dict[str, Any]:
    """Return submitit's parameters for the sbatch script of `job`; its files go to `folder`.

    The tasks run the snapshot `code`. At its end, the script calls `slurm.supervise`, which
    decides whether the job is requeued.
    """
    cluster = job.cluster
    srun_options = {
        "cpus-per-task": cluster.cpus_per_task,  # not inherited from sbatch since SLURM 22.05
        "wait": cluster.exit_wait_s,
        "open-mode": "append",
        "container-image": cluster.container_image,
        "container-mounts": cluster.container_mounts,
    }
    megabytes = round((cluster.mem_gb_per_task or 0) * 1024) * cluster.tasks_per_node
    parameters = {
        "job_name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "exclude": cluster.exclude,
        "time": cluster.time_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{megabytes}M" if megabytes else None,
        "signal_delay_s": cluster.signal_delay_s,
        "stderr_to_stdout": True,
        "dependency": dependency or None,
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.sbatch},
        "setup": [
            # SIGTERM must not end the script before `supervise` has run.
            "trap : TERM",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            # Otherwise `python -m` prefers the working directory, which may be an edited checkout.
            "export PYTHONSAFEPATH=1",
            *(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()),
            *cluster.setup,
        ],
        "srun_args": [
            f"--{name}={value}" for name, value in srun_options.items() if value is not None
        ],
        "teardown": [
            f"{shlex.quote(sys.executable)} -m slurm.supervise {shlex.quote(str(folder))} $?"
        ],
    }
    return {key: value for key, value in parameters.items() if value is not None}
