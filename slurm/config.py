"""What `ifvit submit` may be told: each verb's own recipe, and where to run it; free of torch."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from data_pipeline.config import EncodeConfig
from ifvit.analysis.config import AttentionConfig, PaperConfig, ReportConfig
from ifvit.evaluation.config import EvaluateConfig, MakeReferenceConfig
from ifvit.evaluation.object_count_config import ObjectCountConfig
from ifvit.training.config import TrainConfig
from slurm.cluster import ClusterConfig

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
