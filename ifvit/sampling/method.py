"""Where training-free alignment methods enter sampling: before each evaluation of the backbone.

Shapes: B batch, M text tokens, D context width, C latent channels, S latent size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ifvit.models.attention import Bias


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of the backbone that comes next, for one batch of prompts."""

    index: int
    """Counts evaluations from 0; SamplingConfig.num_steps of them make an image."""
    x_t: Tensor
    """(B, C, S, S): noisy latents."""
    timesteps: Tensor
    """(B,) in 0 ... 999."""
    context: Tensor
    """(B, M, D): what the text encoder said of the prompts, as last changed."""
    predict_clean: Callable[[Tensor], Tensor]
    """Context (B, M, D) => x_0 (B, C, S, S) that the guided noise points to, scaled latents.

    Differentiable with respect to the context, under `torch.enable_grad`.
    """


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a method changes; as it stands, nothing."""

    context: Tensor | None = None
    """(B, M, D): takes the place of the conditional context, from this evaluation on."""
    biases: Mapping[int, Bias] = field(default_factory=dict)
    """Per fused block, for this evaluation; they see and shift the conditional half only."""


class AlignmentMethod(Protocol):
    """One method at work on one batch of prompts; it may keep what it learned between calls."""

    def before(self, evaluation: Evaluation) -> Change:
        """Called once before each evaluation of the backbone."""


MethodOf = Callable[[Tensor], AlignmentMethod]
"""Positions (B,) int64 => a method that has not seen any evaluation yet."""
