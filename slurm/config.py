"""What `ifvit submit` may be told: each verb's own recipe, and where to run it; free of torch."""

import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_pipeline.config import EncodeConfig
from ifvit.analysis.config import AttentionConfig
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig, ObjectCountConfig
from ifvit.studies.config import PaperConfig, ReportConfig
from ifvit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One way of running jobs on one cluster; a YAML file of configs/cluster."""

    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, as sbatch spells it."""
    exclude: str | None = None
    """Nodes never to run on, for example gpu[07,12]."""
    nodes: int = 1
    """Nodes of a training job; every other verb runs as jobs of one task."""
    gpus_per_node: int = 0
    """GPUs on each node; each gets one task."""
    tasks_per_node: int | None = None
    """Tasks on each node; unset: one per GPU, or one."""
    cpus_per_task: int = 4
    """CPUs of each task."""
    mem_gb_per_task: float | None = None
    """Memory of each task in GB; unset: the cluster's default."""
    time_min: int = 60
    """Time limit in minutes; a longer run is requeued as often as it needs."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which the tasks are told to save."""
    max_stalled_starts: int = 5
    """Give up after this many starts in a row that saved nothing new."""
    exit_wait_s: int = 60
    """Seconds that the other tasks of a job live on once the first has ended."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, such as NCCL's."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job, such as `module load cuda`."""
    container_image: str | None = None
    """Image to run the tasks in, by srun's pyxis plugin; it brings its own python."""
    container_mounts: str | None = None
    """Mounts of the container, as pyxis spells them."""
    python: str = sys.executable
    """Interpreter that the tasks run; it must exist on the nodes."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any other long option of sbatch, for example {reservation: tuesday}."""
    folder: str = "~/ifvit_jobs"
    """Folder shared by all nodes for snapshots of the code, job files and logs."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "time_min", "max_stalled_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name} must be at least 1")
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError("cluster.signal_delay_s leaves nothing of cluster.time_min")

    @property
    def tasks(self) -> int:
        """Tasks on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def single_task(self) -> "ClusterConfig":
        """The same cluster for a job of one process with at most one GPU."""
        return replace(self, nodes=1, tasks_per_node=1, gpus_per_node=min(1, self.gpus_per_node))


def sbatch_parameters(
    cluster: ClusterConfig, name: str, folder: Path, code: Path
) -> dict[str, Any]:
    """What submitit turns into the sbatch script of a job called `name`, its files in `folder`.

    The script runs the tasks from the snapshot `code`; when they have ended it calls
    `slurm.supervise`, which decides whether the job is requeued.
    """
    script_python = shlex.quote(sys.executable)
    srun_args = [
        f"--cpus-per-task={cluster.cpus_per_task}",  # since 22.05 srun does not take sbatch's
        f"--wait={cluster.exit_wait_s}",
        "--open-mode=append",
    ]
    if cluster.container_image:
        srun_args.append(f"--container-image={cluster.container_image}")
    if cluster.container_mounts:
        srun_args.append(f"--container-mounts={cluster.container_mounts}")
    parameters = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "time": cluster.time_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": _megabytes(cluster),
        "signal_delay_s": cluster.signal_delay_s,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **cluster.sbatch},
        "setup": [
            # SIGTERM must not end the script before it has supervised the end of its tasks.
            "trap : TERM",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            # `python -m` looks first where one has submitted, which may be a checkout edited since.
            "export PYTHONSAFEPATH=1",
            *(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()),
            *cluster.setup,
        ],
        "srun_args": srun_args,
        "teardown": [f"{script_python} -m slurm.supervise {shlex.quote(str(folder))} $?"],
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _megabytes(cluster: ClusterConfig) -> str | None:
    if cluster.mem_gb_per_task is None:
        return None
    return f"{round(cluster.mem_gb_per_task * 1024) * cluster.tasks}M"


Recipe = TypeVar("Recipe")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Where a job runs."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster; a YAML file of configs/cluster or single fields."""
    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: submit and return. local: processes here, waited for. debug: in this process."""
    dry_run: bool = False
    """Print the sbatch script and submit nothing."""


@dataclass(frozen=True, kw_only=True)
class SubmitTrainConfig(SubmitConfig, TrainConfig):
    """Submit `ifvit train`: one task per GPU, requeued until the last step is done."""


@dataclass(frozen=True, kw_only=True)
class SubmitEncodeConfig(SubmitConfig, EncodeConfig):
    """Submit `ifvit encode` as an array of `num_tasks` jobs, which share the shards."""


@dataclass(frozen=True, kw_only=True)
class SubmitEvaluateConfig(SubmitConfig, EvaluateConfig):
    """Submit `ifvit evaluate`: an array of `num_tasks` jobs draws, then one measures."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """Training runs RUN/NAME of one recipe, for every combination of the axes' values."""

    axes: tuple[dict[str, dict[str, Any]], ...]
    """Each axis maps the name of a value to the recipe fields that it sets, for example
    {seed1: {seed: 1}, seed2: {seed: 2}}; a run is called by its values' names."""


@dataclass(frozen=True, kw_only=True)
class SubmitSweepConfig(SubmitConfig, SweepConfig):
    """Submit an array of training runs, RUN/NAME for every combination of the axes' values."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SubmitConfig):
    """Submit all stages from images to pages at once; each waits for what it needs.

    After training, the folder of a sweep stands for all of its runs.
    """

    run: str
    """Folder that remembers the jobs; usually that of the training."""
    encode: list[EncodeConfig] = field(default_factory=list)
    """Datasets to encode: what is trained on, what is held out."""
    train: list[TrainConfig] = field(default_factory=list)
    """Runs; each waits for all datasets."""
    sweep: str | None = None
    """Recipe of `ifvit submit sweep`, a file or a name in configs/sweep: more runs, as an array."""
    references: list[MakeReferenceConfig] = field(default_factory=list)
    """Statistics of real images that evaluations compare with."""
    evaluate: list[EvaluateConfig] = field(default_factory=list)
    """Evaluations; each waits for its run and for all references."""
    count_objects: list[ObjectCountConfig] = field(default_factory=list)
    """Counts of asked objects; each waits until all runs have ended, and takes those trained."""
    attention: list[AttentionConfig] = field(default_factory=list)
    """Analyses of attention; each waits as counts do."""
    report: ReportConfig | None = None
    """The page of runs side by side; waits until everything has ended, and names what failed."""
    paper: PaperConfig | None = None
    """The paper's tables and figures; waits as the report does."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """State of the jobs of a run, pipeline or sweep."""

    run: str
    """Folder that was given to `ifvit submit`."""
    follow: bool = False
    """Print again every `every` seconds until all jobs have ended."""
    every: float = 10.0
    """Seconds between prints."""
    json: bool = False
    """Print a list of JSON objects."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    """Log of a task of the newest job of a run."""

    run: str
    """Folder that was given to `ifvit submit`."""
    job: str | None = None
    """Job id; unset: the newest job."""
    task: int = 0
    """Which task's log; that of task 0 also tells why a job was requeued."""
    lines: int = 100
    """Lines to print."""
    follow: bool = False
    """Go on printing what is appended."""


@dataclass(frozen=True, kw_only=True)
class CancelConfig:
    """Cancel every job of a run, sweep or pipeline; submitted again, it goes on where it was."""

    run: str
    """Folder that was given to `ifvit submit`."""


def recipe_of(cls: type[Recipe], config: Any) -> Recipe:
    """The part of a submit configuration that is the verb's own recipe."""
    return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})  # type: ignore[arg-type]
