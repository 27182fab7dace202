import dataclasses

import numpy as np
import pytest
import torch
from made_backbone import small_shape
from slope import assert_gradient_is_slope
from uvit_oracle import Oracle, random_weights, uvit_layout

from ifvit.errors import UserError
from ifvit.models.attention import load_attention
from ifvit.models.config import PRESETS
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.layers import Attention, timestep_embedding
from ifvit.models.weights import build_backbone, restore_backbone

CONDITIONINGS = ["concat", "cross_attention"]
MODULATED = [("concat+", 2, 1), ("cross_attention+", 2, 1), ("adaln", 2, 1), ("adaln", 0, 0)]
SETTINGS = [(c, i, t) for c in CONDITIONINGS for i, t in [(0, 0), (2, 1), (0, 1), (2, 0), (3, 2)]]
SETTINGS += MODULATED

TINY = small_shape(
    width=16,
    depth=6,
    context_length=5,
    context_width=12,
    conditioning="concat",
    num_image_blocks=2,
)


def tiny(conditioning, num_image, num_text):
    """A plus behind the conditioning adds modulation to it."""
    return dataclasses.replace(
        TINY,
        conditioning=conditioning.removesuffix("+"),
        modulation=conditioning.endswith("+"),
        num_image_blocks=num_image,
        num_text_blocks=num_text,
    )


def loud_backbone(config):
    """Weights at which every path through the network matters."""
    layout = uvit_layout(
        config.conditioning,
        config.depth,
        config.num_image_blocks,
        config.num_text_blocks,
        config.is_modulated,
    )
    weights = random_weights(layout, width=16, patch=2, num_patches=16, context=(5, 12))
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    return restore_backbone(config, tensors), Oracle(weights, layout, config.num_heads)


def inputs(batch=2, captions=None):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(captions or batch, 5, 12, generator=generator)
    return latents, torch.arange(batch) * 400, context


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_predicts_what_the_oracle_predicts(setting):
    backbone, oracle = loud_backbone(tiny(*setting))
    latents, timesteps, context = inputs()
    with torch.no_grad():
        predicted = backbone(latents, timesteps, context)
    expected = [
        oracle.predict(x.double().numpy(), int(t), c.double().numpy())
        for x, t, c in zip(latents, timesteps, context, strict=True)
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), atol=1e-4)


def test_a_time_between_two_steps_has_a_sinusoid_of_its_own():
    times = torch.tensor([0.5, 999.25])
    angles = times.double()[:, None] * torch.tensor([1, 10_000**-0.5], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    torch.testing.assert_close(timestep_embedding(times, 4), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_text_encoded_once_gives_the_same_prediction(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    latents, timesteps, context = inputs()
    with torch.no_grad():
        plain = backbone(latents, timesteps, context)
        once = backbone(latents, timesteps, backbone.encode_condition(context))
    assert torch.equal(plain, once)


@pytest.mark.parametrize("setting", SETTINGS)
def test_attention_backends_give_the_same_prediction(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    with torch.no_grad():
        sdpa = backbone(*inputs())
        backbone.set_attention("math")
        math = backbone(*inputs())
    attends = {module.attend for module in backbone.modules() if isinstance(module, Attention)}
    assert attends == {load_attention("math")}
    torch.testing.assert_close(sdpa, math, atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_several_captions_for_one_latent_predict_as_if_alone(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    latents, timesteps, context = inputs(batch=2, captions=4)
    with torch.no_grad():
        together = backbone(latents, timesteps, context)
        alone = [backbone(latents, timesteps, half) for half in context.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_blocks_before_the_text_run_once_for_all_captions(conditioning):
    backbone, _ = loud_backbone(tiny(conditioning, 2, 1))
    rows = []
    for block in [*backbone.in_blocks, *backbone.out_blocks]:
        block.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    backbone(*inputs(batch=2, captions=4))
    assert rows == [2, 2, 4, 4, 4, 4]


def test_captions_that_do_not_share_out_are_refused():
    backbone, _ = loud_backbone(TINY)
    with pytest.raises(UserError, match="3 conditions for 2 latents; give a multiple"):
        backbone(*inputs(batch=2, captions=3))


@pytest.mark.parametrize(
    ("conditioning", "with_text"), [("concat", 17 + 5), ("cross_attention", 17)]
)
def test_text_joins_at_the_first_fused_block_and_leaves_after_the_last(conditioning, with_text):
    backbone, _ = loud_backbone(tiny(conditioning, 2, 1))
    lengths = []
    for block in [*backbone.in_blocks, backbone.mid_block, *backbone.out_blocks]:
        block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    backbone(*inputs())
    assert lengths == [17, 17, with_text, with_text, with_text, 17, 17]


def test_cross_attention_reads_keys_and_values_only_and_never_updates_text():
    backbone, _ = loud_backbone(tiny("cross_attention", 2, 1))
    latents, timesteps, context = inputs()
    text = backbone.encode_condition(context)
    without_tokens = dataclasses.replace(text, tokens=torch.zeros_like(text.tokens))
    assert len(text.keys_values) == 3
    expected = backbone(latents, timesteps, text)
    assert torch.equal(backbone(latents, timesteps, without_tokens), expected)


@pytest.mark.parametrize("setting", MODULATED)
def test_fresh_modulated_blocks_are_the_identity_but_for_their_skips(setting):
    torch.manual_seed(0)
    backbone = build_backbone(tiny(*setting)).eval()
    tokens, vector = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(backbone.mid_block(tokens, vector=vector), tokens)


@pytest.mark.parametrize("conditioning", ["concat+", "cross_attention+", "adaln"])
def test_text_modulates_fused_blocks_alone_and_time_all(conditioning):
    backbone, _ = loud_backbone(tiny(conditioning, 2, 1))
    signals = []
    for block in [*backbone.in_blocks, backbone.mid_block, *backbone.out_blocks]:
        block.modulation.register_forward_hook(lambda module, args, out: signals.append(args[0]))
    latents, timesteps, context = inputs()
    backbone(latents, timesteps, context)
    time_alone = backbone.time_embed(timestep_embedding(timesteps, 16))
    plain = [torch.equal(signal, time_alone) for signal in signals]
    assert plain == [True, True, False, False, False, True, True]


@pytest.mark.parametrize("setting", SETTINGS)
def test_skips_pair_last_in_first_out(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    outputs, skips = [], []
    for block in backbone.in_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for block in backbone.out_blocks:
        block.skip_linear.register_forward_hook(
            lambda module, args, output: skips.append(args[0][..., 16:])
        )
    backbone(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(reversed(outputs), skips, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_reaches_every_parameter(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    backbone(*inputs()).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_is_the_slope_of_the_loss(setting):
    backbone, _ = loud_backbone(tiny(*setting))
    assert_gradient_is_slope(backbone, inputs())


@pytest.mark.parametrize(
    ("conditioning", "num_image", "num_text", "expected"),
    [(c, *s) for c in CONDITIONINGS for s in [(0, 0, 44_692_644), (4, 1, 47_843_492)]],
)
def test_the_small_preset_has_the_papers_parameters(conditioning, num_image, num_text, expected):
    config = dataclasses.replace(
        PRESETS["small"],
        conditioning=conditioning,
        num_image_blocks=num_image,
        num_text_blocks=num_text,
    )
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == expected


def test_early_concat_has_the_parameter_names_of_uvit():
    layout = uvit_layout("concat", 6, 0, 0)
    expected = random_weights(layout, width=16, patch=2, num_patches=16, context=(5, 12))
    assert set(build_backbone(tiny("concat", 0, 0)).state_dict()) == set(expected)


@pytest.mark.parametrize("init_std", [0.02, 0.1])
def test_fresh_weights_are_narrow_normal_with_zero_biases(init_std):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, width=128, num_image_blocks=0, init_std=init_std)
    for name, parameter in build_backbone(config).named_parameters():
        if name.startswith(("patch_embed", "final_layer")):
            continue  # Conv2d keeps the library's default
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            expected = 0.02 if name == "pos_embed" else init_std
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path):
    backbone, _ = loud_backbone(tiny("cross_attention", 2, 1))
    backbone.save_pretrained(tmp_path)
    again = FusionUViT.from_pretrained(tmp_path)
    assert again.config == backbone.config
    with torch.no_grad():
        assert torch.equal(again(*inputs()), backbone(*inputs()))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_bfloat16_backbone_predicts_nearly_the_same(conditioning):
    backbone, _ = loud_backbone(tiny(conditioning, 2, 1))
    latents, timesteps, context = inputs()
    with torch.no_grad():
        exact = backbone(latents, timesteps, context)
        rounded = backbone.to(torch.bfloat16)(latents, timesteps, context)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.2, rtol=0.05)


def test_latents_and_context_of_another_size_are_refused():
    backbone, _ = loud_backbone(TINY)
    latents, timesteps, context = inputs()
    with pytest.raises(UserError, match=r"latents of shape \(4, 4, 4\).*\(4, 8, 8\)"):
        backbone(latents[..., :4, :4], timesteps, context)
    with pytest.raises(UserError, match=r"context of shape \(4, 12\).*\(5, 12\)"):
        backbone(latents, timesteps, context[:, :4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "divisible by num_heads 3"),
        ({"patch_size": 3}, "not divisible by patch_size 3"),
        ({"depth": 5}, "depth must be even"),
        ({"num_image_blocks": 4}, r"in 0 \.\.\. 3"),
        ({"num_image_blocks": -1}, r"in 0 \.\.\. 3"),
        ({"num_text_blocks": -1}, "must not be negative"),
        ({"width": 0}, "width must be at least 1"),
        ({"conditioning": "add"}, "concat, cross_attention or adaln"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_the_huge_preset_has_half_a_billion_parameters():
    with torch.device("meta"):
        backbone = build_backbone(PRESETS["huge"])
    assert sum(parameter.numel() for parameter in backbone.parameters()) >= 500_000_000
