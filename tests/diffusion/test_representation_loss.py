"""The loss of projected tokens against features, and what it adds to the objective."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ifvit.diffusion.config import LatentScaling, ObjectiveConfig, RepresentationConfig
from ifvit.diffusion.objectives import Losses, Objective, representation_loss

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(3, 16, 6, generator=GENERATOR)
TOKENS = torch.randn(3, 16, 6, generator=GENERATOR)
MOMENTS = torch.randn(3, 8, 4, 4, generator=GENERATOR)


def test_a_perfect_projector_has_no_loss_at_any_scale() -> None:
    assert representation_loss(7 * FEATURES, FEATURES).item() == pytest.approx(0, abs=1e-6)
    assert representation_loss(-FEATURES, FEATURES).item() == pytest.approx(2)
    half = FEATURES.half()
    assert representation_loss(half, half).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_one_minus_the_mean_cosine() -> None:
    dots = (functional.normalize(TOKENS, dim=2) * functional.normalize(FEATURES, dim=2)).sum(2)
    torch.testing.assert_close(representation_loss(TOKENS, FEATURES), 1 - dots.mean())


def test_features_of_a_finer_grid_are_averaged_over_each_token() -> None:
    squares = FEATURES.view(3, 2, 2, 2, 2, 6)  # row, row within, column, column within
    coarse = squares.mean(dim=(2, 4)).flatten(1, 2)
    assert representation_loss(coarse, FEATURES).item() == pytest.approx(0, abs=1e-6)


def test_features_of_a_coarser_grid_are_interpolated() -> None:
    columns = torch.arange(4.0).repeat(4).view(1, 16, 1)
    plane = torch.cat([columns, torch.ones(1, 16, 1)], dim=2)
    finer = representation_loss(torch.ones(1, 64, 2), plane)
    x = torch.arange(8.0).div(2).sub(0.25).clamp(0, 3)
    cosines = (x + 1) / (2**0.5 * (x.square() + 1).sqrt())
    assert finer.item() == pytest.approx(1 - cosines.mean().item(), rel=1e-6)


def predict(x_t: Tensor, timesteps: Tensor, condition: Tensor, with_features: bool = False) -> Any:
    """Predict the noisy latents, and project `TOKENS`."""
    return (x_t, TOKENS) if with_features else x_t


def losses(representation: RepresentationConfig | None, step: int = 0) -> Losses:
    objective = Objective(
        ObjectiveConfig(), scaling=LatentScaling(scale=1.0), seed=0, representation=representation
    )
    is_on = representation is not None and representation.is_on(step)
    return objective(
        predict,
        MOMENTS,
        torch.zeros(3, 1, 1),
        step,
        torch.arange(3),
        FEATURES if is_on else None,
    )


def test_the_objective_adds_the_weighted_loss_to_the_gradient_alone() -> None:
    plain, aligned = losses(None), losses(RepresentationConfig(weight=0.3))
    expected = representation_loss(TOKENS, FEATURES)
    torch.testing.assert_close(aligned.total, plain.total + 0.3 * expected)
    assert aligned.representation is not None
    assert torch.equal(aligned.representation, expected)
    assert torch.equal(aligned.per_sample, plain.per_sample)
    assert plain.representation is None


def test_after_the_stop_step_the_loss_is_zero_and_its_gradient_defined() -> None:
    settings = RepresentationConfig(stop_step=2)
    assert losses(settings, step=1).representation is not None
    TOKENS.requires_grad_()
    stopped = losses(settings, step=2)
    assert stopped.representation is None
    assert torch.equal(stopped.total, losses(None, step=2).total)
    (gradient,) = torch.autograd.grad(stopped.total, TOKENS)
    assert not gradient.any()
    TOKENS.requires_grad_(False)
