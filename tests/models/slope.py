"""Gradients held against the slope that finite differences measure."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn


def assert_gradient_is_slope(backbone: nn.Module, given: Sequence[Tensor]) -> None:
    """Of the squared output, by all parameters along one random direction, in float64."""
    backbone.double()
    parameters = list(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    step = [1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(backbone(*given).square().sum(), parameters)
    expected = sum(float((g * s).sum()) for g, s in zip(gradients, step, strict=True))
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            torch._foreach_add_(parameters, step, alpha=sign)
            losses.append(backbone(*given).square().sum().item())
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-4)
