"""The shipped VAE and CLIP reach their quality on scenes outside their training set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

import ifvit.scenes
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.clip import load_clip
from ifvit.models.text_encoders import load_text_encoder
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene
from ifvit.scenes.score import score_image

ENCODERS = Path(ifvit.scenes.__file__).parent / "encoders"
RENDERED = [render_sampled_scene(seed=41, image_id=number) for number in range(96)]


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return load_autoencoder("scenes/vae")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([rendered.image for rendered in RENDERED])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def decoded(vae: Autoencoder, images: Tensor) -> Tensor:
    with torch.no_grad():
        mean, _ = vae.encode(images).chunk(2, dim=1)
        return vae.decode(mean).clamp(-1, 1)


def test_plain_library_calls_open_them() -> None:
    AutoencoderKL.from_pretrained(ENCODERS / "vae")
    CLIPModel.from_pretrained(ENCODERS / "clip")
    CLIPTokenizer.from_pretrained(ENCODERS / "clip")


def test_weights_take_at_most_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in ENCODERS.rglob("*.safetensors")) <= 4_000_000


def test_latents_are_eight_times_smaller(vae: Autoencoder) -> None:
    assert vae.latent_shape(64) == (4, 8, 8)


def test_reconstruction_reaches_26_db(images: Tensor, decoded: Tensor) -> None:
    psnr = 10 * torch.log10(4 / functional.mse_loss(decoded, images))
    assert psnr >= 26


def test_reconstructions_are_scored_like_the_originals(decoded: Tensor) -> None:
    pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    scores = [
        score_image(image, rendered.scene) for image, rendered in zip(pixels, RENDERED, strict=True)
    ]
    for name in ("count", "colour", "kind", "relation"):
        values = [getattr(score, name) for score in scores if getattr(score, name) is not None]
        assert sum(values) / len(values) >= 0.95, name


def test_every_word_of_the_captions_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "clip")
    length = load_text_encoder("scenes/clip").context_shape[0]
    for rendered in RENDERED:
        for caption in write_captions(rendered.scene):
            tokens = tokenizer(caption).input_ids
            assert len(tokens) == len(caption.split()) + 2 <= length
            assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption


@pytest.mark.parametrize("source", ["images", "decoded"])
def test_retrieval_among_16_captions_reaches_90_percent(
    source: str, request: pytest.FixtureRequest
) -> None:
    clip = load_clip("scenes/clip")
    rng = np.random.default_rng(0)
    with torch.no_grad():
        image_features = clip.embed_images(request.getfixturevalue(source))
    captions = [
        write_captions(rendered.scene)[index % 5] for index, rendered in enumerate(RENDERED)
    ]
    similarity = image_features @ clip.embed_texts(captions).T
    num_right = 0
    for index, rendered in enumerate(RENDERED):
        others = [i for i, other in enumerate(RENDERED) if other.scene != rendered.scene]
        rivals = rng.choice(others, 15, replace=False)
        num_right += int(similarity[index, index] > similarity[index, rivals].max())
    assert num_right / len(RENDERED) >= 0.9


def test_provenance_says_how_they_were_made() -> None:
    record = json.loads((ENCODERS / "provenance.json").read_text())
    assert record["reconstruction_psnr_db"] >= 26
    assert record["retrieval_accuracy"] >= 0.9
    assert record["seed"] == 0
    assert record["command"].startswith("python tools/train_scene_encoders.py")
