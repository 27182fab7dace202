"""Settings of the analysis verbs; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Print parameters and GFLOPs of every preset in every fusion setting."""

    json: bool = False
    """Print a list of JSON objects instead of a table."""
