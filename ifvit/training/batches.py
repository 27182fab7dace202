"""Shards => batches, in an order that depends on the seed alone.

Sample order is a permutation of (seed, epoch); caption choice and caption dropout are functions of
(seed, step, position in the global batch). Neither knows the number of processes, the size of a
micro-batch or the number of reading threads, so `samples_seen` is the loader's whole state.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.randomness import Stream, permutation, uniform
from ifvit.shards import ShardReader
from ifvit.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process.

    `moments` (B, 2C, H, W) in the shards' dtype, `context` (B, M, D) likewise, `positions` (B,)
    int64 in the global batch.
    """

    moments: Tensor
    context: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            moments=self.moments.to(device, non_blocking=True),
            context=self.context.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which sample, caption and dropout stand at each position of each global batch."""

    num_samples: int
    global_batch_size: int
    seed: int
    caption_dropout: float

    def sample_indices(self, samples_seen: int, positions: Tensor) -> Tensor:
        """(B,) positions => (B,) indices into the shards; epochs follow without a gap."""
        counters = samples_seen + positions
        epochs, offsets = counters // self.num_samples, counters % self.num_samples
        indices = torch.empty_like(counters)
        for epoch in set(epochs.tolist()):
            chosen = epochs == epoch
            indices[chosen] = self._epoch(epoch)[offsets[chosen]]
        return indices

    def caption_indices(self, step: int, positions: Tensor, num_captions: Tensor) -> Tensor:
        """(B,) caption numbers, uniform over each image's captions; -1 where dropped."""
        u = uniform(self.seed, step, positions, Stream.CAPTION, 1)[:, 0]
        dropped = uniform(self.seed, step, positions, Stream.DROPOUT, 1)[:, 0]
        captions = (u * num_captions).long()
        return captions.masked_fill(dropped < self.caption_dropout, -1)

    def _epoch(self, epoch: int) -> Tensor:
        return _epoch_permutation(self.seed, epoch, self.num_samples)


class Batches:
    """Reads each process's share of every global batch, some micro-batches ahead."""

    def __init__(
        self,
        reader: ShardReader,
        order: BatchOrder,
        micro_batch_size: int,
        world: World,
        threads: int,
    ) -> None:
        per_pass = micro_batch_size * world.size
        if order.global_batch_size % per_pass:
            raise UserError(
                f"global_batch_size {order.global_batch_size} is not a multiple of micro_batch_size"
                f" {micro_batch_size} x {world.size} processes"
            )
        self._reader, self._order, self._threads = reader, order, threads
        self._micro, self._world = micro_batch_size, world
        self.num_micro_batches = order.global_batch_size // per_pass
        self._null_context = torch.from_numpy(np.array(reader.null_context))

    def from_state(self, state: TrainState) -> Generator[Batch]:
        """Endless micro-batches from the state on, `num_micro_batches` for every step."""
        with ThreadPoolExecutor(self._threads) as pool:
            pending: deque[Future[Batch]] = deque()
            step, samples_seen = state.step, state.samples_seen
            while True:
                for micro_step in range(self.num_micro_batches):
                    pending.append(pool.submit(self._read, step, samples_seen, micro_step))
                    if len(pending) > 2 * self._threads:
                        yield pending.popleft().result()
                step += 1
                samples_seen += self._order.global_batch_size

    def _read(self, step: int, samples_seen: int, micro_step: int) -> Batch:
        start = (micro_step * self._world.size + self._world.rank) * self._micro
        positions = torch.arange(start, start + self._micro)
        indices = self._order.sample_indices(samples_seen, positions).tolist()
        counts = torch.tensor([self._reader.num_captions(index) for index in indices])
        captions = self._order.caption_indices(step, positions, counts).tolist()
        moments = np.stack([self._reader.moments(index) for index in indices])
        context = torch.stack([self._context(i, c) for i, c in zip(indices, captions, strict=True)])
        return Batch(moments=torch.from_numpy(moments), context=context, positions=positions)

    def _context(self, index: int, caption: int) -> Tensor:
        if caption < 0:
            return self._null_context
        return torch.from_numpy(np.array(self._reader.context(index, caption)))


@lru_cache(maxsize=2)
def _epoch_permutation(seed: int, epoch: int, num_samples: int) -> Tensor:
    return permutation(seed, epoch, num_samples)
