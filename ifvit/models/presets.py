"""Named backbone sizes, each in its recommended setting: intermediate fusion, cross-attention.

The paper keeps text out of the outer two thirds of its depth of 12 (four of six blocks a side);
the other sizes keep that share. Any setting is `dataclasses.replace(PRESETS[name], ...)`.
"""

from ifvit.models.config import FusionUViTConfig, TokenTransformerConfig, UNetConfig

# Widths, depths and heads of U-ViT (Bao et al. 2023, Table 1) on the paper's latents and context.


def _coco256(width: int, depth: int, num_heads: int) -> FusionUViTConfig:
    """A backbone for 4x32x32 latents (256 x 256 pixels) and CLIP ViT-L/14 context."""
    return FusionUViTConfig(
        latent_size=32,
        patch_size=2,
        width=width,
        depth=depth,
        num_heads=num_heads,
        context_length=77,
        context_width=768,
        conditioning="cross_attention",
        num_image_blocks=round(depth / 3),
        num_text_blocks=1,
    )


PRESETS: dict[str, FusionUViTConfig] = {
    "tiny": FusionUViTConfig(
        latent_size=8,
        patch_size=2,
        width=96,
        depth=6,
        num_heads=3,
        context_length=16,
        context_width=64,
        conditioning="cross_attention",
        num_image_blocks=1,
        num_text_blocks=1,
        init_std=0.1,
    ),
    "small": _coco256(width=512, depth=12, num_heads=8),
    "mid": _coco256(width=768, depth=16, num_heads=12),
    "large": _coco256(width=1024, depth=20, num_heads=16),
    "huge": _coco256(width=1152, depth=28, num_heads=16),
}


def _imagenet256(width: int, depth: int, num_heads: int) -> TokenTransformerConfig:
    """A class-conditional backbone for 4x32x32 latents (256 x 256 pixels) of ImageNet."""
    return TokenTransformerConfig(
        latent_size=32,
        num_classes=1000,
        patch_size=2,
        width=width,
        depth=depth,
        num_heads=num_heads,
    )


CLASS_PRESETS: dict[str, TokenTransformerConfig | UNetConfig] = {
    "token_tiny": TokenTransformerConfig(
        latent_size=8,
        num_classes=75,
        patch_size=2,
        width=104,
        depth=7,
        num_heads=4,
        init_std=0.1,
    ),
    "token_small": _imagenet256(width=512, depth=12, num_heads=8),
    "token_base": _imagenet256(width=768, depth=12, num_heads=12),
    "token_large": _imagenet256(width=1024, depth=24, num_heads=16),
    "unet_tiny": UNetConfig(
        latent_size=8,
        num_classes=75,
        channels=(32, 64),
        num_attention_levels=1,
        blocks_per_level=1,
        head_width=32,
        class_width=64,
    ),
    "unet_base": UNetConfig(
        latent_size=32,
        num_classes=1000,
        channels=(192, 384, 384),
        num_attention_levels=2,
        head_width=32,
    ),
}
"""For classes; each U-Net has about the parameters of the transformer of its size."""
