"""A small fusion backbone of any map with five contexts, for tests of guidance and sampling."""

import random
from typing import get_args

import torch
from made_backbone import small_shape

from ifvit.models.config import TEXT_KEYS, Fusion, FusionTransformerConfig
from ifvit.models.fusion_transformer import FusionTransformer

CONTEXTS = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(2))
ENTRIES = get_args(Fusion)
MAPS = tuple(f"image 3*{entry} image" for entry in ENTRIES if entry != "image")
"""A map of every way in which text takes part."""
TEXT_KEY_MAPS = tuple(one for one in MAPS if TEXT_KEYS & set(one.replace("*", " ").split()))
"""Those in which image tokens attend to text."""


def captioned_shape(
    fusion: str = "image 3*cross_attention image", **changes: object
) -> FusionTransformerConfig:
    """Latents 4 x 4 x 4, context 6 x 16, and a text branch of one block."""
    return small_shape(**{"latent_size": 4, "fusion": fusion} | changes)


def random_shape(seed: int) -> FusionTransformerConfig:
    """A random map of 1 to 6 blocks that see text somewhere, with random options."""
    draw = random.Random(seed)
    entries = draw.choices(ENTRIES, k=draw.randint(1, 6))
    entries[draw.randrange(len(entries))] = draw.choice(ENTRIES[1:])
    return captioned_shape(
        " ".join(entries),
        num_text_blocks=draw.randint(0, 1),
        long_skip=draw.random() < 0.5,
        mlp=draw.choice(["gelu", "swiglu"]),
        norm=draw.choice(["layer_norm", "rms_norm"]),
        qk_norm=draw.random() < 0.5,
        rotary=draw.random() < 0.5,
        num_registers=draw.choice([0, 0, 3]),
        modulation=draw.choice(["none", "adaln_zero", "shared"]),
    )


def build_backbone(
    shape: FusionTransformerConfig | str = "image 3*cross_attention image",
) -> FusionTransformer:
    """A backbone in which no weight is zero, so that text has an effect in every block."""
    torch.manual_seed(0)
    config = captioned_shape(shape) if isinstance(shape, str) else shape
    backbone = FusionTransformer(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone
