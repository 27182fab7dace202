"""Settings of the verbs that report on runs; imports no torch."""

from dataclasses import dataclass


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
