"""Untrained weights that fit the shipped encoders, and a small backbone of every mechanism."""

import pytest
import torch
from made_backbone import small_shape
from untrained import save_untrained

from ifvit.models.fusion_transformer import FusionTransformer


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of weights for captions and 64 x 64 pixels."""
    return save_untrained(tmp_path_factory.mktemp("weights"))


@pytest.fixture(params=["concat", "cross_attention", "separate_cross_attention", "dual_stream"])
def backbone(request: pytest.FixtureRequest) -> FusionTransformer:
    """Latents 2 x 8 x 8, context 6 x 16; text has an effect in the middle three blocks."""
    torch.manual_seed(0)
    shape = small_shape(latent_channels=2, fusion=f"image 3*{request.param} image", num_registers=2)
    backbone = FusionTransformer(shape).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone
