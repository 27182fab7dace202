"""What training and sampling rely on in every backbone, whatever its architecture."""

import dataclasses

import pytest
import torch
from made_backbone import small_shape

from ifvit.errors import UserError
from ifvit.models.config import FusionTransformerConfig, UNetConfig, restore_config
from ifvit.models.weights import build_backbone

CROSS = small_shape(
    width=16, depth=6, context_length=5, context_width=12, num_image_blocks=2, num_text_blocks=1
)
CONCAT = dataclasses.replace(CROSS, conditioning="concat")
ADALN = dataclasses.replace(CROSS, conditioning="adaln")
TOKENS = FusionTransformerConfig(
    latent_size=8, num_classes=3, patch_size=2, width=16, num_heads=2, depth=5
)
CAPTIONS = dataclasses.replace(TOKENS, num_classes=None, context_length=5, context_width=12)
UNET = UNetConfig(
    latent_size=8, num_classes=3, channels=(32, 64), num_attention_levels=1, head_width=16
)
CONFIGS = {
    **{
        f"{base.conditioning} {image}-{text}": dataclasses.replace(
            base, num_image_blocks=image, num_text_blocks=text
        )
        for base in (CONCAT, CROSS)
        for image, text in [(0, 0), (2, 1), (0, 1), (2, 0), (3, 2)]
    },
    "modulated concat": dataclasses.replace(CONCAT, modulation=True),
    "modulated cross": dataclasses.replace(CROSS, modulation=True),
    "adaln 2-1": ADALN,
    "adaln 0-0": dataclasses.replace(ADALN, num_image_blocks=0, num_text_blocks=0),
    "tokens": TOKENS,
    "tokens with long skips": dataclasses.replace(TOKENS, long_skip=True),
    "caption tokens": CAPTIONS,
    "modulated caption tokens": dataclasses.replace(CAPTIONS, modulation=True),
    "adaln captions": dataclasses.replace(CAPTIONS, conditioning="adaln", long_skip=True),
    "adaln classes": dataclasses.replace(TOKENS, conditioning="adaln"),
    "unet": UNET,
    "unet of captions": dataclasses.replace(
        UNET, num_classes=None, context_length=5, context_width=12
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def loud_backbone(config):
    """Weights with which every path through the network matters; a fresh adaLN has none."""
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    if not isinstance(config, UNetConfig):
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone


def inputs(config, batch=2, conditions=None):
    generator = torch.Generator().manual_seed(3)
    count = conditions or batch
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(count, 5, 12, generator=generator)
    numbers = torch.arange(count) % 4  # 3 is the null class
    return latents, torch.arange(batch) * 400, numbers if config.num_classes else context


@every_config
def test_conditions_encoded_once_give_the_same_prediction(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = inputs(config)
    with torch.no_grad():
        plain = backbone(latents, timesteps, condition)
        once = backbone(latents, timesteps, backbone.encode_condition(condition))
    assert torch.equal(plain, once)


@every_config
def test_several_conditions_for_one_latent_predict_as_if_alone(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = inputs(config, batch=2, conditions=4)
    with torch.no_grad():
        together = backbone(latents, timesteps, condition)
        alone = [backbone(latents, timesteps, half) for half in condition.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@every_config
def test_attention_backends_give_the_same_prediction(config):
    backbone = loud_backbone(config)
    with torch.no_grad():
        sdpa = backbone(*inputs(config))
        backbone.set_attention("math")
        math = backbone(*inputs(config))
    torch.testing.assert_close(sdpa, math, atol=1e-4, rtol=0)


@every_config
def test_the_condition_and_the_time_matter(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = inputs(config)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, condition)
        assert not torch.equal(backbone(latents, timesteps, condition.flip(0)), predicted)
        assert not torch.equal(backbone(latents, timesteps + 50, condition), predicted)


@every_config
def test_gradient_reaches_every_parameter(config):
    backbone = loud_backbone(config)
    backbone(*inputs(config, batch=4)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_config
def test_the_gradient_is_the_slope_of_the_loss_in_float64(config):
    backbone, given = loud_backbone(config).double(), inputs(config, batch=4)
    parameters = list(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    step = [1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(backbone(*given).square().sum(), parameters)
    expected = sum(float((g * s).sum()) for g, s in zip(gradients, step, strict=True))
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            torch._foreach_add_(parameters, step, alpha=sign)
            losses.append(backbone(*given).square().sum().item())
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-4)


@every_config
def test_a_bfloat16_backbone_predicts_nearly_the_same(config):
    backbone = loud_backbone(config)
    with torch.no_grad():
        exact = backbone(*inputs(config))
        rounded = backbone.to(torch.bfloat16)(*inputs(config))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.std()
    if not getattr(config, "is_modulated", False):
        atol = 0.05 if isinstance(config, UNetConfig) else 0.2
        torch.testing.assert_close(rounded.float(), exact, atol=atol, rtol=0.05)


@pytest.mark.parametrize("name", ["cross_attention 2-1", "tokens with long skips", "unet"])
def test_save_pretrained_and_from_pretrained_round_trip(name, tmp_path):
    config = CONFIGS[name]
    backbone = loud_backbone(config)
    backbone.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path)
    assert again.config == backbone.config == config
    with torch.no_grad():
        assert torch.equal(again(*inputs(config)), backbone(*inputs(config)))


@pytest.mark.parametrize("name", ["concat 2-1", "caption tokens", "unet of captions"])
def test_latents_and_context_of_another_shape_or_number_are_one_clear_error(name):
    config = CONFIGS[name]
    backbone = build_backbone(config)
    latents, timesteps, context = inputs(config)
    with pytest.raises(UserError, match=r"latents of shape \(4, 4, 4\).*\(4, 8, 8\)"):
        backbone(latents[..., :4, :4], timesteps, context)
    with pytest.raises(UserError, match=r"context of shape \(4, 12\).*\(5, 12\)"):
        backbone(latents, timesteps, context[:, :4])
    with pytest.raises(UserError, match="3 conditions for 2 latents; give a multiple"):
        backbone(*inputs(config, batch=2, conditions=3))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CROSS, {"num_heads": 3}, "divisible by num_heads 3"),
        (CROSS, {"patch_size": 3}, "not divisible by patch_size 3"),
        (CROSS, {"depth": 5}, "depth must be even"),
        (CROSS, {"num_image_blocks": 4}, r"in 0 \.\.\. 3"),
        (CROSS, {"num_image_blocks": -1}, "num_image_blocks is -1"),
        (CROSS, {"num_text_blocks": -1}, "num_text_blocks is -1"),
        (CROSS, {"width": 0}, "width is 0; it must be from 1 to 65536"),
        (CROSS, {"depth": 10**9}, "depth is 1000000000; it must be from 1 to 256"),
        (CROSS, {"init_std": float("nan")}, "init_std is NaN"),
        (TOKENS, {"long_skip": True, "depth": 4}, "depth must be odd with long_skip"),
        (TOKENS, {"num_classes": None}, "give either num_classes or both .*, not nothing"),
        (TOKENS, {"context_length": 5}, "not num_classes and context_length"),
        (TOKENS, {"num_classes": None, "context_length": 5}, "not context_length"),
        (TOKENS, {"num_classes": 0}, "num_classes is 0; it must be from 1"),
        (TOKENS, {"depth": 0}, "depth is 0; it must be from 1"),
        (UNET, {"channels": (32, 48)}, r"channels \[32, 48\] must be multiples of 32"),
        (UNET, {"channels": (0, 32)}, r"channels\[0\] is 0"),
        (UNET, {"head_width": 64}, "of head_width 64"),
        (UNET, {"num_attention_levels": 3}, r"num_attention_levels must be in 1 \.\.\. 2"),
        (UNET, {"channels": (32,) * 5}, "latent_size 8 cannot be halved 4 times"),
        (UNET, {"context_width": 5}, "give either num_classes or both"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_clear_error(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)


def test_a_configuration_from_before_architectures_is_a_fusion_uvit():
    stored = dataclasses.asdict(CROSS)
    del stored["architecture"]
    assert restore_config(stored) == CROSS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit"}, "architecture is vit; expected one of fusion_uvit"),
        ({"architecture": ["vit"]}, "expected one of fusion_uvit"),
        ({"conditioning": "add"}, "conditioning"),
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"width": float("nan")}, "width"),
        ({"width": "16"}, "width"),
        ({"latent_size": None}, "latent_size"),
        ({"colour": 3}, "colour"),
    ],
)
def test_a_stored_configuration_is_checked_key_by_key(change, message):
    with pytest.raises(UserError, match=f"backbone: .*{message}"):
        restore_config(dataclasses.asdict(CROSS) | change)
