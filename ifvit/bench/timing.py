"""What the benchmarks share: interleaved rounds, medians, the limits of the hardware."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Work of known size: FLOPs of a square matrix product, or bytes read and written by a copy."""

    amount: int
    seconds: Callable[[], float]

    def best(self, seconds: list[float]) -> float:
        """FLOP/s or bytes/s of the fastest round."""
        return self.amount / min(seconds)


def matmul_probe(device: torch.device, dtype: torch.dtype) -> Probe:
    """A product of two matrices that is large for the device."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    work = partial(torch.mm, a, b, out=product)
    return Probe(amount=2 * side**3, seconds=partial(seconds_on, device, work))


def copy_probe(device: torch.device) -> Probe:
    """A copy of more than caches hold."""
    count = 2**29 if device.type == "cuda" else 2**26
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    work = partial(target.copy_, source)
    return Probe(amount=2 * 4 * count, seconds=partial(seconds_on, device, work))


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for its backward pass, `parameters` themselves left out."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del result  # until here it holds what was noted, so that no address was used twice
    return sum(kept.values())
