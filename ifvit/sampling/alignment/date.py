"""Diffusion Adaptive Text Embedding (Na et al. 2025, arXiv 2510.23974), the update by itself.

Shapes: B batch, M text tokens, D context width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.models.clip import ClipScorer
from ifvit.models.image_reward import ImageReward

Score = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), nominally in [-1, 1] but not clamped => scores (B,), differentiable."""

Objective = Callable[[Sequence[str]], Score]
"""B prompts => how well each of B images shows its own; larger is better."""


def clip_score_of(scorer: ClipScorer) -> Objective:
    """Raw cosine of image and prompt, without a prefix; the text feature is computed once."""

    def prepare(prompts: Sequence[str]) -> Score:
        texts = scorer.embed_texts(list(prompts))
        size = (scorer.image_size, scorer.image_size)

        def score(images: Tensor) -> Tensor:
            # As DATE has it: bilinear and, so that no gradient is lost, without a clamp.
            resized = functional.interpolate(images, size, mode="bilinear")
            return (scorer.embed_images(resized) * texts).sum(dim=1)

        return score

    return prepare


def image_reward_of(model: ImageReward) -> Objective:
    """ImageReward of image and prompt, about N(0, 1) over what people write and see."""
    return lambda prompts: model.score_of(list(prompts))


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """sum_i w_i h_i of the terms (w_i, h_i)."""

    def prepare(prompts: Sequence[str]) -> Score:
        scores = [(weight, objective(prompts)) for weight, objective in terms]
        return lambda images: torch.stack([w * score(images) for w, score in scores]).sum(dim=0)

    return prepare


ScoreOfContext = Callable[[Tensor], Tensor]
"""Contexts (B, M, D) => scores (B,) of the clean images that they lead to, differentiable."""


def update_context(context: Tensor, score: ScoreOfContext, radius: float) -> Tensor:
    """One step c + rho grad h(c) / |grad h(c)|, the norm over all M D entries of each sample.

    It maximises the first-order expansion of h in the ball of radius rho around c. A sample
    without gradient keeps its c. The result carries no graph.
    """
    start = context.detach().requires_grad_()
    with torch.enable_grad():
        # Of the sum: the samples are independent, so each one gets its own gradient.
        (gradient,) = torch.autograd.grad(score(start).sum(), start)
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]
    direction = torch.where(norm > 0, gradient / norm, 0.0)
    return context + radius * direction
