"""What a device can do at most, measured beside what is compared with it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ifvit.bench.timing import seconds_on


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
