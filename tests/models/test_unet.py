import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from made_backbone import backbone_inputs
from test_backbone import CAPTIONS_UNET, UNET

from ifvit.models.cost import count_cost
from ifvit.models.presets import CLASS_PRESETS
from ifvit.models.weights import build_backbone


@pytest.mark.parametrize("config", [UNET, CAPTIONS_UNET], ids=["classes", "captions"])
def test_our_attention_is_that_of_diffusers(config):
    torch.manual_seed(0)
    backbone, given = build_backbone(config).eval(), backbone_inputs(config)
    with torch.no_grad():
        ours = backbone(*given)
        backbone.unet.set_attn_processor(AttnProcessor2_0())
        theirs = backbone(*given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_blocks_are_all_but_the_ends():
    backbone = build_backbone(UNET)
    inside = {part for block in backbone.parts() for part in block.modules()}
    assert {m for m in backbone.modules() if isinstance(m, ResnetBlock2D | Attention)} < inside


def test_heads_are_as_wide_as_configured():
    layers = [m for m in build_backbone(UNET).modules() if isinstance(m, Attention)]
    assert {layer.inner_dim / layer.heads for layer in layers} == {UNET.head_width}


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_a_preset_has_about_the_parameters_of_its_transformer(size):
    unet, plain = (count_cost(CLASS_PRESETS[f"{kind}_{size}"]) for kind in ("unet", "class"))
    assert unet.params == pytest.approx(plain.params, rel=0.03)
