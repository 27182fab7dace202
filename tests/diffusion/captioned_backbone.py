"""A small untrained fusion backbone with five contexts, for tests of guidance and sampler."""

import torch
from made_backbone import small_shape

from ifvit.models.config import Fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.layers import Modulation

CONTEXTS = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))


def build_backbone(conditioning: Fusion = "cross_attention") -> FusionTransformer:
    """Latents 4 x 4 x 4, context 6 x 16, one image-only block a side."""
    torch.manual_seed(0)
    config = small_shape(latent_size=4, conditioning=conditioning)
    backbone = FusionTransformer(config).eval()
    for module in backbone.modules():
        if isinstance(module, Modulation):  # zero at the start, so that no condition has an effect
            torch.nn.init.normal_(module.linear.weight, std=0.3)
    return backbone
