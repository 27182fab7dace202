"""Settings of the analysis verbs; imports no torch."""

from dataclasses import dataclass, field

from ifvit.sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Print parameters and GFLOPs of every preset in every fusion setting."""

    json: bool = False
    """Print a list of JSON objects instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page about one or more runs, side by side."""

    runs: list[str]
    """Run folders; the first is the baseline that the others are compared with."""

    output: str = "report.html"
    """The page; opens without a network."""

    title: str = "ifvit report"
    """Heading of the page."""


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """Write the tables and figures of arXiv 2403.16530 from runs, with the paper's beside ours.

    Runs are grouped into the paper's settings by their backbones; several seeds of a setting give
    its mean and standard error.
    """

    runs: list[str]
    """Run folders, any number of each setting."""

    output: str = "paper"
    """Folder for paper.html, which opens without a network, and PNG and CSV of its parts."""

    study: str | None = None
    """Folder of human ratings (`ifvit rate`), for Figure 6."""

    baseline: str | None = None
    """Pattern of the setting that Figure 4 and Table 2 start from, for example cross*early; unset:
    the first of the paper's order, concat_early, that was trained."""

    series: str | None = None
    """Evaluations to show, NAME/wSCALE as their folders in RUN/evaluation; unset: those of most
    rows, of several that whose guidance scale is nearest to 2, the paper's. The latter always are
    those of Figure 3, which needs many."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Average what image tokens attend to while sampling, by layer (arXiv 2403.16530, Figure 8).

    Of the conditional half, by the plain method; maps, their singular values, a figure, a table.
    """

    runs: list[str]
    """Run or weights folders, for example of early and of intermediate fusion."""

    prompts: str | None = None
    """A text file with one prompt a line."""

    shards: str | None = None
    """Instead, held-out shards: the first caption of each of the first images."""

    num_prompts: int | None = None
    """The first of them; unset: all of the file, 64 of the shards. Memory does not grow with it."""

    output: str | None = None
    """Folder for everything; unset: analysis/attention in each run's folder."""

    trim: int = 1
    """Patches to leave out at each edge of the latent grid, where padding draws attention."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and seed."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes the GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse a config without prompts, or one that the analysis is not about."""
        if (self.prompts is None) == (self.shards is None):
            raise ValueError("give either prompts (a text file) or shards (a folder)")
        if self.num_prompts is not None and self.num_prompts < 2:
            raise ValueError(f"num_prompts {self.num_prompts} gives no standard error; give 2")
        if self.trim < 0:
            raise ValueError(f"trim {self.trim} is negative")
        if self.sampling.method != "plain":
            raise ValueError(f"sampling.method {self.sampling.method}: attention is that of plain")
