"""The study file, and the configurations of `study` and `report`; imports no torch."""

from dataclasses import field, fields
from typing import Any, Literal

from data_pipeline.config import EncodeConfig
from ifvit.analysis.config import AttentionSettings, KnockoutSettings
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluationSettings, MakeReferenceConfig
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.object_count import CountScore
from ifvit.evaluation.rows import MetricsRow
from ifvit.records import PlainName, PositiveInt, record, shorten
from ifvit.scenes import ScenesConfig
from ifvit.training.config import Location, TrainConfig

RECORD = "study.json"
"""File of a run folder that says that all stages of a study are done for the run."""
PLAN = "plan"
"""Value of `only` that measures the steps of a study that matches seconds, and does no run."""


@record
class ReportConfig:
    """Write one self-contained HTML page about one or more runs, side by side."""

    runs: list[str]
    """Run folders; the first one is the baseline that the others are compared with."""

    output: str = "report.html"
    """HTML file to write; it needs no network."""


@record
class Claim:
    """A statement about one arm beside others, which the study tests."""

    text: str
    """The statement in words."""
    arm: PlainName
    """The arm that the statement is about."""
    against: tuple[PlainName, ...]
    """The arms that it is compared with, each of them."""
    metrics: dict[str, Literal["better", "worse"]]
    """Fields of MetricsRow or CountScore, and how the arm compares in them if the claim holds."""

    def __post_init__(self) -> None:
        """Raise UserError for a claim that compares nothing, and for an unknown metric."""
        if not self.against or not self.metrics or self.arm in self.against:
            raise UserError(f"{self.text}: give against (other arms than {self.arm}) and metrics")
        known = [
            each.name
            for row in (MetricsRow, CountScore)
            for each in fields(row)
            if each.type in (Estimate, Estimate | None)
        ]
        if unknown := [name for name in self.metrics if name not in known]:
            raise UserError(
                f"{self.text}: no metric {shorten(unknown[0])}; metrics are {', '.join(known)}"
            )


@record
class Published:
    """Published numbers, which the page prints beside ours."""

    source: str
    """Where they are printed, such as `arXiv 2403.16530, Table 1`."""
    values: dict[PlainName, dict[str, float]]
    """Arm => quantity => number. A quantity is a field of MetricsRow or CountScore, or `mparams`,
    `gflops` or `iterations_per_s`."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """Facts of the published evaluation, by the names of `Protocol.facts`, `step` and `ema_decay`.
    The page prints the difference from a published metric only if ours has all of them."""


@record
class StudyConfig:
    """A study: one base recipe, arms that change some of its fields, and seeds.

    Arms of one seed see the same data, captions, noise and timesteps, so their differences are
    paired. The run of an arm and seed is FOLDER/ARM/seedSEED.
    """

    folder: Location
    """Folder of the study: runs, and the page in FOLDER/report."""
    title: str = ""
    """Title of the page; empty: the name of the folder."""
    scenes: list[ScenesConfig] = field(default_factory=list)
    """Sets of scenes to render first."""
    encode: list[EncodeConfig] = field(default_factory=list)
    """Datasets to encode before the runs."""
    references: list[MakeReferenceConfig] = field(default_factory=list)
    """Statistics of real images to compute before the evaluations."""
    train: TrainConfig
    """The base recipe, usually a file; its `run` and `seed` are ignored."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that the study changes for all arms, such as {validation.every: 100}."""
    steps: PositiveInt | None = None
    """Steps of the baseline's runs; schedules and intervals keep their shares of the length.
    Unset: max_steps of the recipe."""
    arms: dict[PlainName, dict[str, Any]]
    """Name of an arm => fields of the recipe that it changes, such as {backbone.fusion: 7*concat}.
    `{seed}` in the field `branch` stands for the seed of the run: `{branch: base/seed{seed}@500}`
    starts each run of an arm from that of the arm base."""
    baseline: PlainName | None = None
    """Arm that all others are compared with; unset: the first one."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs of each arm."""
    match: Literal["steps", "operations", "seconds"] = "steps"
    """What the runs of all arms have in common with those of the baseline: the number of steps, the
    floating-point operations of training, or its processor time (measured once, see plan.json)."""
    evaluate: list[EvaluationSettings] = field(default_factory=list)
    """Evaluations of each run."""
    attention: AttentionSettings | None = None
    """Attention maps of each arm's first seed."""
    knockout: KnockoutSettings | None = None
    """Knock-out of text, in the first seed of each arm whose text enters every block."""
    rating: Location | None = None
    """Folder of human ratings (`ifvit rate`) of the arms' images."""
    claims: tuple[Claim, ...] = ()
    """Statements to test; without any, every arm is compared with the baseline."""
    published: tuple[Published, ...] = ()
    """Published numbers of the arms."""

    def __post_init__(self) -> None:
        """Raise UserError for arms that are named but not defined, and for repeated seeds."""
        if not self.arms or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("a study needs arms and seeds; name each seed once")
        named = {name: f"claims: {claim.text}" for claim in self.claims for name in claim.against}
        named |= {claim.arm: f"claims: {claim.text}" for claim in self.claims}
        named |= {name: f"published: {one.source}" for one in self.published for name in one.values}
        named |= {self.baseline: "baseline"} if self.baseline else {}
        for name, where in named.items():
            if name not in self.arms:
                raise UserError(f"{where}: no arm {name}; arms are {', '.join(self.arms)}")

    @property
    def reference_arm(self) -> str:
        """The arm that all others are compared with."""
        return self.baseline or next(iter(self.arms))


@record
class StudyReportConfig(StudyConfig):
    """Write the page, tables and figures of a study to FOLDER/report.

    Runs that are missing or unfinished are named; all others are shown.
    """


@record
class StudyRunConfig(StudyConfig):
    """Train and evaluate the runs of a study that are missing, then write its page.

    Run it again to continue. A run that fails stops no other run.
    """

    processes: PositiveInt | None = None
    """Runs at the same time; unset: one per GPU, or without a GPU one per core."""
    only: str | None = None
    """ARM/seedSEED: do only this run, in this process; `plan`: only measure the steps of a study
    that matches seconds. The data must be there."""
