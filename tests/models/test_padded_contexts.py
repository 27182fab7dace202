"""Contexts of captions of different lengths: padding has no effect on any backbone."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from made_backbone import (
    SMALL_UNET,
    backbone_inputs,
    loud_backbone,
    made_captions,
    small_shape,
    without_padding,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ifvit.conditions import PaddedContext, concatenate, tokens_of, with_tokens
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig, Fusion

LONG = {"context_length": 512, "context_width": 16}
MODERN = {
    "num_text_blocks": 2,
    "qk_norm": True,
    "rotary": True,
    "num_registers": 3,
    "mlp": "swiglu",
    "norm": "rms_norm",
}
PLAIN = {
    entry: small_shape(fusion=f"image 3*{entry} image", **LONG)
    for entry in get_args(Fusion)
    if entry != "image"
}
CONFIGS: dict[str, BackboneConfig] = {
    **PLAIN,
    **{
        f"modern {entry}": replace(
            config, **MODERN, modulation=("shared", "adaln_zero")[number % 2]
        )
        for number, (entry, config) in enumerate(PLAIN.items())
    },
    "every entry": small_shape(
        fusion="concat dual_stream image separate_cross_attention adaln cross_attention concat",
        **LONG,
    ),
    "text skips": small_shape(fusion="2*concat image dual_stream concat", **LONG),
    "no text branch": small_shape(fusion="3*concat", long_skip=False, num_text_blocks=0, **LONG),
    "unet": replace(SMALL_UNET, num_classes=None, **LONG),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LENGTHS = (9, 1, 20)


def predict(backbone: Backbone, condition: PaddedContext | Tensor, batch: int = 3) -> Tensor:
    latents, timesteps, _ = backbone_inputs(backbone.config, batch=batch)
    predicted: Tensor = backbone(latents, timesteps, condition)
    return predicted


@ALL
@torch.no_grad()
def test_a_caption_padded_to_64_or_512_tokens_gives_the_same_prediction(
    config: BackboneConfig,
) -> None:
    backbone = loud_backbone(config)
    latents, timesteps, _ = backbone_inputs(config, batch=3)
    captions = made_captions(config, LENGTHS)
    alone = [
        backbone(latents[n : n + 1], timesteps[n : n + 1], without_padding(captions, n))
        for n in range(3)
    ]
    for padded_to in (20, 64, 512):
        captions = made_captions(config, LENGTHS, padded_to, filling=10)
        found = predict(backbone, captions)
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
    # The captions matter, and so do all of their tokens.
    shorter = replace(captions, lengths=captions.lengths.clamp(max=19))
    changed = (predict(backbone, shorter) - found).flatten(1).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, False, True]


@ALL
def test_what_padding_holds_changes_no_bit_and_has_no_gradient(config: BackboneConfig) -> None:
    backbone = loud_backbone(config)
    captions = made_captions(config, LENGTHS, 24)
    tokens = made_captions(config, LENGTHS, 24, filling=10).tokens.requires_grad_()
    predicted = predict(backbone, with_tokens(captions, tokens))
    assert torch.equal(predicted, predict(backbone, captions))
    (gradient,) = torch.autograd.grad(predicted.square().sum(), tokens)
    touched = gradient.abs().amax(dim=2) > 0
    assert touched.sum(dim=1).tolist() == list(LENGTHS)
    assert all(row[:length].all() for row, length in zip(touched, LENGTHS, strict=True))


@ALL
@torch.no_grad()
def test_captions_of_full_length_are_predicted_as_without_a_mask(config: BackboneConfig) -> None:
    config = replace(config, context_length=20)
    backbone, captions = loud_backbone(config), made_captions(config, (20, 20, 20))
    expected = predict(backbone, captions.tokens)
    torch.testing.assert_close(predict(backbone, captions), expected, rtol=1e-6, atol=1e-6)


@ALL
@torch.no_grad()
def test_backends_agree_on_masked_attention(config: BackboneConfig) -> None:
    backbone, captions = loud_backbone(config), made_captions(config, LENGTHS, 24, filling=10)
    expected = predict(backbone, captions)
    backbone.set_attention("math")
    torch.testing.assert_close(predict(backbone, captions), expected, rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
def test_k_captions_of_different_lengths_share_the_latents_of_a_sample(
    config: BackboneConfig,
) -> None:
    backbone, captions = loud_backbone(config), made_captions(config, (9, 1, 20, 4, 2, 12))
    latents, timesteps, _ = backbone_inputs(config, batch=3)
    repeated = backbone(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), captions)
    found = backbone(latents, timesteps, backbone.encode_condition(captions))
    torch.testing.assert_close(found, repeated, rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
def test_encoded_conditions_are_padded_to_the_longest_one(config: BackboneConfig) -> None:
    backbone, captions = loud_backbone(config), made_captions(config, LENGTHS)
    null = made_captions(config, (1,))
    for first, second in ((captions, null), (null, captions)):
        encoded = backbone.encode_condition(first).append(
            backbone.encode_condition(second).expand(len(second))
        )
        expected = predict(backbone, concatenate([first, second]), batch=4)
        found = predict(backbone, encoded, batch=4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # A context whose tokens all count stands beside captions with padding.
    config = replace(config, context_length=20)
    backbone, whole = loud_backbone(config), made_captions(config, (20,)).tokens
    encoded = backbone.encode_condition(whole).append(backbone.encode_condition(captions))
    expected = predict(backbone, concatenate([whole, captions]), batch=4)
    torch.testing.assert_close(predict(backbone, encoded, batch=4), expected, rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
def test_captions_of_one_token_and_padding_stay_finite_in_bf16(config: BackboneConfig) -> None:
    backbone = loud_backbone(config).to(torch.bfloat16)
    captions = made_captions(config, (1, 1, 20), 512, filling=100)
    found = predict(backbone, captions)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    exact = predict(loud_backbone(config), captions)
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["concat", "unet"])
def test_contexts_of_too_many_tokens_or_another_width_are_one_clear_error(name: str) -> None:
    config = replace(CONFIGS[name], context_length=20)
    backbone, captions = loud_backbone(config), made_captions(config, LENGTHS, 21)
    with pytest.raises(UserError, match=r"context of shape \(21, 16\) .* built for \(20, 16\)"):
        backbone.encode_condition(captions)
    narrow = replace(captions, tokens=captions.tokens[:, :20, :8])
    with pytest.raises(UserError, match=r"context of shape \(20, 8\) .* built for \(20, 16\)"):
        backbone.encode_condition(narrow)
    with pytest.raises(UserError, match=r"context of shape \(19, 16\) .* built for \(20, 16\)"):
        backbone.encode_condition(tokens_of(captions)[:, :19])


def test_a_backbone_that_sees_no_text_takes_any_captions() -> None:
    config = small_shape(fusion="2*image", num_text_blocks=0, **LONG)
    backbone, captions = loud_backbone(config), made_captions(config, LENGTHS)
    assert torch.equal(
        predict(backbone, captions), predict(backbone, made_captions(config, LENGTHS, 40))
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["modern cross_attention"],
        CONFIGS["text skips"],
        replace(CONFIGS["unet"], channels=(32,), blocks_per_level=1),
    ],
    ids=["modern cross_attention", "text skips", "unet"],
)
def test_compiled_blocks_have_one_variant_for_all_lengths(config: BackboneConfig) -> None:
    torch.compiler.reset()
    compiled, plain = loud_backbone(config), loud_backbone(config)
    counter = CompileCounter()
    for block in compiled.parts():
        block.compile(dynamic=False, backend=counter)
    counts = []
    for lengths in ((5, 7), (2, 1), (30, 12), (4, 4)):
        captions = made_captions(config, lengths)
        found, expected = (predict(one, captions, batch=2) for one in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4
