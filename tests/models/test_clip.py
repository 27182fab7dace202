"""Preprocessing of images and captions for CLIP, and the features of transformers."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ifvit.images import to_model_range
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.clip import load_clip
from ifvit.models.pretrained import resolve_pretrained
from ifvit.models.text_encoders import load_text_encoder


def test_larger_images_are_resized_bicubic_and_normalised_as_clip_was_trained() -> None:
    scorer = load_clip("scenes/clip")
    # Below 255, because PIL also clips between its two passes.
    pixels = np.random.default_rng(0).integers(80, 176, (100, 100, 3), dtype=np.uint8)
    size = (scorer.image_size, scorer.image_size)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) / 255
    folder = resolve_pretrained("scenes/clip")
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    expected = (resized - stored["image_mean"]) / stored["image_std"]
    found = scorer.preprocess(to_model_range(pixels[None]))[0].permute(1, 2, 0)
    two_roundings = 1.2 / 255 / min(stored["image_std"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=two_roundings)


def test_pixels_are_clamped_where_bicubic_weights_overshoot() -> None:
    scorer = load_clip("scenes/clip")
    stripes = (torch.arange(100) // 10 % 2 * 2.0 - 1).expand(1, 3, 100, 100)
    pixels = scorer.preprocess(stripes)
    assert (pixels.amin().item(), pixels.amax().item()) == (-1, 1)  # mean and deviation are 0.5


def test_features_are_those_of_transformers_with_the_folders_normalisation(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(resolve_pretrained("scenes/clip"), folder)
    mean, std = [0.2, 0.4, 0.6], [0.5, 0.3, 0.7]
    normalisation = json.dumps({"image_mean": mean, "image_std": std})
    (folder / "preprocessor_config.json").write_text(normalisation)
    scorer, model = load_clip(str(folder)), CLIPModel.from_pretrained(folder).eval()
    captions, side = ["two red circles", "a blue square"], scorer.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = (images / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    length = model.config.text_config.max_position_embeddings
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=tokens.input_ids, pixel_values=pixels)
        torch.testing.assert_close(scorer.embed_images(images), expected.image_embeds)
        torch.testing.assert_close(scorer.embed_texts(captions), expected.text_embeds)


def test_context_is_the_last_hidden_state_of_the_text_tower() -> None:
    encoder = load_text_encoder("scenes/clip")
    folder = resolve_pretrained("scenes/clip")
    model = CLIPTextModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        ["a blue square", ""],
        padding="max_length",
        max_length=encoder.context_shape[0],
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(input_ids=tokens.input_ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a blue square", ""]), expected)
    torch.testing.assert_close(encoder.null_context(), expected[1])


def test_encoders_are_frozen() -> None:
    models = (load_text_encoder("scenes/clip").model, load_autoencoder("scenes/vae").vae)
    for model in models:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_huge_caption_is_cut_before_it_is_tokenised() -> None:
    encoder = load_text_encoder("scenes/clip")
    start = time.perf_counter()
    assert torch.equal(encoder.encode(["red " * 10**7]), encoder.encode(["red " * 100]))
    assert time.perf_counter() - start < 5


def test_a_caption_that_is_too_long_is_truncated_and_keeps_its_end_token() -> None:
    encoder = load_text_encoder("scenes/clip")
    length = encoder.context_shape[0]
    as_long_as_fits = encoder.encode(["red " * (length - 2)])
    assert torch.equal(encoder.encode(["red " * (2 * length)]), as_long_as_fits)
    assert not torch.equal(encoder.encode(["red " * (length - 3)]), as_long_as_fits)
