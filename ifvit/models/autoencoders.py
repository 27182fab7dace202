"""The frozen VAE: pixels <=> latents (B batch, C latent channels, H, W image, h, w latents)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.shards.format import EncoderIdentity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Autoencoder:
    """A frozen KL autoencoder (Rombach et al. 2022)."""

    def __init__(self, vae: "AutoencoderKL", identity: EncoderIdentity) -> None:
        self.vae: Any = vae  # diffusers' types do not hold
        self.identity = identity

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of a square image.

        Raises UserError if the VAE's downsampling factor does not divide `image_size`.
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(
                f"image_size must be a multiple of {factor}, the VAE's factor: {image_size}"
            )
        side = image_size // factor
        return (self.vae.config.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => unscaled moments (B, 2C, h, w), mean then logvar."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        moments: Tensor = posterior.parameters.float()
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) => images (B, 3, H, W) in [-1, 1]."""
        return self.decode_unclamped(latents).clamp(-1.0, 1.0)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """Decode without clamping to [-1, 1], so that every pixel keeps its gradient."""
        decoded = self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample
        images: Tensor = decoded.float()
        return images


def load_autoencoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load the VAE `name`: a hub name, a local folder, or scenes/vae (see resolve_pretrained)."""
    from diffusers import AutoencoderKL  # takes a second, which training without a grid saves

    folder = resolve_pretrained(name)
    identity = identify(name, folder)
    vae: Any = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
        folder, torch_dtype=dtype, use_safetensors=True
    )
    vae.requires_grad_(False)
    # DATE differentiates through the decoder, whose activations are then most of the memory.
    vae.enable_gradient_checkpointing()
    return Autoencoder(vae.to(device).eval(), identity)
