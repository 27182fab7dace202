"""Settings of the analysis verbs; imports no torch."""

from dataclasses import dataclass


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
