"""One micro-batch, and the memory in which it is assembled."""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ifvit.shards.records import Array

CACHE_LINE = 64
"""Bytes; the kernel reads a fifth faster into memory that starts with one."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process.

    `moments` (B, 2C, H, W) in the shards' dtype, `condition` contexts (B, M, D) likewise or class
    numbers (B,) int64, `positions` (B,) int64 in the global batch.
    """

    moments: Tensor
    condition: Tensor
    positions: Tensor


class BatchMemory(Protocol):
    """Where reading threads assemble batches, and how these reach the device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """Host memory to fill."""

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """Start the batch on its way to the device; the result waits for it to arrive."""


class HostMemory:
    """Batches stay where they are assembled.

    Their memory is used again once nobody holds it: fresh pages from the system would cost more
    than all the reading.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, ...], list[Array]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """As `BatchMemory` says."""
        free = self._free[shape]
        try:
            owner = free.pop()
        except IndexError:
            owner = empty_aligned(shape, dtype)
        lent = owner.view()
        weakref.finalize(lent, free.append, owner)  # every tensor upon it keeps `lent` alive
        return torch.from_numpy(lent)

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """As `BatchMemory` says."""
        return lambda: batch


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that starts with a cache line, which NumPy's own do not."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


class CudaMemory:
    """Batches are assembled in pinned memory and copied on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        """As `BatchMemory` says; torch's allocator keeps pinned memory and uses it again."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True)

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """As `BatchMemory` says."""
        with torch.cuda.stream(self._stream):
            copies = {name: self._copy(tensor) for name, tensor in vars(batch).items()}
            copied = self._stream.record_event()

        def receive() -> Batch:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(copied)
            for copy in copies.values():
                copy.record_stream(compute)  # its memory is not to be reused before that is done
            return Batch(**copies)

        return receive

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
