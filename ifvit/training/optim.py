"""The optimizer and its learning rate."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from ifvit.training.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, one of each for every parameter and of its shape."""


def build_optimizer(parameters: Iterable[Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on everything, as U-ViT has it.

    The rate starts at 0: `learning_rate` sets it before every step.
    """
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give AdamW the zero state for `tensors` that it would make at its first step only."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS},
        }


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Rate of the update that follows `step` finished ones: linear up from 0, flat, linear down."""
    rise = step / config.warmup_steps if config.warmup_steps else 1.0
    fall = (max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
    return config.learning_rate * min(rise, fall, 1.0)
