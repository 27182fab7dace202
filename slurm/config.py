"""Configurations of the `submit` verbs: the recipe of a verb, and the cluster. Imports no torch."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data_pipeline.config import EncodeConfig
from ifvit.analysis.config import AttentionConfig
from ifvit.errors import require_positive
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.studies.config import PaperConfig, ReportConfig
from ifvit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs run on a cluster; usually a YAML file of configs/cluster."""

    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account to charge."""
    exclude: str | None = None
    """Nodes that jobs must avoid, for example gpu[07,12]."""
    nodes: int = 1
    """Number of nodes of a training job; jobs of other verbs have one task."""
    gpus_per_node: int = 0
    """GPUs per node; a job has one task per GPU, or without GPUs one task per node."""
    cpus_per_task: int = 4
    """CPUs of each task."""
    mem_gb_per_task: float | None = None
    """Memory of each task in GB; unset: the cluster's default."""
    time_min: int = 60
    """Time limit in minutes; a job that needs more time saves its work and is requeued."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which the tasks are signalled to save their work."""
    max_stalled_starts: int = 5
    """Number of starts in a row without new saved work after which a job is not requeued."""
    exit_wait_s: int = 60
    """Seconds after the end of the first task until the other tasks are killed."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, for example for NCCL."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the tasks, for example `module load cuda`."""
    container_image: str | None = None
    """Container image of the tasks, for srun's pyxis plugin; tasks use the python of the image."""
    container_mounts: str | None = None
    """Mounts of the container, in the notation of pyxis."""
    python: str = sys.executable
    """Python interpreter of the tasks; it must exist on all nodes."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other long options of sbatch, for example {qos: high, constraint: h200}."""
    folder: str = "~/ifvit_jobs"
    """Folder for code snapshots, job files and logs; all nodes must see it."""

    def __post_init__(self) -> None:
        names = ("nodes", "cpus_per_task", "time_min", "max_stalled_starts")
        require_positive(self, *(f"cluster.{name}" for name in names))
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError(
                f"cluster.signal_delay_s is {self.signal_delay_s}, expected less than "
                f"{60 * self.time_min} (time_min in seconds)"
            )

    @property
    def tasks_per_node(self) -> int:
        """Number of tasks on each node: one per GPU, at least one."""
        return max(1, self.gpus_per_node)

    def single_task(self) -> "ClusterConfig":
        """Return this configuration for a job of one task with at most one GPU."""
        return replace(self, nodes=1, gpus_per_node=min(1, self.gpus_per_node))


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Where jobs run."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster: a YAML file of configs/cluster, or single fields."""
    executor: Literal["slurm", "local"] = "slurm"
    """slurm: submit and return. local: run the jobs one after the other in this process."""
    dry_run: bool = False
    """Print the sbatch scripts and submit nothing."""


@dataclass(frozen=True, kw_only=True)
class SubmitTrainConfig(SubmitConfig, TrainConfig):
    """Submit `ifvit train` with one task per GPU; the job is requeued until its last step is done.

    With `axes`, submit an array of runs RUN/NAME, one for every combination of the axes' values.
    """

    axes: tuple[dict[str, dict[str, Any]], ...] = ()
    """Each axis maps the names of its values to the recipe fields that they set, for example
    {seed1: {seed: 1}, seed2: {seed: 2}}. The name of a run joins the names of its values."""


@dataclass(frozen=True, kw_only=True)
class SubmitEncodeConfig(SubmitConfig, EncodeConfig):
    """Submit `ifvit encode` as an array of `num_tasks` jobs that divide the shards."""


@dataclass(frozen=True, kw_only=True)
class SubmitEvaluateConfig(SubmitConfig, EvaluateConfig):
    """Submit `ifvit evaluate`: `num_tasks` jobs generate the samples, then one job measures."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SubmitConfig):
    """Submit all stages from images to reports; each job waits for the jobs that it needs.

    In every stage after training, the folder of the sweep stands for all runs of the sweep.
    """

    run: str
    """Folder that records the jobs, usually that of the training run."""
    encode: list[EncodeConfig] = field(default_factory=list)
    """Datasets to encode."""
    train: list[TrainConfig] = field(default_factory=list)
    """Training runs; each waits for all datasets."""
    sweep: str | None = None
    """More training runs: a recipe of `ifvit submit train` with axes, a file or a shipped name."""
    references: list[MakeReferenceConfig] = field(default_factory=list)
    """Reference statistics of real images, which evaluations compare with."""
    evaluate: list[EvaluateConfig] = field(default_factory=list)
    """Evaluations; each one waits for its run and for all references."""
    attention: list[AttentionConfig] = field(default_factory=list)
    """Analyses of attention; they wait until all runs have ended and leave out failed runs."""
    report: ReportConfig | None = None
    """Report; it waits until all other jobs have ended, and names missing results."""
    paper: PaperConfig | None = None
    """Tables and figures of the paper; they wait until all other jobs have ended."""


@dataclass(frozen=True, kw_only=True)
class CancelConfig:
    """Cancel all jobs of a run, sweep or pipeline; submit them again to continue."""

    run: str
    """Folder that was given to `ifvit submit`."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig(CancelConfig):
    """Show the state of the jobs of a run, sweep or pipeline."""

    follow: bool = False
    """Print the state again every ten seconds until all jobs have ended."""
    json: bool = False
    """Print a list of JSON objects."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig(CancelConfig):
    """Show the log of a task of the newest job of a run."""

    job: str | None = None
    """Job id; unset: the newest job."""
    task: int = 0
    """Index of the task; the log of task 0 also says why a job was requeued."""
    lines: int = 100
    """Number of lines to print."""
    follow: bool = False
    """Keep printing new lines."""
