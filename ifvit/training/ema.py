"""Averaged weights: an exponential moving average of the parameters, in fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Shadow = decay x shadow + (1 - decay) x parameter, once an update, starting as a copy.

    fp32 throughout: at decay 0.9999 a bf16 average would round every update away.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.shadows = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move the average towards the parameters, all tensors in one pass."""
        torch._foreach_lerp_(self.shadows, list(parameters), 1.0 - self.decay)
