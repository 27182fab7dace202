"""A small untrained backbone of either conditioning, with its contexts."""

import dataclasses

import pytest
import torch

from ifvit.models.config import FusionUViTConfig
from ifvit.models.uvit import FusionUViT


@pytest.fixture(params=["concat", "cross_attention"])
def backbone(request: pytest.FixtureRequest) -> FusionUViT:
    torch.manual_seed(0)
    config = FusionUViTConfig(
        latent_size=8,
        latent_channels=2,
        patch_size=2,
        width=32,
        depth=4,
        num_heads=2,
        context_length=6,
        context_width=16,
        conditioning=request.param,
        num_image_blocks=1,
        num_text_blocks=1,
        init_std=0.2,
    )
    return FusionUViT(**dataclasses.asdict(config)).eval()
