"""What DATE makes larger: differentiable scores of images, B at a time, H by W pixels."""

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
