"""Held-out scenes, and a run folder whose backbone is untrained but real."""

from dataclasses import dataclass
from pathlib import Path

import torch
from made_backbone import small_shape

from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import WeightsInfo, save_weights
from ifvit.shards.format import EncoderIdentity, Manifest

NUM_IMAGES = 24


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """URL of the shards, what they say of themselves, and the folder of the real images."""

    shards: str
    manifest: Manifest
    images: str


def save_run(
    folder: Path, manifest: Manifest, vae: EncoderIdentity | None = None, step: int = 7
) -> str:
    """A run folder whose weights of `step` are random, for the latents of `manifest`."""
    torch.manual_seed(0)
    channels, size, _ = manifest.latent_shape
    length, width = manifest.text.context_shape
    shape = small_shape(
        latent_size=size,
        latent_channels=channels,
        context_length=length,
        context_width=width,
        init_std=0.2,
    )
    info = WeightsInfo(
        step=step,
        ema_decay=0.999,
        scaling_factor=manifest.scaling_factor,
        vae=vae or manifest.vae,
        text_encoder=manifest.text.encoder,
        recipe_sha256="0" * 64,
    )
    backbone = FusionTransformer(shape)
    save_weights(str(folder / "weights" / f"step_{step:08d}" / "ema"), backbone, info)
    return str(folder)
