"""Frozen autoencoders: pixels <=> latents (B batch, C latent channels, H, W image, h, w latents).

Loaded are diffusers' AutoencoderKL (Rombach et al. 2022), whose posteriors are stored as moments,
and AutoencoderDC (Chen et al. 2024), which is deterministic.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.pretrained import identify, load_frozen, read_safe_config, resolve_pretrained
from ifvit.records import shorten
from ifvit.shards.format import EncoderIdentity

_CLASSES = ("AutoencoderKL", "AutoencoderDC")
"""Classes of diffusers that are loaded."""


class Autoencoder:
    """A frozen autoencoder of diffusers."""

    def __init__(self, vae: Any, identity: EncoderIdentity) -> None:
        self.vae = vae
        self.identity = identity
        self.deterministic = type(vae).__name__ == "AutoencoderDC"
        """Whether an image has one latent instead of a posterior."""

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of a square image.

        Raises UserError if the VAE's downsampling factor does not divide `image_size`.
        """
        factor = spatial_factor(self.vae)
        if image_size % factor:
            raise UserError(
                f"image_size must be a multiple of {factor}, the VAE's factor: {image_size}"
            )
        side = image_size // factor
        return (self.vae.config.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => unscaled moments (B, 2C, h, w), mean then logvar.

        A deterministic autoencoder gives latents (B, C, h, w) instead.
        """
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        moments: Tensor = encoded.latent if self.deterministic else encoded.latent_dist.parameters
        return moments.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) => images (B, 3, H, W), nominally in [-1, 1].

        They are not clamped, so that every pixel keeps its gradient.
        """
        images: Tensor = self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample
        return images.float()


def spatial_factor(vae: Any) -> int:
    """Image pixels per latent pixel and axis."""
    ratio = getattr(vae, "spatial_compression_ratio", None)  # of an AutoencoderDC
    return int(ratio or 2 ** (len(vae.config.block_out_channels) - 1))


def load_autoencoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load the VAE `name`: a hub name, a local folder, or scenes/vae (see resolve_pretrained).

    Raises UserError for a folder that does not hold a whole AutoencoderKL or AutoencoderDC.
    """
    folder = resolve_pretrained(name, "--vae")
    vae = load_vae(folder, dtype)
    if vae._supports_gradient_checkpointing:
        # DATE differentiates through the decoder, whose activations are then most of the memory.
        vae.enable_gradient_checkpointing()
    return Autoencoder(vae.to(device), identify(name, folder))


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    """Load the frozen autoencoder of a folder, of the class that config.json names."""
    import diffusers  # takes a second, which training without a grid saves

    settings = read_safe_config(folder)
    named = settings.get("_class_name", "AutoencoderKL")
    if named not in _CLASSES:
        raise UserError(
            f"{folder}/config.json: _class_name is {shorten(named)}; expected "
            f"{' or '.join(_CLASSES)}"
        )
    autoencoder_class = getattr(diffusers, named)
    return load_frozen(
        f"an {named}",
        folder,
        lambda: autoencoder_class.from_config(settings),
        lambda: autoencoder_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        ),
    )
