"""Configurations of small backbones, backbones whose every path matters, and inputs for them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ifvit.conditions import PaddedContext, is_visible, pad_tokens
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig, FusionTransformerConfig, UNetConfig
from ifvit.models.weights import build_backbone

_SMALL = FusionTransformerConfig(
    latent_size=8,
    patch_size=2,
    width=32,
    num_heads=2,
    context_length=6,
    context_width=16,
    fusion="image 3*cross_attention image",
    num_text_blocks=1,
)
SMALL_CLASSES = FusionTransformerConfig(
    latent_size=8,
    num_classes=2,
    patch_size=2,
    width=32,
    num_heads=2,
    fusion="3*concat",
    long_skip=False,
)
SMALL_UNET = UNetConfig(
    latent_size=8, num_classes=2, channels=(32, 32), num_attention_levels=1, head_width=16
)


def small_shape(**changes: object) -> FusionTransformerConfig:
    """4 x 8 x 8 latents, context 6 x 16, intermediate cross-attention; `changes` override."""
    return replace(_SMALL, **changes)


def loud_backbone(config: BackboneConfig) -> Backbone:
    """Backbone in eval mode in which every parameter has an effect; fresh modulation has none."""
    backbone = build_backbone(config).eval()
    if isinstance(config, FusionTransformerConfig):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                is_matrix = parameter.ndim in (2, 4)
                std = math.prod(parameter.shape[1:]) ** -0.5 if is_matrix else 0.2
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return backbone


def backbone_inputs(
    config: BackboneConfig, batch: int = 2, conditions: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and conditions; of classes, the last is the null class."""
    generator = torch.Generator().manual_seed(3)
    count = conditions or batch
    size = (batch, config.latent_channels, config.latent_size, config.latent_size)
    latents = torch.randn(size, generator=generator)
    if config.context_shape is None:
        condition = torch.arange(count) % (config.num_classes + 1)
    else:
        condition = torch.randn(count, *config.context_shape, generator=generator)
    return latents, torch.arange(batch) * 400, condition


def made_captions(
    config: BackboneConfig, lengths: Sequence[int], padded_to: int | None = None, filling: float = 0
) -> PaddedContext:
    """Contexts of captions with these lengths; `filling` is the scale of what padding holds."""
    assert config.context_shape is not None
    longest, width = padded_to or max(lengths), config.context_shape[1]
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(len(lengths), max(lengths), width, generator=generator)
    tokens = pad_tokens(tokens, longest)
    visible = is_visible(torch.tensor(lengths), longest)[..., None]
    padding = filling * torch.randn(tokens.shape)
    return PaddedContext(
        tokens=torch.where(visible, tokens, padding), lengths=torch.tensor(lengths)
    )


def without_padding(captions: PaddedContext, number: int) -> PaddedContext:
    """One of the captions, without padding."""
    length = captions.lengths[number : number + 1]
    return PaddedContext(tokens=captions.tokens[number : number + 1, :length], lengths=length)
