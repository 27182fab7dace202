"""The perceptual distance: its axioms, its formula, and that it sees what people see."""

import numpy as np
import torch
from torch import Tensor

from ifvit.evaluation.metrics import perceptual_distances
from ifvit.models.clip import load_clip
from ifvit.scenes.drawings import render_sampled_scene


def test_it_is_its_formula() -> None:
    def two_layers(images: Tensor) -> list[Tensor]:
        tokens = images.flatten(2).transpose(1, 2)
        return [tokens, tokens[:, :2] ** 2]

    first, second = np.random.default_rng(0).integers(1, 255, (2, 3, 2, 2, 3), dtype=np.uint8)
    expected = []
    for one, other in zip(first, second, strict=True):
        layers = []
        for power, count in ((1, 4), (2, 2)):
            a, b = ((image.reshape(4, 3)[:count] / 127.5 - 1.0) ** power for image in (one, other))
            a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
            layers.append(np.square(a - b).sum(axis=1).mean())
        expected.append(np.mean(layers))
    np.testing.assert_allclose(
        perceptual_distances(two_layers, [(first, second)], "cpu"), expected, rtol=1e-5
    )


def test_clip_finds_equal_images_equal_and_other_scenes_far() -> None:
    scorer = load_clip("scenes/clip")
    scenes = np.stack([render_sampled_scene(seed=0, image_id=n).image for n in range(8)])
    noisy = np.clip(scenes + np.random.default_rng(9).integers(-6, 7, scenes.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    same, near, far = (
        perceptual_distances(scorer.embed_patches, [(scenes, other)], "cpu")
        for other in (scenes, noisy, np.roll(scenes, 1, axis=0))
    )
    assert (same == 0).all()
    assert near.mean() < far.mean() / 2
    assert torch.isfinite(torch.from_numpy(far)).all()
