"""Pictures while training: of the averaged weights, of the same captions from the same noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.images import decode_png, make_grid
from ifvit.models.weights import load_weights
from ifvit.sampling.config import SamplingConfig
from ifvit.shards import ShardReader
from ifvit.training import hooks
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.train import train


def decode(latents: Tensor) -> Tensor:
    """Three of four latent channels are the picture."""
    return latents[:, :3] / 0.5


def test_the_grid_shows_what_the_averaged_weights_draw(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "load_decoder", lambda info, device: decode)
    grid = SampleGridConfig(every=4, num_steps=3, guidance_scale=2.5)
    config = recipe(sample_grid=grid, checkpoint_every=4, scaling_factor=0.5)
    train(config)
    reader = ShardReader(config.shards)
    contexts = torch.from_numpy(np.stack([reader.context(i, 0) for i in range(16)]))
    sampling = SamplingConfig(num_steps=3, guidance_scale=2.5)
    pictures = []
    for step in (4, 8):
        backbone, _ = load_weights(f"{config.run}/weights/step_{step:08d}/ema")
        sampler = Sampler(
            backbone=backbone,
            decode=decode,
            null_condition=torch.from_numpy(np.array(reader.null_context)),
        )
        batch = ConditionBatch(positions=torch.arange(16), condition=contexts)
        drawn = generate_images(sampler, [batch], sampling)
        expected = np.asarray(make_grid(np.concatenate(list(drawn)), 8))
        found = decode_png(Path(config.run, "samples", f"step_{step:08d}.png").read_bytes())
        np.testing.assert_array_equal(found, expected)
        pictures.append(found)
    assert (pictures[0] != pictures[1]).any()
