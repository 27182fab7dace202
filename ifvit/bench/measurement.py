"""Timing for all benchmarks: ratios within interleaved rounds, and how results are printed."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round; slow phases cancel out."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range divided by the median."""
    if len(values) == 1:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / median


def seconds_on(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes on `device`, including the work it queues on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """Print the values as one JSON object, or as one line each."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:<20} {shown}\n")
