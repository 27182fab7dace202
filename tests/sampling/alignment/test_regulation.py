"""The optimisation of attention regulation on logits alone."""

import pytest
import torch
from torch import Tensor

from ifvit.sampling.regulation import (
    TargetTokens,
    added_mass,
    gaussian_basis,
    optimise_bias,
    regulation_loss,
    relative_logits,
    target_attention,
)

NUM_TOKENS, NUM_TEXT = 16, 10
LOGITS = 2 * torch.randn(3, 2, NUM_TOKENS, NUM_TEXT, generator=torch.Generator().manual_seed(0))
TARGETS = TargetTokens(
    positions=torch.tensor([[2, 5], [4, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)
RELATIVE = relative_logits(LOGITS, TARGETS)
BASIS = gaussian_basis(4)


def loss_without_bias() -> Tensor:
    weights = torch.zeros(*RELATIVE.shape[:3], BASIS.shape[1])
    return regulation_loss(target_attention(RELATIVE), weights, TARGETS.present)[0].mean(dim=1)


def loss_by_hand(attention: Tensor, weights: Tensor) -> Tensor:
    """Of one head (T, N), (T, K), word for word."""
    count = len(attention)
    high = (attention.quantile(0.9, dim=1) - 0.9).square().mean()
    mass = (attention.mean(dim=1) - min(1.0, 0.2 * count) / count).square().mean()
    return high + 80 * mass + 0.09 * weights.square().mean()


def test_relative_logits_give_the_softmax_over_all_text_tokens() -> None:
    bias = torch.randn_like(RELATIVE)
    full = LOGITS.clone()
    full[0, :, :, [2, 5]] += bias[0].transpose(1, 2)
    full[1, :, :, 4] += bias[1, :, 0]
    expected = full.softmax(dim=-1).transpose(2, 3)
    found = target_attention(RELATIVE + bias)
    torch.testing.assert_close(found[0], expected[0][:, [2, 5]])
    torch.testing.assert_close(found[1, :, 0], expected[1, :, 4])
    assert (found[1, :, 1] == 0).all()
    assert (found[2] == 0).all()
    gained = full.logsumexp(dim=-1) - LOGITS.logsumexp(dim=-1)
    torch.testing.assert_close(added_mass(RELATIVE, bias), gained)


def test_the_basis_of_a_map_of_16_is_the_authors() -> None:
    basis = gaussian_basis(16).reshape(16, 16, 49)
    assert basis[2, 2, 0] == basis[14, 14, 48] == 1
    # The second kernel stands at column 4, one sigma is one token.
    assert basis[2, 5, 1].item() == pytest.approx(torch.tensor(-0.5).exp().item())
    torch.testing.assert_close(gaussian_basis(32).reshape(32, 32, 49)[::2, ::2], basis)


@pytest.mark.parametrize("num_targets", [1, 2, 8])
def test_the_loss_is_its_equation_and_so_are_its_derivatives(num_targets: int) -> None:
    generator = torch.Generator().manual_seed(2)
    # Of 25 values the quantile lies nearer to one of its two neighbours, of 16 it does not.
    attention = torch.rand(2, 2, num_targets, 25, generator=generator, dtype=torch.double)
    weights = torch.rand(2, 2, num_targets, 49, generator=generator, dtype=torch.double)
    attention.requires_grad_()
    weights.requires_grad_()
    present = torch.ones(2, num_targets, dtype=torch.bool)
    expected = torch.stack(
        [loss_by_hand(attention[b, h], weights[b, h]) for b in range(2) for h in range(2)]
    )
    by_attention, by_weights = torch.autograd.grad(expected.sum(), (attention, weights))
    found = regulation_loss(attention, weights, present)
    torch.testing.assert_close(found[0].flatten(), expected, check_dtype=False)
    torch.testing.assert_close(found[1], by_attention, check_dtype=False)
    torch.testing.assert_close(found[2], by_weights, check_dtype=False)


def test_the_first_step_follows_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifvit.sampling.regulation._NUM_ITERATIONS", 2)
    monkeypatch.setattr("ifvit.sampling.regulation._STEP_SIZE", 1.0)
    weights = torch.zeros(2, 2, 49, requires_grad=True)
    attention = target_attention(RELATIVE[:1] + weights @ BASIS.T)[0]
    loss = loss_by_hand(attention[0], weights[0]) + loss_by_hand(attention[1], weights[1])
    (gradient,) = torch.autograd.grad(loss, weights)
    bias, _ = optimise_bias(RELATIVE[:1], TARGETS.present[:1], BASIS)
    torch.testing.assert_close(bias[0], -gradient @ BASIS.T)


def test_the_best_of_the_authors_twenty_steps_is_taken() -> None:
    # Of these logits the last step is the best.
    relative, present = relative_logits(2 * LOGITS.double(), TARGETS)[:1], TARGETS.present[:1]
    weights = torch.zeros(2, 2, 49, dtype=torch.double, requires_grad=True)
    tried = []
    for _ in range(20):
        bias = weights @ BASIS.double().T
        attention = target_attention(relative + bias)[0]
        loss = torch.stack([loss_by_hand(attention[h], weights[h]) for h in range(2)])
        tried.append((loss.mean().item(), bias.detach()))
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        weights = (weights - 100 * gradient).detach().requires_grad_()
    least, best = min(tried, key=lambda one: one[0])
    bias, loss = optimise_bias(relative, present, BASIS.double())
    assert loss.item() == pytest.approx(least, rel=1e-4)
    torch.testing.assert_close(bias[0], best, rtol=1e-3, atol=1e-3)


def test_absent_targets_do_not_count() -> None:
    attention = target_attention(RELATIVE)
    weights = torch.rand(*RELATIVE.shape[:3], 49)
    loss, by_attention, _ = regulation_loss(attention, weights, TARGETS.present)
    torch.testing.assert_close(loss[1, 0], loss_by_hand(attention[1, 0, :1], weights[1, 0, :1]))
    assert (by_attention[1, :, 1] == 0).all()
    assert (loss[2] == 0).all()


def test_the_best_bias_is_never_worse_than_none_and_mostly_far_better() -> None:
    before, (bias, loss) = loss_without_bias(), optimise_bias(RELATIVE, TARGETS.present, BASIS)
    assert (loss <= before).all()
    assert (loss[:2] < before[:2] / 2).all()
    assert (bias[1, :, 1] == 0).all()
    assert (bias[2] == 0).all()


def test_targets_gain_a_place_and_their_share() -> None:
    plain = target_attention(RELATIVE)[0]
    found = target_attention(RELATIVE + optimise_bias(RELATIVE, TARGETS.present, BASIS)[0])[0]
    assert (found.quantile(0.9, dim=2) > plain.quantile(0.9, dim=2)).all()
    torch.testing.assert_close(found.mean(dim=2), torch.full((2, 2), 0.2), atol=0.07, rtol=0)


def test_a_sample_does_not_know_its_neighbours() -> None:
    biases, losses = optimise_bias(RELATIVE, TARGETS.present, BASIS)
    bias, loss = optimise_bias(RELATIVE[1:2, :, :1], TARGETS.present[1:2, :1], BASIS)
    torch.testing.assert_close(biases[1:2, :, :1], bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[1:2], loss, rtol=1e-3, atol=1e-4)
