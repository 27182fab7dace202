"""Configurations of the `submit` verbs: the recipe of a verb, and the cluster. Imports no torch."""

import re
import sys
from dataclasses import field, replace
from typing import Annotated, Literal

from data_pipeline.config import EncodeConfig
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.records import NonNegativeInt, PositiveFloat, PositiveInt, Rule, record
from ifvit.studies.config import StudyConfig
from ifvit.training.config import TrainConfig

_OWN_OPTIONS = "job-name|output|error|open-mode|array|signal|dependency|wrap"


def _matches(words: str, pattern: str) -> Rule:
    return Rule(words, re.compile(pattern).fullmatch)


Line = Annotated[str, Rule("text without control characters", str.isprintable)]
Setting = Annotated[
    str, _matches("text without white space and quotes", r"[\w.,:;=+@%/()&|*~^\[\]-]+")
]
"""Value of an option of sbatch, which takes several options from one line."""
Folder = Annotated[str, _matches("a path without quotes", r"[^\x00-\x1f\x7f'\"\\]+")]
Variable = Annotated[str, _matches("a variable's name", r"[A-Za-z_][A-Za-z0-9_]*")]
Option = Annotated[
    str,
    _matches(
        "a long option of sbatch without --, and not one that ifvit sets",
        rf"(?!({_OWN_OPTIONS})$)[a-z][a-z-]*",
    ),
]
JobId = Annotated[str, _matches("digits, as in 123 or 123_4", "[0-9]{1,18}(_[0-9]{1,9})?")]


@record
class ClusterConfig:
    """How jobs run on a cluster; usually a YAML file of configs/cluster."""

    partition: Setting | None = None
    """Partition; unset: the cluster's default."""
    account: Setting | None = None
    """Account to charge."""
    exclude: Setting | None = None
    """Nodes that jobs must avoid, for example gpu[07,12]."""
    nodes: PositiveInt = 1
    """Number of nodes of a training job or of a run of a study; other jobs have one task."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs per node; a job has one task per GPU, or without GPUs one task per node."""
    cpus_per_task: PositiveInt = 4
    """CPUs of each task."""
    mem_gb_per_task: PositiveFloat | None = None
    """Memory of each task in GB; unset: the cluster's default."""
    time_min: PositiveInt = 60
    """Time limit in minutes; a job that needs more time saves its work and is requeued."""
    signal_delay_s: NonNegativeInt = 120
    """Seconds before the time limit at which the tasks are signalled to save their work."""
    max_stalled_starts: PositiveInt = 5
    """Number of starts in a row without new saved work after which a job is not requeued."""
    exit_wait_s: NonNegativeInt = 60
    """Seconds after the end of the first task until the other tasks are killed."""
    environment: dict[Variable, Line] = field(default_factory=dict)
    """Environment variables of the job, for example for NCCL."""
    setup: tuple[str, ...] = ()
    """Shell lines that run as you before the tasks, for example `module load cuda`; read them
    before you submit with another person's file."""
    container_image: Line | None = None
    """Container image of the tasks, for srun's pyxis plugin; tasks use the python of the image."""
    container_mounts: Line | None = None
    """Mounts of the container, in the notation of pyxis."""
    python: Line = sys.executable
    """Python interpreter of the tasks; it must exist on all nodes."""
    sbatch: dict[Option, Setting] = field(default_factory=dict)
    """Other long options of sbatch, for example {qos: high, constraint: h200}."""
    folder: Folder = "~/ifvit_jobs"
    """Folder for code snapshots, job files and logs; all nodes must see it."""

    def __post_init__(self) -> None:
        if self.signal_delay_s >= 60 * self.time_min:
            raise UserError(
                f"cluster.signal_delay_s is {self.signal_delay_s}; it must be below "
                f"{60 * self.time_min} (time_min in seconds)"
            )

    @property
    def tasks_per_node(self) -> int:
        """Number of tasks on each node: one per GPU, at least one."""
        return max(1, self.gpus_per_node)

    def single_task(self) -> "ClusterConfig":
        """Return this configuration for a job of one task with at most one GPU."""
        return replace(self, nodes=1, gpus_per_node=min(1, self.gpus_per_node))


@record
class SubmitConfig:
    """Where jobs run."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster: a YAML file of configs/cluster, or single fields."""
    executor: Literal["slurm", "local"] = "slurm"
    """slurm: submit and return. local: run the jobs one after the other in this process."""
    dry_run: bool = False
    """Print the sbatch scripts and submit nothing."""


@record
class SubmitTrainConfig(SubmitConfig, TrainConfig):
    """Submit `ifvit train` with one task per GPU; it is requeued until its last step is done."""


@record
class SubmitEncodeConfig(SubmitConfig, EncodeConfig):
    """Submit `ifvit encode` as an array of `num_tasks` jobs that divide the shards."""


@record
class SubmitEvaluateConfig(SubmitConfig, EvaluateConfig):
    """Submit `ifvit evaluate`: `num_tasks` jobs generate the samples, then one job measures."""


@record
class SubmitStudyConfig(SubmitConfig, StudyConfig):
    """Submit `ifvit study run`: data, an array with one job per run, and the page.

    All nodes and tasks work together on each run. A run that fails cancels no other job.
    """


@record
class CancelConfig:
    """Cancel all jobs of a run or study; submit them again to continue."""

    run: str
    """Folder that was given to `ifvit submit`."""


@record
class StatusConfig(CancelConfig):
    """Show the state of the jobs of a run or study."""

    follow: bool = False
    """Print the state again every ten seconds until all jobs have ended."""
    json: bool = False
    """Print a list of JSON objects."""


@record
class LogsConfig(CancelConfig):
    """Show the log of a task of the newest job of a run."""

    job: JobId | None = None
    """Job id; unset: the newest job."""
    task: NonNegativeInt = 0
    """Index of the task; the log of task 0 also says why a job was requeued."""
    lines: NonNegativeInt = 100
    """Number of lines to print."""
    follow: bool = False
    """Keep printing new lines."""
