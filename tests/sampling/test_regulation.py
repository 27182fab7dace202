"""Attention regulation: its targets, its optimisation on logits, and the bias of a block."""

import math
from itertools import product

import pytest
import torch
from made_backbone import small_shape
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.attention import logits_of
from ifvit.models.config import UPDATES_TEXT, FusionTransformerConfig
from ifvit.models.text_encoders import load_text_encoder, load_token_spans
from ifvit.sampling.regulation import (
    BlockBias,
    Span,
    TargetTokens,
    added_mass,
    find_targets,
    gaussian_basis,
    optimise_bias,
    regulation_loss,
    relative_logits,
    target_attention,
)
from ifvit.scenes.captions import parse_caption, write_captions

# Targets.


def words(caption: str) -> list[Span]:
    """Tokens of a tokenizer with one token per word, and a special token at each end."""
    spans, start = [(0, 0)], 0
    for word in caption.split():
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return [*spans, (0, 0)]


def targets_of(caption: str, phrase: str | None = None) -> list[str]:
    found = find_targets([caption], phrase, words)
    return [caption.split()[position - 1] for position in found.positions[0].tolist()]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two red circles left of a Blue square", "two circles square"),
        ("a picture of one circle in red", "one circle"),
        ("five green triangles and nothing else", "five triangles"),
        ("a man riding a wave on top of a surfboard", "man wave surfboard"),
        ("an old brick building with 3 parked cars", "brick building 3 cars"),
        ("a drawing with two squares in red under three circles in blue",
         "two squares three circles"),
    ],
)  # fmt: skip
def test_nouns_and_numerals_are_the_default_targets(caption: str, expected: str) -> None:
    assert " ".join(targets_of(caption)) == expected


def test_every_caption_of_a_scene_has_its_counts_and_kinds_as_targets() -> None:
    scene = parse_caption("three blue squares left of two red circles")
    for caption in write_captions(scene):
        assert len(targets_of(caption)) == 4


def test_a_phrase_names_targets_and_a_repeated_word_means_its_next_occurrence() -> None:
    caption = "two cats and two dogs"
    assert targets_of(caption, "dogs") == ["dogs"]
    assert find_targets([caption], "two cats", words).positions.tolist() == [[1, 2]]
    assert find_targets([caption], "two two dogs", words).positions.tolist() == [[1, 4, 5]]
    with pytest.raises(UserError, match=r'"bird" is not in the prompt "a cat"'):
        find_targets(["a cat"], "cat bird", words)


def test_captions_with_fewer_targets_are_padded() -> None:
    found = find_targets(["a cat", "of the", "a cat and two dogs"], None, words)
    assert found.present.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert found.positions.tolist() == [[2, 0, 0], [0, 0, 0], [2, 4, 5]]


def test_words_are_found_among_clips_tokens_even_if_they_have_several() -> None:
    token_spans = load_token_spans(load_text_encoder("scenes/clip").identity)
    found = find_targets(["two  Red circles", "two pineapples"], "two", token_spans)
    assert found.positions.tolist() == [[1], [1]]
    parts = find_targets(["one pineapple"], "pineapple", token_spans).positions[0].tolist()
    assert len(parts) > 1
    assert parts == list(range(2, 2 + len(parts)))


# The optimisation, on logits alone.

LOGITS = 2 * torch.randn(3, 2, 16, 10, generator=torch.Generator().manual_seed(0))
TARGETS = TargetTokens(
    positions=torch.tensor([[2, 5], [4, 0], [0, 0]]),
    present=torch.tensor([[True, True], [True, False], [False, False]]),
)
RELATIVE = relative_logits(LOGITS, TARGETS)
BASIS = gaussian_basis(4)


def loss_by_hand(attention: Tensor, weights: Tensor) -> Tensor:
    """The loss of one head (T, N), (T, K), word for word from the paper."""
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
    # The centre of the second kernel is at column 4, and sigma is one token.
    assert basis[2, 5, 1].item() == pytest.approx(torch.tensor(-0.5).exp().item())
    torch.testing.assert_close(gaussian_basis(32).reshape(32, 32, 49)[::2, ::2], basis)


@pytest.mark.parametrize("num_targets", [1, 2, 8])
def test_the_loss_is_that_of_the_equation(num_targets: int) -> None:
    generator = torch.Generator().manual_seed(2)
    # With 25 values the quantile is nearer to one of its two neighbours; with 16 it is not.
    attention = torch.rand(2, 2, num_targets, 25, generator=generator, dtype=torch.double)
    weights = torch.rand(2, 2, num_targets, 49, generator=generator, dtype=torch.double)
    loss = regulation_loss(attention, weights, torch.ones(2, num_targets, dtype=torch.bool))
    for b, h in product(range(2), range(2)):
        expected = loss_by_hand(attention[b, h], weights[b, h])
        torch.testing.assert_close(loss[b, h], expected, check_dtype=False)


def test_absent_targets_do_not_count() -> None:
    attention = target_attention(RELATIVE)
    weights = torch.rand(*RELATIVE.shape[:3], 49)
    loss = regulation_loss(attention, weights, TARGETS.present)
    expected = loss_by_hand(attention[1, 0, :1], weights[1, 0, :1])
    torch.testing.assert_close(loss[1, 0], expected)
    assert (loss[2] == 0).all()


def descend(relative: Tensor, num_steps: int) -> list[tuple[float, Tensor]]:
    """Loss and bias before each of the authors' steps, by autograd, in float64."""
    basis = BASIS.double()
    weights = torch.zeros(*relative.shape[1:3], 49, dtype=torch.double, requires_grad=True)
    tried = []
    for _ in range(num_steps):
        bias = weights @ basis.T
        attention = target_attention(relative + bias)[0]
        loss = torch.stack([loss_by_hand(attention[h], weights[h]) for h in range(2)])
        tried.append((loss.mean().item(), bias.detach()))
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        weights = (weights - 100 * gradient).detach().requires_grad_()
    return tried


@pytest.mark.parametrize("num_steps", [2, 20])
def test_the_best_of_the_authors_steps_is_kept(num_steps: int) -> None:
    # With these logits the last of the 20 steps is the best.
    relative, present = relative_logits(2 * LOGITS.double(), TARGETS)[:1], TARGETS.present[:1]
    bias, loss = optimise_bias(relative, present, BASIS.double(), num_steps)
    least, best = min(descend(relative, num_steps), key=lambda one: one[0])
    assert loss.item() == pytest.approx(least, rel=1e-4)
    torch.testing.assert_close(bias[0], best, rtol=1e-3, atol=1e-3)


def test_the_optimum_halves_the_loss_and_gives_each_target_its_share() -> None:
    weights = torch.zeros(*RELATIVE.shape[:3], 49)
    plain = target_attention(RELATIVE)
    before = regulation_loss(plain, weights, TARGETS.present).mean(dim=1)
    bias, loss = optimise_bias(RELATIVE, TARGETS.present, BASIS)
    assert (loss <= before).all()
    assert (loss[:2] < before[:2] / 2).all()
    assert (bias[1, :, 1] == 0).all()
    assert (bias[2] == 0).all()
    found = target_attention(RELATIVE + bias)[0]
    assert (found.quantile(0.9, dim=2) > plain[0].quantile(0.9, dim=2)).all()
    torch.testing.assert_close(found.mean(dim=2), torch.full((2, 2), 0.2), atol=0.07, rtol=0)


def test_the_optimum_does_not_depend_on_the_batch() -> None:
    biases, losses = optimise_bias(RELATIVE, TARGETS.present, BASIS)
    bias, loss = optimise_bias(RELATIVE[1:2, :, :1], TARGETS.present[1:2, :1], BASIS)
    torch.testing.assert_close(biases[1:2, :, :1], bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[1:2], loss, rtol=1e-3, atol=1e-4)


# The bias of a block: time, two registers, 16 image tokens and 10 text tokens.

ENTRIES = ("concat", "cross_attention", "separate_cross_attention", "dual_stream")
FUSIONS = pytest.mark.parametrize("entry", ENTRIES)
IMAGE = slice(3, 19)


def shape_of(entry: str) -> FusionTransformerConfig:
    return small_shape(fusion=entry, num_text_blocks=0, num_registers=2, context_length=10)


def queries_and_keys(entry: str) -> tuple[Tensor, Tensor]:
    """Text has queries where it is updated; separate_cross_attention has keys of text alone."""
    generator = torch.Generator().manual_seed(0)
    num_queries = 29 if entry in UPDATES_TEXT else 19
    query = 1.5 * torch.randn(3, num_queries, 2, 8, generator=generator)
    key = 1.5 * torch.randn(3, 29, 2, 8, generator=generator)
    return query, key[:, 19:] if entry == "separate_cross_attention" else key


def attention(query: Tensor, key: Tensor, addend: Tensor | float = 0.0) -> Tensor:
    logits = torch.einsum("bqhe,bkhe->bhqk", query, key) / math.sqrt(8)
    return (logits + addend).softmax(dim=-1)


@FUSIONS
def test_only_the_logits_of_image_queries_and_text_keys_change(entry: str) -> None:
    query, key = queries_and_keys(entry)
    addend = BlockBias(shape_of(entry), 0, TARGETS)(query, key, None)
    assert addend.shape == (3, 2, query.shape[1], key.shape[1])
    assert (addend[:2, :, IMAGE, -10:] != 0).any()
    assert (addend[2] == 0).all()  # a caption without targets
    addend[:, :, IMAGE, -10:] = 0
    assert (addend == 0).all()


@FUSIONS
def test_preserved_mass_is_redistributed_among_the_text_tokens(entry: str) -> None:
    query, key = queries_and_keys(entry)
    plain = attention(query, key)
    regulated = attention(query, key, BlockBias(shape_of(entry), 0, TARGETS)(query, key, None))
    torch.testing.assert_close(regulated[..., :-10], plain[..., :-10])
    torch.testing.assert_close(regulated[..., -10:].sum(-1), plain[..., -10:].sum(-1))
    targets = regulated[0, :, IMAGE, -10:][..., [2, 5]].mean(1)
    assert (targets > plain[0, :, IMAGE, -10:][..., [2, 5]].mean(1)).all()


@FUSIONS
def test_the_bias_averages_two_evaluations_and_decays(entry: str) -> None:
    query, key = queries_and_keys(entry)
    # The logits come from the same function, because the optimum is sensitive to their last bits.
    relative = relative_logits(logits_of(query[:, IMAGE], key[:, -10:]), TARGETS)
    optimum, _ = optimise_bias(relative, TARGETS.present, gaussian_basis(4))
    block_bias = BlockBias(shape_of(entry), 0, TARGETS)
    for factor in (0.75, 0.99 * (0.25 + 0.75), 0.99**2):
        bias = factor * optimum
        columns = (
            block_bias(query, key, None)[0, :, IMAGE, -10:]
            + added_mass(relative, bias)[0, ..., None]
        )
        torch.testing.assert_close(
            columns[..., [2, 5]].transpose(1, 2), bias[0], rtol=1e-4, atol=1e-4
        )


@FUSIONS
def test_the_bias_of_a_caption_does_not_depend_on_the_batch(entry: str) -> None:
    query, key = queries_and_keys(entry)
    alone = TargetTokens(positions=TARGETS.positions[1:2], present=TARGETS.present[1:2])
    torch.testing.assert_close(
        BlockBias(shape_of(entry), 0, alone)(query[1:2], key[1:2], None),
        BlockBias(shape_of(entry), 0, TARGETS)(query, key, None)[1:2],
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_addend_has_the_type_of_the_queries_and_no_graph() -> None:
    query, key = (x.bfloat16() for x in queries_and_keys("concat"))
    addend = BlockBias(shape_of("concat"), 0, TARGETS)(query, key, None)
    assert addend.dtype == torch.bfloat16
    assert not addend.requires_grad
