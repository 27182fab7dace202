"""The optimisation of attention regulation on logits alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ifvit.sampling.alignment.regulation import (
    TextLogits,
    gaussian_basis,
    optimise_bias,
    regulation_loss,
)
from ifvit.sampling.alignment.targets import TargetTokens

SIDE, NUM_TOKENS, NUM_TEXT = 4, 16, 10
LOGITS = 2 * torch.randn(3, 2, NUM_TOKENS, NUM_TEXT, generator=torch.Generator().manual_seed(0))
TARGETS = TargetTokens(
    positions=torch.tensor([[2, 5], [4, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)
PARTS = TextLogits.split(LOGITS, TARGETS)
BASIS = gaussian_basis(SIDE)


def loss_without_bias(parts: TextLogits, present: Tensor) -> Tensor:
    zeros = torch.zeros_like(parts.targets)
    weights = torch.zeros(*zeros.shape[:2], BASIS.shape[1], zeros.shape[3])
    return regulation_loss(parts.attention(zeros), weights, present).mean(dim=1)


def test_the_parts_know_the_softmax_over_all_text_tokens() -> None:
    bias = torch.randn_like(PARTS.targets)
    full = LOGITS.clone()
    full[0, :, :, [2, 5]] += bias[0]
    full[1, :, :, 4] += bias[1, :, :, 0]
    expected = full.softmax(dim=-1)
    found = PARTS.attention(bias)
    torch.testing.assert_close(found[0], expected[0][..., [2, 5]])
    torch.testing.assert_close(found[1, ..., 0], expected[1, ..., 4])
    assert (found[1, ..., 1] == 0).all()
    assert (found[2] == 0).all()
    torch.testing.assert_close(PARTS.logsumexp(bias), full.logsumexp(dim=-1))


def test_the_basis_of_a_map_of_16_is_the_authors() -> None:
    basis = gaussian_basis(16).reshape(16, 16, 49)
    assert basis[2, 2, 0] == basis[14, 14, 48] == 1
    # The second kernel lies two tokens to the right: one sigma is one token.
    assert basis[2, 5, 1].item() == pytest.approx(torch.tensor(-0.5).exp().item())
    torch.testing.assert_close(gaussian_basis(32).reshape(32, 32, 49)[::2, ::2], basis)


def test_the_loss_is_its_equation() -> None:
    attention = torch.rand(1, 1, NUM_TOKENS, 2, generator=torch.Generator().manual_seed(2))
    weights = torch.full((1, 1, 49, 2), 0.5)
    present = torch.tensor([[True, True]])
    expected = torch.tensor(0.0)
    for target in range(2):
        column = attention[0, 0, :, target]
        expected += (column.quantile(0.9) - 0.9) ** 2 + 80 * (column.mean() - 0.4 / 2) ** 2
    found = regulation_loss(attention, weights, present)
    torch.testing.assert_close(found[0, 0], expected / 2 + 0.09 * 0.25)


def test_more_than_five_targets_share_the_whole_mass() -> None:
    attention = torch.full((1, 1, NUM_TOKENS, 8), 1 / 8)
    loss = regulation_loss(attention, torch.zeros(1, 1, 49, 8), torch.ones(1, 8, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.full((1, 1), (1 / 8 - 0.9) ** 2))


def test_the_best_bias_is_never_worse_than_none_and_mostly_far_better() -> None:
    before, found = (
        loss_without_bias(PARTS, TARGETS.present),
        optimise_bias(PARTS, TARGETS.present, BASIS),
    )
    assert (found.loss <= before).all()
    assert (found.loss[:2] < before[:2] / 2).all()
    assert (found.bias[1, ..., 1] == 0).all()
    assert (found.bias[2] == 0).all()


def test_targets_gain_a_place_and_their_share() -> None:
    found = PARTS.attention(optimise_bias(PARTS, TARGETS.present, BASIS).bias)[0]
    plain = PARTS.attention(torch.zeros_like(PARTS.targets))[0]
    assert (found.quantile(0.9, dim=1) > plain.quantile(0.9, dim=1)).all()
    torch.testing.assert_close(found.mean(dim=1), torch.full((2, 2), 0.2), atol=0.07, rtol=0)


def test_samples_do_not_know_their_neighbours() -> None:
    together = optimise_bias(PARTS, TARGETS.present, BASIS)
    alone = optimise_bias(
        TextLogits(targets=PARTS.targets[1:2, ..., :1], rest=PARTS.rest[1:2]),
        TARGETS.present[1:2, :1],
        BASIS,
    )
    torch.testing.assert_close(together.bias[1:2, ..., :1], alone.bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.loss[1:2], alone.loss, rtol=1e-3, atol=1e-4)


def test_no_graph_leaves_the_optimisation() -> None:
    with torch.no_grad():
        found = optimise_bias(PARTS, TARGETS.present, BASIS)
    assert not any(getattr(found, field.name).requires_grad for field in dataclasses.fields(found))
