"""CLIP's own preparation of images and captions, which its scores depend on."""

import json

import numpy as np
import torch
from PIL import Image

from ifvit.images import to_model_range
from ifvit.models.clip import load_clip, load_text_encoder
from ifvit.models.pretrained import resolve_pretrained


def test_larger_images_are_resized_bicubic_and_normalised_as_clip_was_trained() -> None:
    scorer = load_clip("scenes/clip")
    # Not up to 255: PIL also clips between its two passes.
    pixels = np.random.default_rng(0).integers(80, 176, (100, 100, 3), dtype=np.uint8)
    size = (scorer.image_size, scorer.image_size)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) / 255
    folder = resolve_pretrained("scenes/clip")
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    expected = (resized - stored["image_mean"]) / stored["image_std"]
    found = scorer._pixels(to_model_range(pixels[None]))[0].permute(1, 2, 0)
    two_roundings = 1.2 / 255 / min(stored["image_std"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=two_roundings)


def test_a_caption_that_is_too_long_is_cut_before_its_end_token() -> None:
    encoder = load_text_encoder("scenes/clip")
    length = encoder.context_shape[0]
    as_long_as_fits = encoder.encode(["red " * (length - 2)])
    assert torch.equal(encoder.encode(["red " * (2 * length)]), as_long_as_fits)
    assert not torch.equal(encoder.encode(["red " * (length - 3)]), as_long_as_fits)
