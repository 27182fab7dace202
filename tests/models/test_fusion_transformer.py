"""The paper's mechanisms against a float64 oracle, initial weights, and what each block sees."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from made_backbone import backbone_inputs, loud_backbone
from test_backbone import CLASSES, CONCAT, CROSS, MODERN
from uvit_oracle import Oracle, class_layout, our_layout, random_weights

from ifvit.models.blocks import BlockInputs
from ifvit.models.config import Fusion, symmetric_fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import build_backbone, initial_weights, restore_backbone

PAPER = [
    (entry, num_image, num_text, modulation)
    for entry in ("concat", "cross_attention", "adaln")
    for num_image, num_text in [(0, 0), (2, 1), (0, 1), (2, 0), (3, 2)]
    for modulation in ("none", "adaln_zero")
    if entry != "adaln" or modulation == "adaln_zero"
]


@pytest.mark.parametrize(("entry", "num_image", "num_text", "modulation"), PAPER)
def test_captions_predict_what_the_oracle_predicts(entry, num_image, num_text, modulation):
    fusion = symmetric_fusion(entry, 7, num_image)
    config = dataclasses.replace(
        CROSS, fusion=fusion, num_text_blocks=num_text, modulation=modulation
    )
    layout = our_layout(entry, 6, num_image, num_text, modulation != "none")
    weights = random_weights(layout, width=16, patch=2, num_patches=16, context=(5, 12))
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    backbone, oracle = restore_backbone(config, tensors), Oracle(weights, layout, config.num_heads)
    latents, timesteps, context = backbone_inputs(config)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, context)
    expected = [
        oracle.predict(x.double().numpy(), int(t), c.double().numpy())
        for x, t, c in zip(latents, timesteps, context, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("long_skip", [False, True])
def test_classes_predict_what_the_oracle_predicts(long_skip):
    config = dataclasses.replace(CLASSES, long_skip=long_skip)
    backbone = loud_backbone(config)
    weights = {name: value.double().numpy() for name, value in backbone.state_dict().items()}
    oracle = Oracle(weights, class_layout(5, long_skip=long_skip), config.num_heads)
    latents, timesteps, classes = backbone_inputs(config, batch=4)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, classes)
    embedded = weights["label_emb.weight"][classes.numpy()][:, None]
    expected = [
        oracle.predict(x, t, c)
        for x, t, c in zip(latents.double().numpy(), timesteps.tolist(), embedded, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), atol=1e-4)


def test_a_time_between_two_steps_has_a_sinusoid_of_its_own():
    times = torch.tensor([0.5, 999.25])
    angles = times.double()[:, None] * torch.tensor([1, 10_000**-0.5], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    found = FusionTransformer(dataclasses.replace(CROSS, width=4)).time_proj(times)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def record_blocks(backbone, *inputs):
    """Tokens before and text after every block, its inputs, and its tokens after it."""
    calls = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.no_grad():
        backbone(*inputs)
    return [(tokens, inputs, *output) for (tokens, inputs), output in calls]


def test_tokens_are_repeated_at_the_first_block_that_sees_text():
    fusion = "2*image adaln image separate_cross_attention dual_stream concat"
    config = dataclasses.replace(MODERN, fusion=fusion)
    calls = record_blocks(loud_backbone(config), *backbone_inputs(config, batch=2, conditions=6))
    assert [tokens.shape for *_, tokens, _ in calls] == 2 * [(2, 19, 16)] + 5 * [(6, 19, 16)]
    assert {text.shape for *_, text in calls} == {(6, 5, 16)}


def test_only_concat_and_dual_stream_change_text_and_the_last_dual_stream_does_not():
    fusion = "image cross_attention concat adaln dual_stream separate_cross_attention dual_stream"
    config = dataclasses.replace(MODERN, fusion=fusion)
    calls = record_blocks(loud_backbone(config), *backbone_inputs(config))
    changed = [not torch.equal(inputs.text, text) for _, inputs, _, text in calls]
    assert changed == [False, False, True, False, True, False, False]


@pytest.mark.parametrize("entry", ["cross_attention", "separate_cross_attention"])
def test_text_that_no_block_updates_is_read_as_keys_and_values_only(entry):
    config = dataclasses.replace(CROSS, fusion=symmetric_fusion(entry, 7, 2))
    backbone = loud_backbone(config)
    latents, timesteps, context = backbone_inputs(config)
    text = backbone.encode_condition(context)
    without_tokens = dataclasses.replace(text, tokens=torch.zeros_like(text.tokens))
    assert list(text.keys_values) == [2, 3, 4]
    expected = backbone(latents, timesteps, text)
    assert torch.equal(backbone(latents, timesteps, without_tokens), expected)


def test_keys_and_values_are_cached_up_to_the_first_block_that_updates_text():
    fusion = "cross_attention adaln separate_cross_attention concat cross_attention"
    backbone = loud_backbone(dataclasses.replace(CROSS, fusion=fusion))
    *_, context = backbone_inputs(backbone.config)
    assert list(backbone.encode_condition(context).keys_values) == [0, 2]


@pytest.mark.parametrize("modulation", ["adaln_zero", "none"])
@pytest.mark.parametrize("entry", ["image", "adaln", "cross_attention", "concat", "dual_stream"])
def test_fresh_modulated_blocks_without_skip_are_the_identity(entry, modulation):
    if modulation == "none" and entry != "adaln":
        return
    config = dataclasses.replace(CONCAT, fusion=f"3*{entry} concat", modulation=modulation)
    block, generator = build_backbone(config).blocks[0], torch.Generator().manual_seed(0)
    tokens, vector, text = torch.randn(3, 2, 5, 16, generator=generator).unbind(0)
    inputs = BlockInputs(text=text, vector=vector[:, 0])
    if entry == "cross_attention":
        inputs = dataclasses.replace(inputs, keys_values=block.text_keys_values(text))
    updated, updated_text = block(tokens, inputs)
    assert torch.equal(updated, tokens)
    assert torch.equal(updated_text, text)


@pytest.mark.parametrize("entry", ["concat", "cross_attention", "adaln", "dual_stream"])
def test_pooled_text_modulates_blocks_that_see_text_and_time_modulates_all(entry):
    config = dataclasses.replace(
        CROSS, fusion=symmetric_fusion(entry, 7, 2), modulation="adaln_zero"
    )
    backbone, given = loud_backbone(config), backbone_inputs(config)
    calls = record_blocks(backbone, *given)
    time = backbone.time_embed(backbone.time_proj(given[1]))
    follows_time_alone = [torch.equal(inputs.vector, time) for _, inputs, *_ in calls]
    assert follows_time_alone == [True, True, False, False, False, True, True]


def test_image_blocks_are_not_modulated_beside_adaln_blocks():
    config = dataclasses.replace(CROSS, fusion="image adaln concat", long_skip=False)
    calls = record_blocks(loud_backbone(config), *backbone_inputs(config))
    assert [inputs.vector is None for _, inputs, *_ in calls] == [True, False, True]


@pytest.mark.parametrize("depth", [6, 7])
def test_long_skips_join_a_block_to_its_mirror(depth):
    entries = ["image", "dual_stream", "concat", "cross_attention", "image", "concat", "image"]
    config = dataclasses.replace(CROSS, fusion=" ".join(entries[-depth:]))
    calls = record_blocks(loud_backbone(config), *backbone_inputs(config))
    for number, (_, inputs, *_) in enumerate(calls):
        mirror = depth - 1 - number
        if number <= mirror:
            assert inputs.skip is None
            continue
        _, _, tokens, text = calls[mirror]
        assert torch.equal(inputs.skip, tokens)
        if inputs.text_skip is not None:
            assert torch.equal(inputs.text_skip, text)


@pytest.mark.parametrize("entry", get_args(Fusion))
@pytest.mark.parametrize("mirror", get_args(Fusion))
def test_text_takes_the_skip_where_both_mirrors_update_text(entry, mirror):
    config = dataclasses.replace(CROSS, num_text_blocks=0)
    both_update = {entry, mirror} <= {"concat", "dual_stream"}
    for fusion in (f"{mirror} {entry}", f"{mirror} image {entry}"):
        longer = dataclasses.replace(config, fusion=fusion)
        calls = record_blocks(loud_backbone(longer), *backbone_inputs(longer))
        assert (calls[-1][1].text_skip is not None) == both_update
        if entry == "dual_stream":
            last = build_backbone(longer).blocks[-1]
            assert (last.text.skip_linear is not None) == both_update


def test_a_condition_does_not_matter_where_no_block_sees_text():
    for base in (CROSS, CLASSES):
        config = dataclasses.replace(base, fusion="3*image", num_text_blocks=0)
        backbone, (latents, timesteps, condition) = loud_backbone(config), backbone_inputs(config)
        assert not [name for name in backbone.state_dict() if name.startswith(("label", "context"))]
        with torch.no_grad():
            predicted = backbone(latents, timesteps, condition)
            assert torch.equal(backbone(latents, timesteps, condition.flip(0)), predicted)
            both = backbone(latents, timesteps, torch.cat([condition, condition]))
        assert torch.equal(both, torch.cat([predicted, predicted]))


def test_the_null_class_is_a_class_of_its_own():
    backbone = loud_backbone(CLASSES)
    latents, timesteps, _ = backbone_inputs(CLASSES)
    with torch.no_grad():
        predicted = [backbone(latents, timesteps, torch.tensor([k, k])) for k in range(4)]
    assert len({tuple(one.flatten().tolist()) for one in predicted}) == 4


def test_parts_are_all_blocks():
    assert len(build_backbone(CROSS).parts()) == 1 + 7
    assert len(build_backbone(CLASSES).parts()) == 5


WIDE = dataclasses.replace(
    MODERN, width=128, fusion="image concat dual_stream separate_cross_attention adaln"
)


@pytest.mark.parametrize("modulation", ["none", "adaln_zero", "shared"])
@pytest.mark.parametrize(("init_std", "expected"), [("auto", 0.08), (0.05, 0.05)])
def test_fresh_weights_are_narrow_normal_with_zero_biases(init_std, expected, modulation):
    config = dataclasses.replace(WIDE, init_std=init_std, modulation=modulation)
    for name, parameter in build_backbone(config).named_parameters():
        if name.startswith(("patch_embed", "final_layer")):
            continue  # Conv2d keeps torch's own distribution
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias") or "cross_attn.proj" in name or "modulation.linear" in name:
            assert not parameter.any(), name
        else:
            is_fixed = name in ("pos_embed", "registers", "shared_modulation.1.weight")
            std = 0.02 if is_fixed else expected
            std = 128**-0.5 if name.endswith("table") else std
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.12 * std, name


@pytest.mark.parametrize(
    ("width", "std"), [(32, 32**-0.5), (96, 96**-0.5), (256, 0.04), (512, 0.02), (1024, 0.02)]
)
def test_automatic_initial_weights_are_wider_in_narrow_backbones(width, std):
    weight = initial_weights(dataclasses.replace(CROSS, width=width), 0)(
        "blocks.0.attn.proj.weight"
    )
    assert weight.std().item() == pytest.approx(std, rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["adaln_zero", "shared"])
def test_fresh_modulation_keeps_the_scale_of_a_narrow_backbone(modulation):
    plain = dataclasses.replace(MODERN, width=32, num_heads=2, modulation="none")
    sizes = [
        build_backbone(config)(*backbone_inputs(config)).std().item()
        for config in (plain, dataclasses.replace(plain, modulation=modulation))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


def test_convolutions_have_torchs_own_distribution():
    weight = initial_weights(dataclasses.replace(CROSS, width=512), 0)("patch_embed.proj.weight")
    bound = 16**-0.5  # 4 channels, 2 x 2 pixels
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_initial_values_depend_on_name_shape_and_seed_but_not_on_the_map():
    first = dict(build_backbone(CROSS, seed=1).named_parameters())
    other = dict(
        build_backbone(dataclasses.replace(CONCAT, fusion="7*concat"), 1).named_parameters()
    )
    modern = dict(build_backbone(MODERN, seed=1).named_parameters())
    again = dict(build_backbone(CROSS, seed=2).named_parameters())
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)
    shared = [name for name in modern if name in first and modern[name].shape == first[name].shape]
    assert "blocks.0.attn.qkv.weight" in shared
    assert all(torch.equal(first[name], modern[name]) for name in shared)
    assert not torch.equal(first["pos_embed"], again["pos_embed"])
    weights = [value for name, value in first.items() if name.endswith("attn.proj.weight")]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(weights) == 8
