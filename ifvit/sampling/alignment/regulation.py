"""Attention regulation (Zhang et al. 2024, arXiv 2403.06381), the optimisation by itself.

A smooth bias on the logits of chosen text tokens, found anew in each regulated block and step
from that block's logits alone; no gradient goes through the network. Every sample and head is
a problem of its own, so nothing depends on the batch.

Shapes: B batch, H heads, N image tokens of a square map, T target tokens, M text tokens,
K basis functions.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ifvit.sampling.alignment.targets import TargetTokens

_NUM_ITERATIONS = 20
_STEP_SIZE = 100.0
_QUANTILE, _HIGH = 0.9, 0.9
_MASS_PER_TARGET = 0.2
_MASS_WEIGHT, _SIZE_WEIGHT = 80.0, 0.09


@dataclass(frozen=True, kw_only=True)
class TextLogits:
    """Logits of image queries and text keys, in the parts that the optimisation tells apart.

    The softmax over all text tokens needs no more, since only the targets' logits change.
    """

    targets: Tensor
    """(B, H, N, T) float32, -inf where a sample has fewer than T targets."""
    rest: Tensor
    """(B, H, N): logsumexp over the other text tokens."""

    @classmethod
    def split(cls, logits: Tensor, targets: TargetTokens) -> Self:
        """Logits (B, H, N, M) of all M text tokens."""
        chosen = targets.positions[:, None, None].expand(*logits.shape[:3], -1)
        absent = ~targets.present[:, None, None]
        is_target = torch.zeros_like(logits[:, 0, 0], dtype=torch.bool)
        is_target = is_target.scatter(1, targets.positions, targets.present)
        return cls(
            targets=logits.gather(3, chosen).masked_fill(absent, -torch.inf),
            rest=logits.masked_fill(is_target[:, None, None], -torch.inf).logsumexp(dim=3),
        )

    def attention(self, bias: Tensor) -> Tensor:
        """Target columns (B, H, N, T) of softmax(A + S) over all text tokens."""
        return torch.softmax(self._with_rest(bias), dim=-1)[..., :-1]

    def logsumexp(self, bias: Tensor) -> Tensor:
        """Of A + S over all text tokens (B, H, N)."""
        return self._with_rest(bias).logsumexp(dim=-1)

    def _with_rest(self, bias: Tensor) -> Tensor:
        return torch.cat([self.targets + bias, self.rest[..., None]], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best bias found."""

    bias: Tensor
    """S* (B, H, N, T); zero where there is no target."""
    loss: Tensor
    """(B,), mean over heads; at most that of no bias."""


def gaussian_basis(side: int) -> Tensor:
    """(N, K) values of Gaussians on a map of side**2 tokens, row by row.

    Width sigma = side / 16 and centres 2 sigma apart, 49 in all. The authors round sigma down,
    which is the same for the maps of 16, 32 and 64 they have and zero for smaller ones.
    """
    sigma = side / 16
    positions = torch.arange(side, dtype=torch.float32)
    centres = torch.arange(1, 8, dtype=torch.float32) * 2 * sigma
    line = torch.exp(-((positions[:, None] - centres) ** 2) / (2 * sigma**2))
    return torch.kron(line, line)


def regulation_loss(attention: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    """(B, H) losses E_hi + 80 E_mass + 0.09 E_reg, means over the targets that are `present`.

    E_hi = (q_0.9 P - 0.9)^2 over the map, E_mass = (mean P - theta / T)^2 with
    theta = min(1, 0.2 T), E_reg = W^2; P (B, H, N, T), W (B, H, K, T), present (B, T).
    """
    count = present.sum(dim=1)[:, None].clamp(min=1)
    wanted_mass = ((_MASS_PER_TARGET * count).clamp(max=1.0) / count)[..., None]
    too_low = (attention.quantile(_QUANTILE, dim=2) - _HIGH).square()
    off_mass = (attention.mean(dim=2) - wanted_mass).square()
    size = weights.square().mean(dim=2)
    per_target = too_low + _MASS_WEIGHT * off_mass + _SIZE_WEIGHT * size
    return (per_target * present[:, None]).sum(dim=2) / count


@torch.enable_grad()
def optimise_bias(logits: TextLogits, present: Tensor, basis: Tensor) -> Optimum:
    """20 steps of gradient descent on W in S = sum_k W_k G_k; the best S seen, per sample.

    `present` (B, T), `basis` (N, K). W starts at zero (the authors: uniform in [0, 1)), so no
    bias at all is among the candidates and nothing is random.
    """
    samples, heads, _, num_targets = logits.targets.shape
    weights = logits.targets.new_zeros(samples, heads, basis.shape[1], num_targets)
    best_bias = torch.zeros_like(logits.targets)
    best_loss = best_bias.new_full((samples,), torch.inf)
    for _ in range(_NUM_ITERATIONS):
        weights.requires_grad_()
        bias = basis @ weights
        losses = regulation_loss(logits.attention(bias), weights, present)
        # Of the sum: the authors' mean over heads, times the number of heads in their step.
        (gradient,) = torch.autograd.grad(losses.sum(), weights)
        loss = losses.detach().mean(dim=1)
        is_better = (loss < best_loss)[:, None, None, None]
        best_bias = torch.where(is_better, bias.detach(), best_bias)
        best_loss = torch.minimum(loss, best_loss)
        weights = weights.detach() - _STEP_SIZE * gradient
    return Optimum(bias=best_bias, loss=best_loss)
