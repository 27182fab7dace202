"""Autoencoders of today: the class that config.json names, its shapes, and its gradient."""

import json
from pathlib import Path

import pytest
import torch
from made_autoencoders import KINDS, make_autoencoder, save_autoencoder

from ifvit.errors import UserError
from ifvit.models.autoencoders import load_autoencoder

SHAPES = {"kl4": (4, 8, 8), "kl16": (16, 8, 8), "kl32": (32, 8, 8), "dc": (32, 2, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_equal_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    autoencoder = load_autoencoder(save_autoencoder(kind, tmp_path / "vae"))
    plain = make_autoencoder(kind).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        encoded = plain.encode(images)
        expected = encoded.latent if kind == "dc" else encoded.latent_dist.parameters
        latents = expected[:, : SHAPES[kind][0]]
        decoded = plain.decode(latents).sample
    moments = autoencoder.encode(images)
    assert autoencoder.latent_shape(64) == SHAPES[kind]
    assert autoencoder.deterministic == (kind == "dc") == (moments.shape[1] == SHAPES[kind][0])
    torch.testing.assert_close(moments, expected)
    torch.testing.assert_close(autoencoder.decode(latents), decoded)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_has_a_gradient(kind: str, tmp_path: Path) -> None:
    autoencoder = load_autoencoder(save_autoencoder(kind, tmp_path / "vae"))
    latents = torch.randn(1, *autoencoder.latent_shape(64), requires_grad=True)
    autoencoder.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "factor"), [("kl16", 8), ("dc", 32)])
def test_an_image_size_that_does_not_fit_names_the_factor_of_the_model(
    kind: str, factor: int, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(save_autoencoder(kind, tmp_path / "vae"))
    with pytest.raises(UserError, match=rf"multiple of {factor}, .*: 100"):
        autoencoder.latent_shape(100)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("_class_name", "AutoencoderKLFlux2", "expected AutoencoderKL or AutoencoderDC"),
        ("_class_name", ["os", "system"], "expected AutoencoderKL or AutoencoderDC"),
        ("_class_name", "AutoencoderKL", "describes"),
        ("encoder_layers_per_block", [10**9] * 6, "encoder_layers_per_block"),
        ("encoder_layers_per_block", [1], "lack"),
        ("decoder_layers_per_block", [60] * 6, "describes"),
        ("decoder_qkv_multiscales", [[60001]] * 6, "parameters"),
        ("encoder_block_types", "os.system", "AutoencoderDC"),
        ("decoder_norm_types", "os.system", "AutoencoderDC"),
        ("latent_channels", 10**30, "AutoencoderDC"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantization_config"),
    ],
)
def test_a_configuration_of_an_impossible_dc_is_one_line(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    path = Path(save_autoencoder("dc", tmp_path / "vae"), "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=words) as error:
        load_autoencoder(str(path.parent))
    assert str(path.parent) in str(error.value)
    assert "\n" not in str(error.value)
