"""Configurations of small backbones."""

from dataclasses import replace

from ifvit.models.config import FusionTransformerConfig, UNetConfig

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
