"""Timing for all benchmarks: interleaved rounds, ratios, and the limits of the hardware."""

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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def print_result(result: Mapping[str, object], as_json: bool) -> None:
    """Print the values as one JSON object, or as one line each."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        sys.stdout.write(f"{name:<20} {shown}\n")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Work whose `amount` is known: FLOPs of a matrix product, or bytes of a copy in and out."""

    amount: int
    seconds: Callable[[], float]

    def best(self, seconds: list[float]) -> float:
        """Return the FLOP/s or bytes/s of the fastest round."""
        return self.amount / min(seconds)


def matmul_probe(device: torch.device, dtype: torch.dtype) -> Probe:
    """Multiply two square matrices that are large enough to reach the peak of the device."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    work = partial(torch.mm, a, b, out=torch.empty_like(a))
    return Probe(amount=2 * side**3, seconds=partial(seconds_on, device, work))


def copy_probe(device: torch.device) -> Probe:
    """Copy a tensor that is larger than the caches."""
    count = 2**29 if device.type == "cuda" else 2**26
    source = torch.zeros(count, device=device)
    work = partial(torch.empty_like(source).copy_, source)
    return Probe(amount=2 * 4 * count, seconds=partial(seconds_on, device, work))


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that `forward` keeps for its backward pass, without the parameters."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del result  # it keeps the noted tensors alive, so that no address occurs twice
    return sum(kept.values())
