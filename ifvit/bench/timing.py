"""What benchmarks share: interleaved rounds, medians, one line of JSON."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping


def median_of_rounds(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, float]:
    """Call all contenders in turn, `rounds` times => the median of each one's results.

    In turn, so that a machine that slows down slows all of them.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            results[name].append(measure())
    return {name: statistics.median(values) for name, values in results.items()}


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """One JSON object on one line, or a line for each value."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:<20} {shown}\n")
