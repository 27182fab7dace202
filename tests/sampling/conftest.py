"""Untrained weights that fit the shipped encoders, and a small backbone of either mechanism."""

import pytest
import torch
from made_backbone import small_shape
from untrained import save_untrained

from ifvit.models.fusion_transformer import FusionTransformer


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of weights for captions and 64 x 64 pixels."""
    return save_untrained(tmp_path_factory.mktemp("weights"))


@pytest.fixture(params=["concat", "cross_attention"])
def backbone(request: pytest.FixtureRequest) -> FusionTransformer:
    """Latents 2 x 8 x 8, context 6 x 16."""
    torch.manual_seed(0)
    config = small_shape(latent_channels=2, conditioning=request.param, init_std=0.2)
    return FusionTransformer(config).eval()
