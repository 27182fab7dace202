"""Configurations of the `submit` verbs: a verb's own recipe and the cluster. Imports no torch."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from data_pipeline.config import EncodeConfig
from ifvit.analysis.config import AttentionConfig
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.studies.config import PaperConfig, ReportConfig
from ifvit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs run on one cluster; usually a YAML file of configs/cluster."""

    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account to charge."""
    exclude: str | None = None
    """Nodes that jobs must avoid, for example gpu[07,12]."""
    nodes: int = 1
    """Nodes of a training job; jobs of other verbs have one task."""
    gpus_per_node: int = 0
    """GPUs on each node; there is one task per GPU, and one task per node without GPUs."""
    cpus_per_task: int = 4
    """CPUs of each task."""
    mem_gb_per_task: float | None = None
    """Memory of each task in GB; unset: the cluster's default."""
    time_min: int = 60
    """Time limit in minutes; a job that needs longer saves its work and is requeued."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which the tasks are told to save."""
    max_stalled_starts: int = 5
    """Stop requeueing after this many starts in a row without new saved work."""
    exit_wait_s: int = 60
    """Seconds after the end of the first task at which the other tasks are killed."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, for example for NCCL."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the tasks, for example `module load cuda`."""
    container_image: str | None = None
    """Container image of the tasks, for srun's pyxis plugin; its own python is used."""
    container_mounts: str | None = None
    """Mounts of the container, in the notation of pyxis."""
    python: str = sys.executable
    """Python interpreter of the tasks; it must exist on the nodes."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other long options of sbatch, for example {qos: high, constraint: h200}."""
    folder: str = "~/ifvit_jobs"
    """Folder for code snapshots, job files and logs; all nodes must see it."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "time_min", "max_stalled_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name} is {getattr(self, name)}, expected at least 1")
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError(
                f"cluster.signal_delay_s is {self.signal_delay_s}, expected less than time_min"
            )

    @property
    def tasks_per_node(self) -> int:
        """One task per GPU, or one."""
        return max(1, self.gpus_per_node)

    def single_task(self) -> "ClusterConfig":
        """Return the cluster for a job of one task with at most one GPU."""
        return replace(self, nodes=1, gpus_per_node=min(1, self.gpus_per_node))


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Where jobs run."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster: a YAML file of configs/cluster or single fields."""
    executor: Literal["slurm", "local"] = "slurm"
    """slurm: submit and return. local: run the jobs one after the other in this process."""
    dry_run: bool = False
    """Print the sbatch script and submit nothing."""


@dataclass(frozen=True, kw_only=True)
class SubmitTrainConfig(SubmitConfig, TrainConfig):
    """Submit `ifvit train` with one task per GPU; the job is requeued until its last step.

    With `axes`, submit an array of runs RUN/NAME, one for every combination of the axes' values.
    """

    axes: tuple[dict[str, dict[str, Any]], ...] = ()
    """Each axis maps a value's name to the recipe fields that it sets, for example
    {seed1: {seed: 1}, seed2: {seed: 2}}. The name of a run joins the names of its values."""


@dataclass(frozen=True, kw_only=True)
class SubmitEncodeConfig(SubmitConfig, EncodeConfig):
    """Submit `ifvit encode` as an array of `num_tasks` jobs that divide the shards."""


@dataclass(frozen=True, kw_only=True)
class SubmitEvaluateConfig(SubmitConfig, EvaluateConfig):
    """Submit `ifvit evaluate`: `num_tasks` jobs generate the samples, then one job measures."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SubmitConfig):
    """Submit all stages from images to pages; each job waits for the jobs that it needs.

    In every stage after training, the folder of the sweep stands for all of its runs.
    """

    run: str
    """Folder that records the jobs, usually that of the training run."""
    encode: list[EncodeConfig] = field(default_factory=list)
    """Datasets to encode."""
    train: list[TrainConfig] = field(default_factory=list)
    """Training runs; each waits for all datasets."""
    sweep: str | None = None
    """Recipe of `ifvit submit train` with axes, a file or a name in configs/train: more runs."""
    references: list[MakeReferenceConfig] = field(default_factory=list)
    """Reference statistics of real images that evaluations compare with."""
    evaluate: list[EvaluateConfig] = field(default_factory=list)
    """Evaluations; each waits for its run and for all references."""
    attention: list[AttentionConfig] = field(default_factory=list)
    """Analyses of attention; they wait until all runs have ended and leave out the failed ones."""
    report: ReportConfig | None = None
    """Page of all runs; it waits until all other jobs have ended and names missing results."""
    paper: PaperConfig | None = None
    """Tables and figures of the paper; the job waits as the report does."""


@dataclass(frozen=True, kw_only=True)
class CancelConfig:
    """Cancel all jobs of a run, sweep or pipeline; submit again to continue it."""

    run: str
    """Folder that was given to `ifvit submit`."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig(CancelConfig):
    """Show the state of the jobs of a run, sweep or pipeline."""

    follow: bool = False
    """Print again every ten seconds until all jobs have ended."""
    json: bool = False
    """Print a list of JSON objects."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig(CancelConfig):
    """Show the log of a task of the newest job of a run."""

    job: str | None = None
    """Job id; unset: the newest job."""
    task: int = 0
    """Task whose log is shown; the log of task 0 also says why a job was requeued."""
    lines: int = 100
    """Lines to print."""
    follow: bool = False
    """Continue to print new lines."""
