"""Diffusion Adaptive Text Embedding (Na et al. 2025, arXiv 2510.23974), the update by itself.

Shapes: B batch, M text tokens, D context width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
