import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch.utils.flop_counter import FlopCounterMode

from ifvit.errors import UserError
from ifvit.models.config import CLASS_PRESETS, UNetConfig
from ifvit.models.cost import count_cost
from ifvit.models.unet import UNet
from ifvit.models.weights import build_backbone

CLASSES = UNetConfig(
    latent_size=8, num_classes=3, channels=(32, 64), num_attention_levels=1, head_width=16
)
CAPTIONS = dataclasses.replace(CLASSES, num_classes=None, context_length=5, context_width=12)
CONFIGS = {"classes": CLASSES, "captions": CAPTIONS}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(config, batch=2, conditions=None):
    count = conditions or batch
    context = torch.randn(count, 5, 12)
    numbers = torch.arange(count) % 4
    latents = torch.randn(batch, 4, 8, 8)
    return latents, torch.arange(batch) * 400, numbers if config.num_classes else context


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_our_attention_is_diffusers(config):
    backbone = build_backbone(config).eval()
    given = inputs(config)
    with torch.no_grad():
        ours = backbone(*given)
        backbone.set_attention("math")
        math = backbone(*given)
        backbone.unet.set_attn_processor(AttnProcessor2_0())
        theirs = backbone(*given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(math, theirs, atol=1e-5, rtol=0)


def test_blocks_are_all_but_the_ends():
    backbone = build_backbone(CLASSES)
    inside = {part for block in backbone.blocks() for part in block.modules()}
    assert {m for m in backbone.modules() if isinstance(m, ResnetBlock2D | Attention)} < inside


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_bfloat16_backbone_predicts_nearly_the_same(config):
    backbone, given = build_backbone(config).eval(), inputs(config)
    with torch.no_grad():
        exact = backbone(*given)
        rounded = backbone.to(torch.bfloat16)(*given)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_heads_are_as_wide_as_configured():
    layers = [m for m in build_backbone(CLASSES).modules() if isinstance(m, Attention)]
    assert {layer.inner_dim / layer.heads for layer in layers} == {CLASSES.head_width}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_conditions_encoded_once_and_several_for_one_latent_predict_as_if_alone(config):
    backbone = build_backbone(config).eval()
    latents, timesteps, condition = inputs(config, batch=2, conditions=4)
    with torch.no_grad():
        together = backbone(latents, timesteps, backbone.encode_condition(condition))
        alone = [backbone(latents, timesteps, half) for half in condition.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_condition_and_the_time_matter(config):
    backbone = build_backbone(config).eval()
    latents, timesteps, condition = inputs(config)
    with torch.no_grad():
        drawn = backbone(latents, timesteps, condition)
        assert not torch.equal(backbone(latents, timesteps, condition.flip(0)), drawn)
        assert not torch.equal(backbone(latents, timesteps + 50, condition), drawn)


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path):
    backbone = build_backbone(CLASSES).eval()
    backbone.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == backbone.config
    given = inputs(CLASSES)
    with torch.no_grad():
        assert torch.equal(again(*given), backbone(*given))


@pytest.mark.parametrize("config", [*CONFIGS.values(), CLASS_PRESETS["unet_tiny"]])
def test_counted_cost_is_that_of_the_module(config, monkeypatch):
    counted = count_cost(config)
    backbone = build_backbone(config).eval()
    assert counted.params == sum(parameter.numel() for parameter in backbone.parameters())
    backbone.set_attention("math")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(*(x[:1] for x in inputs(config)))
    assert counter.get_total_flops() == counted.flops
    monkeypatch.setattr("ifvit.models.unet.load_attention", lambda _: lambda query, *_: query)
    backbone.set_attention("math")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(*(x[:1] for x in inputs(config)))
    assert counter.get_total_flops() == counted.layer_flops


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_a_preset_has_about_the_parameters_of_its_transformer(size):
    unet, tokens = (count_cost(CLASS_PRESETS[f"{kind}_{size}"]) for kind in ("unet", "token"))
    assert unet.params == pytest.approx(tokens.params, rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (32, 48)}, r"channels \[32, 48\] must be multiples of 32"),
        ({"channels": (0, 32)}, "must be multiples of 32"),
        ({"head_width": 64}, "of head_width 64"),
        ({"num_attention_levels": 3}, r"num_attention_levels must be in 1 \.\.\. 2"),
        ({"channels": (32,) * 5}, "latent_size 8 cannot be halved 4 times"),
        ({"context_width": 5}, "give either num_classes or both"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CLASSES, **change)
