"""Counter-based random numbers: functions of (seed, step, position, stream) and nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the counter
(block, position, step, stream) and the seed as key. Random numbers therefore do not depend on the
number of processes, the micro-batch size or restarts. Training, sampling and evaluation call this
module. N is the number of positions.
"""

import math
from collections.abc import Sequence
from enum import IntEnum, unique
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

Array = NDArray[Any]
Words = TypeVar("Words", Tensor, Array)


@unique
class Stream(IntEnum):
    """Purpose of a random number; different streams of one sample are independent."""

    CAPTION = 0
    DROPOUT = 1
    TIMESTEP = 2
    POSTERIOR = 3
    NOISE = 4
    SAMPLING = 5
    ORDER = 6
    FLIP = 7
    SHARD_ORDER = 8
    HELD_OUT_POSTERIOR = 9
    HELD_OUT_NOISE = 10


def philox(counter: Tensor, seed: int) -> Tensor:
    """Ten Philox rounds: counters (N, 4) => random words (N, 4), uint32 values in int64."""
    return torch.stack(_ten_rounds(counter.unbind(dim=1), seed), dim=1)


def uniform(seed: int, step: int, positions: Tensor, stream: Stream, count: int) -> Tensor:
    """Positions (N,) int64 => (N, count) float32 uniform in [0, 1), with 24 random bits."""
    words = _words(seed, step, positions, stream, count)
    return (words >> 8).to(torch.float32) * 2.0**-24


def uniform_array(seed: int, step: int, positions: Array, stream: Stream) -> Array:
    """Positions (N,) int64 => (N,) float32, the numbers of `uniform` with count 1, in NumPy.

    The loader calls this for a few hundred positions, where overhead would dominate in torch.
    """
    zeros = np.zeros_like(positions)
    words = _ten_rounds((zeros, positions, zeros + step, zeros + stream), seed)
    result: Array = (words[0] >> 8).astype(np.float32) * np.float32(2.0**-24)
    return result


def normal(
    seed: int, step: int, positions: Tensor, stream: Stream, shape: tuple[int, ...]
) -> Tensor:
    """Positions (N,) int64 => (N, *shape) float32 standard normal, by Box and Muller."""
    count = math.prod(shape)
    words = _words(seed, step, positions, stream, count + count % 2)
    # The +1 moves the argument of the logarithm to (0, 1].
    radius = torch.sqrt(-2.0 * torch.log(((words[:, 0::2] >> 8) + 1).to(torch.float32) * 2.0**-24))
    angle = (words[:, 1::2] >> 8).to(torch.float32) * (2.0**-24 * 2.0 * math.pi)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2)
    return pairs.flatten(1)[:, :count].reshape(len(positions), *shape)


def permutation(
    seed: int, epoch: int, count: int, stream: Stream = Stream.ORDER, start: int = 0
) -> Tensor:
    """Return a random order of 0 to count - 1, (count,) int64, for one epoch.

    The items stand at positions `start` to `start + count - 1` of the epoch.
    """
    parts = torch.arange(start, start + count).chunk(1 + (count >> 16))  # saves memory
    words = torch.cat([_words(seed, epoch, part, stream, 1)[:, 0].clone() for part in parts])
    return torch.argsort(words, stable=True)


def _ten_rounds(words: Sequence[Words], seed: int) -> tuple[Words, ...]:
    x0, x1, x2, x3 = words
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def _multiply(x: Words, factor: int) -> tuple[Words, Words]:
    """High and low 32 bits of the product of two uint32 values, in int64 without overflow.

    x * factor = x * (factor - 2^32) + x * 2^32, and the first product is above -2^63.
    """
    product = x * (factor - (1 << 32))
    return (product >> 32) + x, product & _MASK


def _words(seed: int, step: int, positions: Tensor, stream: Stream, count: int) -> Tensor:
    """Random words (N, count), uint32 values in int64."""
    num_blocks = -(-count // 4)
    blocks = torch.arange(num_blocks, device=positions.device)
    counter = torch.empty(len(positions), num_blocks, 4, dtype=torch.int64, device=positions.device)
    counter[..., 0] = blocks
    counter[..., 1] = positions[:, None]
    counter[..., 2] = step
    counter[..., 3] = int(stream)
    return philox(counter.flatten(0, 1), seed).view(len(positions), -1)[:, :count]
