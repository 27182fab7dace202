"""What benchmarks share: interleaved rounds, medians, one line of JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm


def measure_rounds(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Call all contenders in turn, `rounds` times => the results of each one.

    In turn, so that a machine that slows down slows all of them.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for name in tqdm([*contenders] * rounds, desc="measure", leave=False):
        results[name].append(contenders[name]())
    return results


def median_of_rounds(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, float]:
    """The same => the median of each one's results."""
    results = measure_rounds(contenders, rounds)
    return {name: statistics.median(values) for name, values in results.items()}


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round, which what slows both leaves alone."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> float:
    """Interquartile range as a share of the median."""
    if len(values) == 1:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / median


def seconds_on(device: torch.device, work: Callable[[], object]) -> float:
    """Time that `work` takes, on the clock of the device that it runs on."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """One JSON object on one line, or a line for each value."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:<20} {shown}\n")
