"""Attention regulation (Zhang et al. 2024, arXiv 2403.06381), the optimisation by itself.

A smooth bias on the logits of chosen text tokens, found anew in each regulated block and step
from that block's logits alone; no gradient goes through the network. Every sample and head is
a problem of its own, so nothing depends on the batch.

Shapes: B batch, H heads, T target tokens, M text tokens, N image tokens of a square map,
K basis functions.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.errors import UserError
from ifvit.models.attention import logits_of
from ifvit.sampling.config import Mass

Span = tuple[int, int]
"""First character and last character + 1."""

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_PARTICIPLE = re.compile(r".{3,}(?:ing|ed)$")
_NOUNS_LIKE_PARTICIPLES = frozenset(
    ("building", "ceiling", "clothing", "evening", "morning", "railing")
)
_OTHER_WORDS = frozenset(
    _WORD.findall(
        """
    a an the this that these those its his her their our my your it he she they we you i who which
    and or but nor so as if than then while when where there here not no nothing else only just also
    of in on at by to for from with without into onto upon over under above below beneath beside
    besides between behind near next along across around through against about off out up down
    inside outside within during before after toward towards
    left right top bottom front back side middle center centre
    is are was were be been being am do does did has have had can could will would may might must
    some any many few several each every all both other another very more most much too quite
    red orange yellow green blue purple violet pink brown black white gray grey dark light bright
    big small large little tiny huge tall short long old new young high low wide open full empty
    picture photo photograph image drawing painting
    """
    )
)


@dataclass(frozen=True, kw_only=True)
class TargetTokens:
    """Where the targets of each caption stand among its text tokens."""

    positions: Tensor
    """(B, T) int64 in 0 ... M - 1; 0 where nothing is present."""
    present: Tensor
    """(B, T) bool."""

    def to(self, device: torch.device) -> "TargetTokens":
        """The same on another device."""
        return TargetTokens(positions=self.positions.to(device), present=self.present.to(device))


def find_targets(
    captions: Sequence[str],
    phrase: str | None,
    token_spans: Callable[[str], Sequence[Span]],
) -> TargetTokens:
    """The tokens of the words of `phrase` or, without one, of each caption's nouns and numerals.

    `token_spans` says which characters each token stands for. A caption without any target is
    not regulated. Raises UserError for a word of the phrase that a caption does not hold.
    """
    rows = []
    for caption in captions:
        spans = _nouns_and_numerals(caption) if phrase is None else _spans_of(phrase, caption)
        rows.append([i for i, token in enumerate(token_spans(caption)) if _is_in(token, spans)])
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in rows])
    return TargetTokens(positions=padded, present=torch.arange(longest) < counts[:, None])


def _nouns_and_numerals(caption: str) -> list[Span]:
    return [match.span() for match in _WORD.finditer(caption) if _may_be_noun(match[0].lower())]


def _may_be_noun(word: str) -> bool:
    if word in _NOUNS_LIKE_PARTICIPLES:
        return True
    return word not in _OTHER_WORDS and not _PARTICIPLE.match(word)


def _spans_of(phrase: str, caption: str) -> list[Span]:
    """The k-th mention of a word in the phrase is its k-th occurrence in the caption."""
    wanted = Counter(match[0].lower() for match in _WORD.finditer(phrase))
    spans = []
    for match in _WORD.finditer(caption):
        if wanted[match[0].lower()] > 0:
            wanted[match[0].lower()] -= 1
            spans.append(match.span())
    if missing := [word for word, count in wanted.items() if count > 0]:
        raise UserError(
            f'regulation.targets: "{missing[0]}" is not in the prompt "{caption}"; name its words'
        )
    return spans


def _is_in(token: Span, words: list[Span]) -> bool:
    """Whether the token is a piece of one of the words; special tokens have no characters."""
    start, end = token
    return start < end and any(first <= start and end <= last for first, last in words)


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
