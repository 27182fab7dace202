"""Attention regulation (Zhang et al. 2024, arXiv 2403.06381), the optimisation by itself.

A smooth bias on the logits of chosen text tokens, found anew in each regulated block and step
from that block's logits alone; no gradient goes through the network. Every sample and head is
a problem of its own, so nothing depends on the batch.

Shapes: B batch, H heads, T target tokens, M text tokens, N image tokens of a square map,
K basis functions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.sampling.alignment.targets import TargetTokens

_NUM_ITERATIONS = 20
_STEP_SIZE = 100.0
_QUANTILE, _HIGH = 0.9, 0.9
_MASS_PER_TARGET = 0.2
_MASS_WEIGHT, _SIZE_WEIGHT = 80.0, 0.09


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best bias found."""

    bias: Tensor
    """S* (B, H, T, N); zero where there is no target."""
    loss: Tensor
    """(B,), mean over heads; at most that of no bias."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """E_hi + 80 E_mass + 0.09 E_reg and its derivatives; written out, three times as fast."""

    value: Tensor
    """(B, H)"""
    by_attention: Tensor
    """(B, H, T, N): dL/dP."""
    by_weights: Tensor
    """(B, H, T, K): dL/dW at constant P."""


def relative_logits(logits: Tensor, targets: TargetTokens) -> Tensor:
    """Logits (B, H, N, M) of text => those of the targets over all other text, (B, H, T, N).

    A_target - logsumexp(A_other): all that the softmax over the text depends on while only the
    targets' logits change. -inf where a sample has fewer than T targets.
    """
    is_target = torch.zeros_like(logits[:, 0, 0], dtype=torch.bool)
    is_target = is_target.scatter(1, targets.positions, targets.present)
    others = logits.masked_fill(is_target[:, None, None], -torch.inf).logsumexp(dim=3)
    chosen = targets.positions[:, None, None].expand(*logits.shape[:3], -1)
    relative = logits.gather(3, chosen) - others[..., None]
    return relative.masked_fill(~targets.present[:, None, None], -torch.inf).transpose(2, 3)


def target_attention(relative: Tensor) -> Tensor:
    """Target columns of the softmax over the text tokens, (B, H, T, N) => (B, H, T, N)."""
    return torch.softmax(_with_others(relative), dim=2)[:, :, :-1]


def added_mass(relative: Tensor, bias: Tensor) -> Tensor:
    """logsumexp(A + S) - logsumexp(A) over the text tokens, (B, H, N)."""
    biased, plain = _with_others(relative + bias), _with_others(relative)
    return biased.logsumexp(dim=2) - plain.logsumexp(dim=2)


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


def regulation_loss(attention: Tensor, weights: Tensor, present: Tensor) -> Loss:
    """Loss of P (B, H, T, N) and W (B, H, T, K), means over the targets `present` (B, T).

    E_hi = (q_0.9 P - 0.9)^2 over the map, E_mass = (mean P - theta / T)^2 with
    theta = min(1, 0.2 T), E_reg = mean W^2.
    """
    num_tokens, num_kernels = attention.shape[-1], weights.shape[-1]
    count = present.sum(dim=1)[:, None, None].clamp(min=1)
    share = present[:, None] / count
    mass_off = attention.mean(dim=-1) - (_MASS_PER_TARGET * count).clamp(max=1.0) / count
    # The quantile between the two nearest values, as torch.quantile has it.
    rank = _QUANTILE * (num_tokens - 1)
    low = int(rank)
    ordered, order = attention.sort(dim=-1)
    high_off = torch.lerp(ordered[..., low], ordered[..., low + 1], rank - low) - _HIGH

    value = high_off.square() + _MASS_WEIGHT * mass_off.square()
    value = value + _SIZE_WEIGHT * weights.square().mean(dim=-1)
    of_each = (2 * _MASS_WEIGHT / num_tokens) * share * mass_off
    of_quantile = 2 * share * high_off
    of_two = torch.stack([(1 - rank + low) * of_quantile, (rank - low) * of_quantile], dim=-1)
    return Loss(
        value=(value * share).sum(dim=-1),
        by_attention=of_each[..., None]
        .expand_as(attention)
        .scatter_add(-1, order[..., low : low + 2], of_two),
        by_weights=(2 * _SIZE_WEIGHT / num_kernels) * share[..., None] * weights,
    )


def optimise_bias(relative: Tensor, present: Tensor, basis: Tensor) -> Optimum:
    """20 steps of gradient descent on W in S = sum_k W_k G_k; the best S seen, per sample.

    `relative` (B, H, T, N), `present` (B, T), `basis` (N, K). W starts at zero (the authors:
    uniform in [0, 1)), so no bias at all is among the candidates and nothing is random.
    The authors' step is 100 times the number of problems, of a loss that is their mean.
    """
    weights = relative.new_zeros(*relative.shape[:3], basis.shape[1])
    best_bias = torch.zeros_like(relative)
    best_loss = relative.new_full((len(relative),), torch.inf)
    for _ in range(_NUM_ITERATIONS):
        bias = weights @ basis.T
        attention = target_attention(relative + bias)
        loss = regulation_loss(attention, weights, present)
        mean = loss.value.mean(dim=1)
        best_bias = torch.where((mean < best_loss)[:, None, None, None], bias, best_bias)
        best_loss = torch.minimum(mean, best_loss)
        # dP_i/dA_j = P_i (delta_ij - P_j) over the targets i, j of one image token.
        weighted = attention * loss.by_attention
        by_logits = weighted - attention * weighted.sum(dim=2, keepdim=True)
        weights = weights - _STEP_SIZE * (by_logits @ basis + loss.by_weights)
    return Optimum(bias=best_bias, loss=best_loss)


def _with_others(relative: Tensor) -> Tensor:
    """Relative to the other tokens together, those have the logit 0; (B, H, T + 1, N)."""
    return functional.pad(relative, (0, 0, 0, 1))
