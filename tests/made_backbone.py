"""Configurations of small backbones."""

from dataclasses import replace

from ifvit.models.config import FusionUViTConfig, TokenTransformerConfig, UNetConfig

_SMALL = FusionUViTConfig(
    latent_size=8,
    patch_size=2,
    width=32,
    depth=4,
    num_heads=2,
    context_length=6,
    context_width=16,
    conditioning="cross_attention",
    num_image_blocks=1,
    num_text_blocks=1,
)
SMALL_TOKENS = TokenTransformerConfig(
    latent_size=8, num_classes=2, patch_size=2, width=32, num_heads=2, depth=3
)
SMALL_UNET = UNetConfig(
    latent_size=8, num_classes=2, channels=(32, 32), num_attention_levels=1, head_width=16
)


def small_shape(**changes: object) -> FusionUViTConfig:
    """4 x 8 x 8 latents, context 6 x 16, intermediate cross-attention; `changes` override."""
    return replace(_SMALL, **changes)
