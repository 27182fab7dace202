"""What `ifvit import` may be told; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a run of the weights of U-ViT or its fusion fork, to draw with and to measure."""

    file: str
    """State dict of the backbone as those code bases save it, .pth or .safetensors, or a URL."""
    run: str
    """Folder or s3:// prefix of the run."""
    step: int = 1_000_000
    """Optimiser steps behind the weights."""
    ema_decay: float | None = 0.9999
    """Decay of the average that they are; null for raw weights."""
    scaling_factor: float = 0.23010
    """Autoencoder latents times this are what they were trained on."""
    vae: str = "CompVis/stable-diffusion-v1-4/vae"
    """The autoencoder they were trained with: hub name, local folder, or scenes/vae."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """The text encoder they were trained with: hub name, local folder, or scenes/clip."""
    num_heads: int | None = None
    """Attention heads, which no tensor shows; unset: of 64 channels, as in all published ones."""
