"""An untrained backbone that fits the shipped encoders, saved as a run saves its weights."""

import dataclasses
from pathlib import Path

import torch

from ifvit.diffusion.config import Prediction
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.config import TextOptions
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.presets import PRESETS
from ifvit.models.text_encoders import load_text_encoder
from ifvit.models.weights import WeightsInfo, save_weights


def save_untrained(
    folder: Path,
    vae: str = "scenes/vae",
    clip: str = "scenes/clip",
    prediction: Prediction = "epsilon",
    shift: float = 1.0,
    text: TextOptions | None = None,
) -> str:
    """Weights for 64 x 64 pixels of the named encoders."""
    encoder, autoencoder = load_text_encoder(clip, options=text), load_autoencoder(vae)
    channels, size, _ = autoencoder.latent_shape(64)
    length, width = encoder.context_shape
    shape = dataclasses.replace(
        PRESETS["tiny"], latent_size=size, latent_channels=channels, width=32, num_heads=2,
        fusion="image 3*cross_attention image", context_length=length, context_width=width,
    )  # fmt: skip
    info = WeightsInfo(
        step=3,
        ema_decay=None,
        scaling_factor=0.5,
        vae=autoencoder.identity,
        text_encoder=encoder.identity,
        recipe_sha256="0" * 64,
        prediction=prediction,
        shift=shift,
    )
    torch.manual_seed(0)
    save_weights(str(folder), FusionTransformer(shape), info)
    return str(folder)
