"""DATE's update by itself, on scores whose gradient is known."""

import torch
from torch import Tensor

from ifvit.sampling.alignment import update_context

CONTEXT = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


def closeness(context: Tensor) -> Tensor:
    """Scores (4,): minus the squared distance from TARGET, of very different sizes."""
    scale = torch.tensor([1.0, 1e-4, 1e4, 1.0])
    return -scale * (context - TARGET[: len(context)]).square().sum(dim=(1, 2))


def lengths(context: Tensor) -> Tensor:
    return context.flatten(1).norm(dim=1)


def test_every_sample_moves_by_the_radius_along_its_own_gradient() -> None:
    step = update_context(CONTEXT, closeness, 0.5) - CONTEXT
    torch.testing.assert_close(lengths(step), torch.full((4,), 0.5))
    towards = (TARGET - CONTEXT) / lengths(TARGET - CONTEXT)[:, None, None]
    torch.testing.assert_close(step, 0.5 * towards, rtol=1e-4, atol=1e-5)


def test_a_small_step_raises_every_score() -> None:
    assert (closeness(update_context(CONTEXT, closeness, 0.01)) > closeness(CONTEXT)).all()


def test_a_radius_of_zero_changes_no_bit() -> None:
    assert torch.equal(update_context(CONTEXT, closeness, 0.0), CONTEXT)


def test_a_sample_without_gradient_stays_and_does_not_stop_the_others() -> None:
    switch = torch.tensor([1.0, 0.0, 1.0, 0.0])
    updated = update_context(CONTEXT, lambda context: switch * closeness(context), 0.5)
    moved = lengths(updated - CONTEXT)
    torch.testing.assert_close(moved, torch.tensor([0.5, 0.0, 0.5, 0.0]))


def test_no_graph_leaves_the_update_even_where_gradients_are_off() -> None:
    with torch.no_grad():
        updated = update_context(CONTEXT, closeness, 0.5)
    assert not updated.requires_grad
    assert not CONTEXT.requires_grad
