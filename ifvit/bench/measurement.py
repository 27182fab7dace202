"""Timing for all benchmarks: interleaved rounds, and ratios within a round."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ifvit.models.config import BackboneConfig


def measure_rounds(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Call all contenders in turn, `rounds` times, and return the results of each contender.

    A slow phase of the machine then affects all contenders alike.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for name in tqdm([*contenders] * rounds, desc="measure", leave=False):
        results[name].append(contenders[name]())
    return results


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


def random_condition(config: BackboneConfig, size: int, device: torch.device) -> Tensor:
    """Sample contexts (B, M, D) in float16, as in shards, or classes (B,)."""
    if config.context_shape is None:
        return torch.arange(size, device=device) % (config.num_classes or 1)
    return torch.randn(size, *config.context_shape, device=device).half()


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """Print the values as one JSON object, or as one line each."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:<20} {shown}\n")
