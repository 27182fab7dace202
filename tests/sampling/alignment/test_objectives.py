"""The scores that DATE raises, on real scenes and the shipped CLIP."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ifvit.images import to_model_range
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.sampling.alignment import clip_score_of, weighted_sum
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene

SCENES = [render_sampled_scene(5, number) for number in range(4)]
CAPTIONS = [write_captions(drawn.scene)[0] for drawn in SCENES]
IMAGES = to_model_range(np.stack([drawn.image for drawn in SCENES]))


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return load_clip("scenes/clip")


def test_the_clip_score_is_the_cosine_and_knows_its_caption(scorer: ClipScorer) -> None:
    scores = clip_score_of(scorer)(IMAGES, CAPTIONS)
    expected = (scorer.embed_images(IMAGES) * scorer.embed_texts(CAPTIONS)).sum(dim=1)
    torch.testing.assert_close(scores, expected)
    assert (scores > clip_score_of(scorer)(IMAGES, CAPTIONS[::-1])).all()


def test_images_of_another_size_are_resized_as_by_date(scorer: ClipScorer) -> None:
    small = IMAGES[..., ::2, ::2]
    resized = functional.interpolate(small, IMAGES.shape[2:], mode="bilinear")
    score = clip_score_of(scorer)
    torch.testing.assert_close(score(small, CAPTIONS), score(resized, CAPTIONS))


@pytest.mark.parametrize("size", [64, 32])
def test_every_pixel_has_a_gradient_beyond_white_and_at_any_size(
    scorer: ClipScorer, size: int
) -> None:
    images = torch.full((4, 3, size, size), 1.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_score_of(scorer)(images, CAPTIONS).sum(), images)
    assert (gradient.abs().sum(dim=1) > 0).float().mean() > 0.99


def test_a_weighted_sum_is_one(scorer: ClipScorer) -> None:
    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) + len(prompts)

    both = weighted_sum([(2.0, clip_score_of(scorer)), (-0.5, brightness)])(IMAGES, CAPTIONS)
    expected = 2 * clip_score_of(scorer)(IMAGES, CAPTIONS) - 0.5 * brightness(IMAGES, CAPTIONS)
    torch.testing.assert_close(both, expected)
