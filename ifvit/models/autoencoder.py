"""The frozen VAE: pixels <=> latents (B batch, C latent channels, H, W image, h, w latent)."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.shards import EncoderIdentity


class Autoencoder:
    """A KL autoencoder (Rombach et al. 2022) that is only ever evaluated."""

    def __init__(self, vae: AutoencoderKL, identity: EncoderIdentity) -> None:
        self._vae: Any = vae  # diffusers' types do not hold
        self.identity = identity

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image.

        Raises UserError when the VAE's downsampling does not divide `image_size`.
        """
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(f"image_size {image_size} is not a multiple of the VAE's {factor}")
        side = image_size // factor
        return (self._vae.config.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => moments (B, 2C, h, w): mean and logvar, unscaled."""
        posterior = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist
        moments: Tensor = posterior.parameters.float()
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) => images (B, 3, H, W) in [-1, 1]; keeps gradients."""
        decoded = self._vae.decode(latents.to(self._vae.device, self._vae.dtype)).sample
        images: Tensor = decoded.float().clamp(-1.0, 1.0)
        return images


def load_autoencoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Open `stabilityai/sd-vae-ft-ema`, a local folder or `scenes/vae`; all by the same code."""
    folder = resolve_pretrained(name)
    identity = identify(name, folder)
    vae: Any = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
        folder, torch_dtype=dtype, use_safetensors=True
    )
    vae.requires_grad_(False)
    return Autoencoder(vae.to(device).eval(), identity)
