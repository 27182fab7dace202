"""Drawing submits work and never waits for a result: on a GPU that would leave it idle.

The meta device has no values, so that reading one raises, as most operations do that meet a tensor
of the CPU there.
"""

from dataclasses import replace

import pytest
import torch

from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedNoisePredictor
from ifvit.diffusion.solvers import solve
from ifvit.models.config import PRESETS, Conditioning
from ifvit.models.weights import build_backbone


def draw(guidance: Guidance, conditioning: Conditioning = "concat") -> torch.Tensor:
    """Four steps of the smallest backbone with the default solver, all on the meta device."""
    shape = replace(PRESETS["tiny"], conditioning=conditioning)
    with torch.device("meta"):
        backbone = build_backbone(shape).eval()
        contexts = torch.empty(2, *shape.context_shape)
        noise = torch.empty(2, shape.latent_channels, shape.latent_size, shape.latent_size)
    with torch.no_grad():
        null = backbone.encode_condition(contexts[:1])
        denoiser = GuidedNoisePredictor(backbone, contexts, null, guidance)
    return solve(denoiser, noise, "dpm_solver_pp", num_steps=4)


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention", "adaln"])
def test_guided_steps_wait_for_nothing(conditioning: Conditioning) -> None:
    assert draw(Guidance(scale=2.0), conditioning).is_meta


def test_unguided_steps_wait_for_nothing() -> None:
    assert draw(Guidance(scale=1.0, low=100.0)).is_meta


def test_an_interval_of_guidance_looks_at_the_time() -> None:
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        draw(Guidance(scale=2.0, low=100.0))
