"""Attention regulation (Zhang et al. 2024, arXiv 2403.06381): a smooth bias on attention logits.

`ifvit.sampling.alignment` makes one `Regulation` per batch of prompts. In each regulated block, at
each function evaluation, the bias is optimised on the logits of that block alone; no gradient
passes through the network. Every sample and head is a separate problem, so a result does not depend
on the rest of the batch.

Shapes: B batch, H heads, T target tokens, M text tokens, N image tokens of a square map,
K basis functions.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.diffusion.guidance import Change, FunctionEvaluation
from ifvit.errors import UserError
from ifvit.models.attention import Bias, logits_of
from ifvit.models.config import FusionTransformerConfig

Span = tuple[int, int]
"""First character and last character + 1."""

_STEP_SIZE = 100.0
_QUANTILE, _HIGH = 0.9, 0.9
_MASS_PER_TARGET = 0.2
_MASS_WEIGHT, _SIZE_WEIGHT = 80.0, 0.09
_SMOOTHING, _DECAY = 0.25, 0.99
_NEGLIGIBLE = 1000.0

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_PARTICIPLE = re.compile(r".{3,}(?:ing|ed)$")
_NOUNS_LIKE_PARTICIPLES = {"building", "ceiling", "clothing", "evening", "morning", "railing"}
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


class Regulation:
    """Biases attention to text in the first function evaluations; a method."""

    def __init__(self, biases: Mapping[int, Bias], num_evaluations: int) -> None:
        """Take a `Bias` per number of a block, and the number of evaluations that use them."""
        self._biases = biases
        self._num_evaluations = num_evaluations

    def before(self, evaluation: FunctionEvaluation) -> Change:
        """Return the biases while they apply."""
        return Change(biases=self._biases if evaluation.index < self._num_evaluations else {})


@dataclass(frozen=True, kw_only=True)
class TargetTokens:
    """Positions of the targets of each caption among its text tokens."""

    positions: Tensor
    """(B, T) int64 in 0 ... M - 1; 0 where a caption has fewer than T targets."""
    present: Tensor
    """(B, T) bool."""


def find_targets(
    captions: Sequence[str],
    phrase: str | None,
    token_spans: Callable[[str], Sequence[Span]],
    device: torch.device | str = "cpu",
) -> TargetTokens:
    """Find the tokens of the words in `phrase` or, without a phrase, of all nouns and numerals.

    `token_spans` returns the characters of each token of a caption; special tokens have none. A
    caption may have no target. Raises UserError for a word of the phrase that a caption lacks.
    """
    rows = []
    for caption in captions:
        words = _nouns_and_numerals(caption) if phrase is None else _mentions(phrase, caption)
        rows.append(
            [
                position
                for position, (start, end) in enumerate(token_spans(caption))
                if start < end and any(first <= start and end <= last for first, last in words)
            ]
        )
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    present = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return TargetTokens(positions=padded.to(device), present=present.to(device))


def _nouns_and_numerals(caption: str) -> list[Span]:
    """Spans of the words that are neither in the lists above nor participles."""
    spans = []
    for match in _WORD.finditer(caption):
        word = match[0].lower()
        is_other = word in _OTHER_WORDS or _PARTICIPLE.match(word)
        if word in _NOUNS_LIKE_PARTICIPLES or not is_other:
            spans.append(match.span())
    return spans


def _mentions(phrase: str, caption: str) -> list[Span]:
    """Spans of the phrase's words; the k-th mention of a word is its k-th occurrence."""
    wanted = Counter(match[0].lower() for match in _WORD.finditer(phrase))
    spans = []
    for match in _WORD.finditer(caption):
        if wanted[match[0].lower()] > 0:
            wanted[match[0].lower()] -= 1
            spans.append(match.span())
    if missing := [word for word, count in wanted.items() if count > 0]:
        raise UserError(
            f'regulation.targets: "{missing[0]}" is not in the prompt "{caption}"; '
            "give words of every prompt"
        )
    return spans


class BlockBias:
    """Bias of one block for B captions, called once per function evaluation; a `Bias`."""

    def __init__(self, config: FusionTransformerConfig, number: int, targets: TargetTokens) -> None:
        """`config` is that of the backbone: it says where image and text tokens of block `number`
        are.
        """
        self._targets = targets
        basis = gaussian_basis(config.latent_size // config.patch_size)
        self._basis = basis.to(targets.present.device)
        self._first_image_token = config.first_image_token
        is_alone = config.blocks[number] == "separate_cross_attention"
        self._first_text_key = 0 if is_alone else config.num_tokens - config.num_text_tokens
        self._previous: Tensor | None = None
        self._num_calls = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # each call has new state
    def __call__(self, query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor:
        """Queries (B, Q, H, E), keys (B, J, H, E) => addend (B, H, Q, J) to the logits.

        Image tokens are the queries from `first_image_token` on. The last M keys are text, in
        blocks with one softmax and in those whose cross-attention has no other keys. Text that is
        not `visible` takes no part.
        The bias at evaluation s is S' = 0.99^s (0.25 S*_{s-1} + 0.75 S*_s), where S*_s is the
        optimum at s and S*_{-1} = 0. All text columns are lowered by
        logsumexp(A + S') - logsumexp(A), so that each image query keeps its attention to text.
        """
        image = slice(self._first_image_token, self._first_image_token + len(self._basis))
        text = slice(self._first_text_key, None)
        visible = None if visible is None else visible[:, text]
        logits = logits_of(query[:, image], key[:, text], visible)
        relative = relative_logits(logits, self._targets)
        optimum, _ = optimise_bias(relative, self._targets.present, self._basis)
        previous = torch.zeros_like(optimum) if self._previous is None else self._previous
        bias = _DECAY**self._num_calls * (_SMOOTHING * previous + (1 - _SMOOTHING) * optimum)
        self._previous = optimum
        self._num_calls += 1

        columns = self._targets.positions[:, None, None].expand(*logits.shape[:3], -1)
        text_bias = torch.zeros_like(logits).scatter_add(3, columns, bias.transpose(2, 3))
        text_bias = text_bias - added_mass(relative, bias)[..., None]
        addend = query.new_zeros(len(query), query.shape[2], query.shape[1], key.shape[1])
        addend[:, :, image, text] = text_bias.to(addend.dtype)
        return addend


@torch.enable_grad()
def optimise_bias(
    relative: Tensor, present: Tensor, basis: Tensor, num_steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Take steps of gradient descent on W in S = sum_k W_k G_k; keep the best S per sample.

    `relative` (B, H, T, N), `present` (B, T), `basis` (N, K) => S* (B, H, T, N), zero for absent
    targets, and its loss (B,), a mean over heads. W starts at zero, where the authors draw it from
    [0, 1): the result is deterministic and never worse than no bias. The authors' loss is a mean
    over problems and their step is 100 times the number of problems.
    """
    weights = relative.new_zeros(*relative.shape[:3], basis.shape[1])
    best_bias = torch.zeros_like(relative)
    best_loss = relative.new_full((len(relative),), torch.inf)
    for _ in range(num_steps):
        weights = weights.detach().requires_grad_()
        bias = weights @ basis.T
        loss = regulation_loss(target_attention(relative + bias), weights, present)
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        weights = weights - _STEP_SIZE * gradient
        mean, bias = loss.detach().mean(dim=1), bias.detach()
        best_bias = torch.where((mean < best_loss)[:, None, None, None], bias, best_bias)
        best_loss = torch.minimum(mean, best_loss)
    return best_bias, best_loss


def regulation_loss(attention: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    """L = E_hi + 80 E_mass + 0.09 E_reg of P (B, H, T, N) and W (B, H, T, K) => (B, H).

    L is a mean over the targets in `present` (B, T) of E_hi = (q_0.9 P - 0.9)^2 over the map,
    E_mass = (mean P - theta / T)^2 with theta = min(1, 0.2 T), and E_reg = mean W^2.
    """
    count = present.sum(dim=1)[:, None, None].clamp(min=1)
    mass_error = attention.mean(dim=-1) - (_MASS_PER_TARGET * count).clamp(max=1.0) / count
    # As torch.quantile interpolates between the two nearest values, but 1.6 times faster.
    rank = _QUANTILE * (attention.shape[-1] - 1)
    low = int(rank)
    ordered, _ = attention.sort(dim=-1)
    high = torch.lerp(ordered[..., low], ordered[..., low + 1], rank - low)
    value = (high - _HIGH).square() + _MASS_WEIGHT * mass_error.square()
    value = value + _SIZE_WEIGHT * weights.square().mean(dim=-1)
    return (value * present[:, None] / count).sum(dim=-1)


def relative_logits(logits: Tensor, targets: TargetTokens) -> Tensor:
    """Text logits A (B, H, N, M) => A_target - logsumexp(A_other), (B, H, T, N).

    While only the logits of targets change, the softmax over the text depends on these values
    alone. Absent targets get -inf. Where all visible tokens are targets, the others count as one
    token with a negligible share.
    """
    # Added up, because absent targets stand at position 0, which may also be a target.
    is_target = torch.zeros_like(logits[:, 0, 0], dtype=torch.int64)
    is_target = is_target.scatter_add(1, targets.positions, targets.present.long()) > 0
    others = logits.masked_fill(is_target[:, None, None], -torch.inf).logsumexp(dim=3)
    others = torch.where(others.isneginf(), logits.amax(dim=3) - _NEGLIGIBLE, others)
    chosen = targets.positions[:, None, None].expand(*logits.shape[:3], -1)
    relative = logits.gather(3, chosen) - others[..., None]
    return relative.masked_fill(~targets.present[:, None, None], -torch.inf).transpose(2, 3)


def target_attention(relative: Tensor) -> Tensor:
    """Relative logits => attention to the targets among all text, (B, H, T, N)."""
    return torch.softmax(_with_others(relative), dim=2)[:, :, :-1]


def added_mass(relative: Tensor, bias: Tensor) -> Tensor:
    """Relative logits and bias S => logsumexp(A + S) - logsumexp(A) over the text, (B, H, N)."""
    biased, plain = _with_others(relative + bias), _with_others(relative)
    return biased.logsumexp(dim=2) - plain.logsumexp(dim=2)


def gaussian_basis(side: int) -> Tensor:
    """Values (N, K) of K = 49 Gaussians on a map of N = side**2 tokens, row by row.

    Their width is sigma = side / 16 and their centres are 2 sigma apart. The authors round sigma
    down, which makes no difference for maps of 16, 32 and 64 tokens a side and gives zero below.
    """
    sigma = side / 16
    positions = torch.arange(side, dtype=torch.float32)
    centres = torch.arange(1, 8, dtype=torch.float32) * 2 * sigma
    line = torch.exp(-((positions[:, None] - centres) ** 2) / (2 * sigma**2))
    return torch.kron(line, line)


def _with_others(relative: Tensor) -> Tensor:
    """Append the logit 0 of all other text tokens together: (B, H, T + 1, N)."""
    return functional.pad(relative, (0, 0, 0, 1))
