"""Configurations of the verbs `report` and `report paper`; imports no torch."""

from ifvit.records import record


@record
class ReportConfig:
    """Write one self-contained HTML page about one or more runs, side by side."""

    runs: list[str]
    """Run folders; the first one is the baseline that the others are compared with."""

    output: str = "report.html"
    """HTML file to write; it needs no network."""


@record
class PaperConfig:
    """Write the tables and figures of arXiv 2403.16530 from runs, beside the paper's numbers.

    Runs are grouped into the paper's variants by their fusion maps and text branches. For a
    variant with several seeds the tables show mean and standard error.
    """

    runs: list[str]
    """Run folders, any number per variant."""

    output: str = "paper"
    """Folder for paper.html, which needs no network, and for its figures and tables as PNG and
    CSV."""

    study: str | None = None
    """Folder of human ratings (`ifvit rate`) for Figure 6."""

    series: str | None = None
    """Evaluations to show: NAME/wSCALE, a folder in RUN/evaluation. Unset: those with most rows."""
