"""Both transformers against a float64 oracle, and what each of their blocks sees."""

import dataclasses

import numpy as np
import pytest
import torch
from test_backbone import CONCAT, CROSS, TOKENS, inputs, loud_backbone
from test_backbone import CONFIGS as BACKBONES
from uvit_oracle import Oracle, TokenOracle, random_weights, uvit_layout

from ifvit.models.config import FusionTransformerConfig
from ifvit.models.layers import timestep_embedding
from ifvit.models.weights import build_backbone, restore_backbone

FUSION = {name: c for name, c in BACKBONES.items() if isinstance(c, FusionTransformerConfig)}
MODULATED = {name: config for name, config in FUSION.items() if config.is_modulated}
CLASSES = {name: c for name, c in BACKBONES.items() if isinstance(c, FusionTransformerConfig)}


@pytest.mark.parametrize("config", FUSION.values(), ids=FUSION)
def test_fusion_uvit_predicts_what_the_oracle_predicts(config):
    layout = uvit_layout(
        config.conditioning,
        config.depth,
        config.num_image_blocks,
        config.num_text_blocks,
        config.is_modulated,
    )
    weights = random_weights(layout, width=16, patch=2, num_patches=16, context=(5, 12))
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    backbone, oracle = restore_backbone(config, tensors), Oracle(weights, layout, config.num_heads)
    latents, timesteps, context = inputs(config)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, context)
    expected = [
        oracle.predict(x.double().numpy(), int(t), c.double().numpy())
        for x, t, c in zip(latents, timesteps, context, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("config", CLASSES.values(), ids=CLASSES)
def test_token_transformer_predicts_what_the_oracle_predicts(config):
    backbone = loud_backbone(config)
    weights = {name: value.double().numpy() for name, value in backbone.state_dict().items()}
    oracle = TokenOracle(weights, config)
    latents, timesteps, condition = inputs(config, batch=4)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, condition)
    contexts = condition.double().numpy()
    if config.num_classes:
        contexts = weights["label_emb.weight"][condition.numpy()][:, None]
    expected = [
        oracle.predict(x, t, c)
        for x, t, c in zip(latents.double().numpy(), timesteps.tolist(), contexts, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), rtol=1e-3, atol=1e-3)


def test_a_time_between_two_steps_has_a_sinusoid_of_its_own():
    times = torch.tensor([0.5, 999.25])
    angles = times.double()[:, None] * torch.tensor([1, 10_000**-0.5], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    torch.testing.assert_close(timestep_embedding(times, 4), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("config", "with_text"), [(CONCAT, 17 + 5), (CROSS, 17)])
def test_text_joins_at_the_first_fused_block_and_leaves_after_the_last(config, with_text):
    backbone = build_backbone(config)
    shapes = []
    for block in [*backbone.in_blocks, backbone.mid_block, *backbone.out_blocks]:
        block.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    backbone(*inputs(config, batch=2, conditions=4))
    # Blocks before the text run once for both captions of a latent.
    fused = (4, with_text)
    assert shapes == [(2, 17), (2, 17), fused, fused, fused, (4, 17), (4, 17)]


def test_cross_attention_reads_keys_and_values_only_and_never_updates_text():
    backbone = loud_backbone(CROSS)
    latents, timesteps, context = inputs(CROSS)
    text = backbone.encode_condition(context)
    without_tokens = dataclasses.replace(text, tokens=torch.zeros_like(text.tokens))
    assert len(text.keys_values) == 3
    expected = backbone(latents, timesteps, text)
    assert torch.equal(backbone(latents, timesteps, without_tokens), expected)


@pytest.mark.parametrize("config", MODULATED.values(), ids=MODULATED)
def test_fresh_modulated_blocks_without_skip_are_the_identity(config):
    torch.manual_seed(0)
    tokens, vector = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(build_backbone(config).mid_block(tokens, vector=vector), tokens)


@pytest.mark.parametrize("name", ["modulated concat", "modulated cross", "adaln 2-1"])
def test_text_modulates_only_fused_blocks_and_time_modulates_all(name):
    backbone = loud_backbone(FUSION[name])
    vectors = []
    for block in [*backbone.in_blocks, backbone.mid_block, *backbone.out_blocks]:
        block.modulation.register_forward_hook(lambda module, args, out: vectors.append(args[0]))
    latents, timesteps, context = inputs(FUSION[name])
    backbone(latents, timesteps, context)
    time = backbone.time_embed(timestep_embedding(timesteps, 16))
    follows_time_alone = [torch.equal(vector, time) for vector in vectors]
    assert follows_time_alone == [True, True, False, False, False, True, True]


@pytest.mark.parametrize("config", FUSION.values(), ids=FUSION)
def test_skips_pair_last_in_first_out(config):
    backbone = loud_backbone(config)
    outputs, skips = [], []
    for block in backbone.in_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for block in backbone.out_blocks:
        block.skip_linear.register_forward_hook(
            lambda module, args, output: skips.append(args[0][..., 16:])
        )
    backbone(*inputs(config))
    assert all(torch.equal(a, b) for a, b in zip(reversed(outputs), skips, strict=True))


def test_early_concat_has_the_parameter_names_of_uvit():
    layout = uvit_layout("concat", 6, 0, 0)
    expected = random_weights(layout, width=16, patch=2, num_patches=16, context=(5, 12))
    assert set(build_backbone(FUSION["concat 0-0"]).state_dict()) == set(expected)


@pytest.mark.parametrize("init_std", [0.02, 0.1])
@pytest.mark.parametrize("base", [CONCAT, TOKENS], ids=["fusion", "tokens"])
def test_fresh_weights_are_narrow_normal_with_zero_biases(base, init_std):
    torch.manual_seed(0)
    classes = {"num_classes": 99} if base.num_classes else {}
    config = dataclasses.replace(base, width=128, init_std=init_std, **classes)
    for name, parameter in build_backbone(config).named_parameters():
        if name.startswith(("patch_embed", "final_layer")):
            continue  # Conv2d keeps torch's own initial weights
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            expected = 0.02 if name == "pos_embed" else init_std
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize(
    ("config", "count"), [(CROSS, 7 + 1), (dataclasses.replace(TOKENS, long_skip=True), 5)]
)
def test_blocks_are_all_of_them(config, count):
    assert len(build_backbone(config).blocks()) == count


def test_the_null_class_is_a_class_of_its_own():
    backbone = loud_backbone(TOKENS)
    latents, timesteps, _ = inputs(TOKENS)
    with torch.no_grad():
        predicted = [backbone(latents, timesteps, torch.tensor([k, k])) for k in range(4)]
    assert len({tuple(one.flatten().tolist()) for one in predicted}) == 4
