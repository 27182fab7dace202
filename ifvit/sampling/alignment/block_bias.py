"""Attention regulation inside joint attention, where text is one part of the keys.

The softmax of a fused block runs over time, image and text. The optimisation sees the logits of
the text alone; its bias then shifts the text columns of the image rows, and nothing else.

Shapes: B captions, Q queries, J keys, H heads, E channels per head, N image tokens of a square
map, M text tokens, T target tokens.
"""

import torch
from torch import Tensor

from ifvit.models.attention import logits_of
from ifvit.sampling.alignment.config import Mass
from ifvit.sampling.alignment.regulation import (
    added_mass,
    gaussian_basis,
    optimise_bias,
    relative_logits,
)
from ifvit.sampling.alignment.targets import TargetTokens

_SMOOTHING = 0.25
_DECAY = 0.99


class BlockBias:
    """The bias of one fused block for B captions, called once per evaluation; a `Bias`."""

    def __init__(self, targets: TargetTokens, side: int, mass: Mass) -> None:
        """`side`: the image tokens are a map of side by side."""
        self._targets = targets
        self._basis = gaussian_basis(side).to(targets.present.device)
        self._mass = mass
        self._previous: Tensor | None = None
        self._num_calls = 0

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Queries (B, Q, H, E), keys (B, J, H, E) => addend (B, H, Q, J) to the logits.

        S' = 0.99^s (0.25 S*_{s-1} + 0.75 S*_s) for the targets at evaluation s, before the first
        one S* = 0. `preserve` subtracts logsumexp(A + S') - logsumexp(A) from all text columns,
        so each image query keeps its sum over the text.
        """
        image = slice(1, 1 + len(self._basis))
        logits = logits_of(query[:, image], key[:, image.stop :])
        relative = relative_logits(logits, self._targets)
        bias = self._smooth(optimise_bias(relative, self._targets.present, self._basis).bias)
        columns = self._targets.positions[:, None, None].expand(*logits.shape[:3], -1)
        text_bias = torch.zeros_like(logits).scatter_add(3, columns, bias.transpose(2, 3))
        if self._mass == "preserve":
            text_bias = text_bias - added_mass(relative, bias)[..., None]
        addend = query.new_zeros(len(query), query.shape[2], query.shape[1], key.shape[1])
        addend[:, :, image, image.stop :] = text_bias.to(addend.dtype)
        return addend

    def _smooth(self, optimum: Tensor) -> Tensor:
        previous = torch.zeros_like(optimum) if self._previous is None else self._previous
        decay = _DECAY**self._num_calls
        self._previous = optimum
        self._num_calls += 1
        return decay * (_SMOOTHING * previous + (1 - _SMOOTHING) * optimum)
