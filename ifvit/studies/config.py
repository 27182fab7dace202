"""Configurations of the verbs `report` and `report paper`; imports no torch."""

from ifvit.records import record


@record
class ReportConfig:
    """Write one self-contained HTML page about one or more runs, side by side."""

    runs: list[str]
    """Run folders; the first one is the baseline that the others are compared with."""

    output: str = "report.html"
    """HTML file to write; it needs no network."""

    title: str = "ifvit report"
    """Heading of the page."""


@record
class PaperConfig:
    """Write the tables and figures of arXiv 2403.16530 from runs, beside the paper's numbers.

    Runs are grouped into the paper's variants by their backbones. For a variant with several seeds
    the tables show mean and standard error.
    """

    runs: list[str]
    """Run folders, any number per variant."""

    output: str = "paper"
    """Folder for paper.html, which needs no network, and for its figures and tables as PNG and
    CSV."""

    study: str | None = None
    """Folder of human ratings (`ifvit rate`) for Figure 6."""

    baseline: str | None = None
    """Pattern for the baseline of Figure 4 and Table 2, for example cross*early. Unset: the first
    trained variant in the paper's order, usually concat_early."""

    series: str | None = None
    """Evaluations to show: NAME/wSCALE, a folder in RUN/evaluation. Unset: the series with most
    rows; among equals, the one whose guidance scale is nearest to 2, the paper's. Figure 3 always
    shows the series of the default."""
