"""The backbone that docs/sampling.md shows, taken from there, in the pipeline."""

import re
from pathlib import Path

import numpy as np
import pytest

from ifvit.diffusion.solvers import SOLVERS
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.clip import load_text_encoder
from ifvit.sampling.pipeline import FusionPipeline

DOCS = Path(__file__).parents[2] / "docs" / "sampling.md"


@pytest.fixture(scope="module")
def pipeline() -> FusionPipeline:
    names: dict[str, object] = {"__name__": "docs"}
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        if "class UNetBackbone" in block
    )  # fmt: skip
    exec(code, names)
    encoder = load_text_encoder("scenes/clip")
    pipeline = FusionPipeline(
        backbone=names["UNetBackbone"](),  # type: ignore[operator]
        vae=load_autoencoder("scenes/vae").vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        scheduler=SOLVERS["dpm_solver_pp"](),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_backbone_of_ones_own_draws(pipeline: FusionPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "np"}
    images = pipeline(["two red circles", "a blue square"], **options).images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
