"""What training and sampling rely on in every backbone, whatever its architecture."""

import copy
import dataclasses
import functools
import pickle
import warnings

import pytest
import torch
from made_backbone import (
    SMALL_CLASSES,
    SMALL_UNET,
    backbone_inputs,
    loud_backbone,
    small_shape,
)
from torch.utils.checkpoint import checkpoint

from ifvit.errors import UserError
from ifvit.models.config import restore_config
from ifvit.models.presets import PRESETS
from ifvit.models.weights import build_backbone, describe_backbone

CROSS = small_shape(
    width=16, context_length=5, context_width=12, fusion="2*image 3*cross_attention 2*image"
)
CONCAT = dataclasses.replace(CROSS, fusion="2*image 3*concat 2*image")
CLASSES = dataclasses.replace(SMALL_CLASSES, num_classes=3, width=16, fusion="5*concat")
UNET = dataclasses.replace(SMALL_UNET, num_classes=3, channels=(32, 64))
CAPTIONS_UNET = dataclasses.replace(UNET, num_classes=None, context_length=5, context_width=12)
MODERN = dataclasses.replace(
    CROSS,
    fusion="image dual_stream separate_cross_attention adaln concat dual_stream",
    mlp="swiglu",
    norm="rms_norm",
    qk_norm=True,
    rotary=True,
    num_registers=2,
    modulation="shared",
)
CONFIGS = {
    "concat": CONCAT,
    "concat early": dataclasses.replace(CONCAT, fusion="7*concat", num_text_blocks=0),
    "cross-attention": CROSS,
    "cross-attention in the middle block": dataclasses.replace(
        CROSS, fusion="3*image cross_attention 3*image", num_text_blocks=2
    ),
    "separate cross-attention": dataclasses.replace(
        CROSS, fusion="image 3*separate_cross_attention"
    ),
    "dual stream": dataclasses.replace(CROSS, fusion="5*dual_stream"),
    "adaln": dataclasses.replace(CROSS, fusion="2*image 3*adaln 2*image"),
    "modulated cross-attention": dataclasses.replace(CROSS, modulation="adaln_zero"),
    "modern": MODERN,
    "modern classes": dataclasses.replace(
        CLASSES,
        fusion="image 2*dual_stream cross_attention image",
        mlp="swiglu",
        norm="rms_norm",
        qk_norm=True,
        rotary=True,
        num_registers=2,
        modulation="adaln_zero",
    ),
    "classes": CLASSES,
    "classes with long skips": dataclasses.replace(CLASSES, long_skip=True),
    "unet": UNET,
    "unet of captions": CAPTIONS_UNET,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_conditions_encoded_once_give_the_same_prediction(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = backbone_inputs(config)
    with torch.no_grad():
        plain = backbone(latents, timesteps, condition)
        once = backbone(latents, timesteps, backbone.encode_condition(condition))
    assert torch.equal(plain, once)


@every_config
def test_several_conditions_for_one_latent_predict_as_if_alone(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = backbone_inputs(config, batch=2, conditions=4)
    with torch.no_grad():
        together = backbone(latents, timesteps, condition)
        alone = [backbone(latents, timesteps, half) for half in condition.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@every_config
def test_attention_backends_give_the_same_prediction(config):
    backbone = loud_backbone(config)
    with torch.no_grad():
        sdpa = backbone(*backbone_inputs(config))
        backbone.set_attention("math")
        math = backbone(*backbone_inputs(config))
    torch.testing.assert_close(sdpa, math, atol=1e-4, rtol=0)


@every_config
def test_the_condition_and_the_time_matter(config):
    backbone = loud_backbone(config)
    latents, timesteps, condition = backbone_inputs(config)
    with torch.no_grad():
        predicted = backbone(latents, timesteps, condition)
        assert not torch.equal(backbone(latents, timesteps, condition.flip(0)), predicted)
        assert not torch.equal(backbone(latents, timesteps + 50, condition), predicted)


@every_config
def test_gradient_reaches_every_parameter(config):
    backbone = loud_backbone(config)
    backbone(*backbone_inputs(config, batch=4)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_config
def test_the_gradient_is_the_slope_of_the_loss_in_float64(config):
    backbone, given = loud_backbone(config).double(), backbone_inputs(config, batch=4)
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
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_prediction_in_16_bits_is_nearly_the_same(config, dtype, autocast):
    backbone = loud_backbone(config)
    with torch.no_grad(), warnings.catch_warnings():
        exact = backbone(*backbone_inputs(config))
        warnings.simplefilter("error")
        if autocast:
            with torch.autocast("cpu", dtype):
                rounded = backbone(*backbone_inputs(config))
        else:
            rounded = backbone.to(dtype)(*backbone_inputs(config))
    assert rounded.dtype == dtype
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.std()


@every_config
def test_a_copy_a_pickle_and_filled_meta_tensors_predict_the_same(config):
    backbone = loud_backbone(config)
    empty = describe_backbone(config).to_empty(device="cpu").eval()
    empty.load_state_dict(backbone.state_dict())
    copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), empty]
    with torch.no_grad():
        expected = backbone(*backbone_inputs(config))
        for one in copies:
            assert torch.equal(one(*backbone_inputs(config)), expected)


def gradients_of(backbone):
    backbone(*backbone_inputs(backbone.config)).square().sum().backward()
    return [parameter.grad for parameter in backbone.parameters()]


@every_config
def test_blocks_that_are_recomputed_have_the_same_gradient(config):
    recomputed = loud_backbone(config)
    for block in recomputed.parts():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    expected = gradients_of(loud_backbone(config))
    torch.testing.assert_close(gradients_of(recomputed), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cross-attention", "modern", "modern classes"])
def test_compiled_blocks_are_one_graph_each_with_the_same_gradient(name):
    torch.compiler.reset()  # or blocks of earlier tests count towards the limit of variants
    compiled = loud_backbone(CONFIGS[name])
    for block in compiled.parts():
        block.compile(dynamic=False, backend="eager", fullgraph=True)
    expected = gradients_of(loud_backbone(CONFIGS[name]))
    torch.testing.assert_close(gradients_of(compiled), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cross-attention", "modern", "modern classes", "unet"])
def test_save_pretrained_and_from_pretrained_round_trip(name, tmp_path):
    config = CONFIGS[name]
    backbone = loud_backbone(config)
    backbone.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path)
    assert again.config == backbone.config == config
    with torch.no_grad():
        assert torch.equal(again(*backbone_inputs(config)), backbone(*backbone_inputs(config)))


@pytest.mark.parametrize("name", ["concat", "modern", "unet of captions"])
def test_latents_and_context_of_another_shape_or_number_are_one_clear_error(name):
    config = CONFIGS[name]
    backbone = build_backbone(config)
    latents, timesteps, context = backbone_inputs(config)
    with pytest.raises(UserError, match=r"latents of shape \(4, 4, 4\).*\(4, 8, 8\)"):
        backbone(latents[..., :4, :4], timesteps, context)
    with pytest.raises(UserError, match=r"context of shape \(4, 12\).*\(5, 12\)"):
        backbone(latents, timesteps, context[:, :4])
    with pytest.raises(UserError, match="3 conditions for 2 latents; give a multiple"):
        backbone(*backbone_inputs(config, batch=2, conditions=3))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CROSS, {"num_heads": 3}, "divisible by num_heads 3"),
        (CROSS, {"patch_size": 3}, "not divisible by patch_size 3"),
        (CROSS, {"width": 15, "num_heads": 3}, "width 15 must be even"),
        (
            CROSS,
            {"fusion": "3*images"},
            r'3\*images is not an entry like "image" or "4\*image"',
        ),
        (CROSS, {"fusion": "0*image concat"}, r"fusion: 0\*image is not an entry"),
        (CROSS, {"fusion": "image,concat"}, "fusion: image,concat is not an entry"),
        (CROSS, {"fusion": ""}, "fusion: 0 blocks; give 1 to 256"),
        (CROSS, {"fusion": "200*image 57*concat"}, "fusion: 257 blocks; give 1 to 256"),
        (CROSS, {"fusion": "9" * 5000 + "*image"}, "is not an entry"),
        (CROSS, {"fusion": "3*image"}, "num_text_blocks: no block of the fusion map sees text"),
        (CROSS, {"num_text_blocks": -1}, "num_text_blocks is -1"),
        (CROSS, {"num_text_blocks": 257}, "num_text_blocks is 257; it must be from 0 to 256"),
        (CROSS, {"num_registers": 257}, "num_registers is 257"),
        (CROSS, {"rotary": True, "width": 12}, "rotary: heads have 6 channels; choose num_heads"),
        (CROSS, {"width": 0}, "width is 0; it must be from 1 to 65536"),
        (CROSS, {"init_std": float("nan")}, "init_std is NaN"),
        (CLASSES, {"num_classes": None}, "give either num_classes or both .*, not nothing"),
        (CLASSES, {"context_length": 5}, "not num_classes and context_length"),
        (CLASSES, {"num_classes": None, "context_length": 5}, "not context_length"),
        (CLASSES, {"num_classes": 0}, "num_classes is 0; it must be from 1"),
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


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.0), ("3b", 3.0)])
def test_a_large_preset_has_the_parameters_of_its_name(name, billions):
    parameters = describe_backbone(PRESETS[name]).parameters()
    assert sum(one.numel() for one in parameters) == pytest.approx(billions * 1e9, rel=0.05)


def test_a_fusion_map_is_stored_in_compact_notation():
    config = dataclasses.replace(CROSS, fusion=" image 1*image 2*concat\nconcat  image 1*image")
    assert config.fusion == "2*image 3*concat 2*image"
    assert config == CONCAT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit"}, "architecture is vit; expected one of fusion_transformer"),
        ({"architecture": ["vit"]}, "expected one of fusion_transformer"),
        ({"fusion": "add"}, "fusion"),
        ({"fusion": 3}, "fusion"),
        ({"width": float("nan")}, "width"),
        ({"width": "16"}, "width"),
        ({"latent_size": None}, "latent_size"),
        ({"colour": 3}, "colour"),
        ({"init_std": "wide"}, "init_std"),
        ({"modulation": "adaln"}, "modulation"),
    ],
)
def test_a_stored_configuration_is_checked_key_by_key(change, message):
    with pytest.raises(UserError, match=f"backbone: .*{message}"):
        restore_config(dataclasses.asdict(CROSS) | change)
