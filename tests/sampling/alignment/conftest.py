"""A small untrained backbone of either conditioning, with its contexts."""

import pytest
import torch
from made_backbone import small_shape

from ifvit.models.fusion_transformer import FusionUViT


@pytest.fixture(params=["concat", "cross_attention"])
def backbone(request: pytest.FixtureRequest) -> FusionUViT:
    torch.manual_seed(0)
    config = small_shape(latent_channels=2, conditioning=request.param, init_std=0.2)
    return FusionUViT(config).eval()
