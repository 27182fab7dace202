"""Regulation inside joint attention, for both ways to meet the text."""

import math

import pytest
import torch
from torch import Tensor

from ifvit.models.attention import logits_of
from ifvit.sampling.config import Mass
from ifvit.sampling.regulation import (
    BlockBias,
    TargetTokens,
    gaussian_basis,
    optimise_bias,
    relative_logits,
)

NUM_IMAGE, NUM_TEXT, HEADS, CHANNELS = 16, 10, 2, 8
IMAGE, TEXT = slice(1, 17), slice(17, 27)
TARGETS = TargetTokens(
    positions=torch.tensor([[2, 5], [4, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)
# Cross-attention asks with time and image; under concat the text asks, too.
QUERIES = {"cross_attention": 17, "concat": 27}


def queries_and_keys(conditioning: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = 1.5 * torch.randn(3, QUERIES[conditioning], HEADS, CHANNELS, generator=generator)
    return query, 1.5 * torch.randn(3, 27, HEADS, CHANNELS, generator=generator)


def attention(query: Tensor, key: Tensor, addend: Tensor | float = 0.0) -> Tensor:
    logits = torch.einsum("bqhe,bkhe->bhqk", query, key) / math.sqrt(CHANNELS)
    return (logits + addend).softmax(dim=-1)


@pytest.mark.parametrize("conditioning", QUERIES)
@pytest.mark.parametrize("mass", ["preserve", "free"])
def test_only_image_queries_and_text_keys_are_shifted(conditioning: str, mass: Mass) -> None:
    query, key = queries_and_keys(conditioning)
    addend = BlockBias(TARGETS, 4, mass)(query, key)
    assert addend.shape == (3, HEADS, QUERIES[conditioning], 27)
    assert (addend[:2, :, IMAGE, TEXT] != 0).any()
    addend[:, :, IMAGE, TEXT] = 0
    assert (addend == 0).all()


@pytest.mark.parametrize("conditioning", QUERIES)
def test_preserved_mass_is_shared_out_anew_among_the_text_tokens(conditioning: str) -> None:
    query, key = queries_and_keys(conditioning)
    plain = attention(query, key)
    regulated = attention(query, key, BlockBias(TARGETS, 4, "preserve")(query, key))
    torch.testing.assert_close(regulated[..., :17], plain[..., :17])
    torch.testing.assert_close(regulated[..., TEXT].sum(-1), plain[..., TEXT].sum(-1))
    targets = regulated[0, :, IMAGE, TEXT][..., [2, 5]].mean(1)
    assert (targets > plain[0, :, IMAGE, TEXT][..., [2, 5]].mean(1)).all()


def test_free_mass_grows() -> None:
    query, key = queries_and_keys("concat")
    plain = attention(query, key)
    regulated = attention(query, key, BlockBias(TARGETS, 4, "free")(query, key))
    gained = regulated[:2, :, IMAGE, TEXT].sum(-1) - plain[:2, :, IMAGE, TEXT].sum(-1)
    assert (gained.mean(dim=2) > 0.01).all()


@pytest.mark.parametrize("mass", ["preserve", "free"])
def test_a_caption_without_targets_is_left_alone(mass: Mass) -> None:
    query, key = queries_and_keys("concat")
    assert (BlockBias(TARGETS, 4, mass)(query, key)[2] == 0).all()


def test_the_optimum_is_smoothed_over_two_evaluations_and_decays() -> None:
    query, key = queries_and_keys("cross_attention")
    # By the same function, because the optimisation makes much of the last bits.
    relative = relative_logits(logits_of(query[:, IMAGE], key[:, TEXT]), TARGETS)
    optimum, _ = optimise_bias(relative, TARGETS.present, gaussian_basis(4))
    block_bias = BlockBias(TARGETS, 4, "free")
    for wanted in (0.75, 0.99 * (0.25 + 0.75), 0.99**2):
        columns = block_bias(query, key)[:, :, IMAGE, TEXT]
        torch.testing.assert_close(
            columns[0, ..., [2, 5]].transpose(1, 2), wanted * optimum[0], rtol=1e-4, atol=1e-4
        )


def test_a_caption_does_not_know_its_neighbours() -> None:
    query, key = queries_and_keys("concat")
    alone = TargetTokens(positions=TARGETS.positions[1:2], present=TARGETS.present[1:2])
    torch.testing.assert_close(
        BlockBias(alone, 4, "preserve")(query[1:2], key[1:2]),
        BlockBias(TARGETS, 4, "preserve")(query, key)[1:2],
        rtol=1e-3,
        atol=1e-3,
    )


def test_half_precision_queries_get_an_addend_of_their_kind() -> None:
    query, key = (x.bfloat16() for x in queries_and_keys("concat"))
    assert BlockBias(TARGETS, 4, "preserve")(query, key).dtype == torch.bfloat16
