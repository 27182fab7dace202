"""The frozen VAE: pixels <=> latents (B batch, C latent channels, H, W image, h, w latents)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.config import NumBlocks, Size
from ifvit.models.pretrained import identify, load_frozen, read_model_config, resolve_pretrained
from ifvit.records import PlainName, PositiveFloat, Rule, record
from ifvit.shards.format import EncoderIdentity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Blocks = Rule("1 to 16 entries", lambda values: 1 <= len(values) <= 16)


@record
class AutoencoderConfig:
    """The keys of an AutoencoderKL's config.json; the defaults are those of diffusers."""

    in_channels: Size = 3
    out_channels: Size = 3
    down_block_types: Annotated[tuple[PlainName, ...], Blocks] = ("DownEncoderBlock2D",)
    up_block_types: Annotated[tuple[PlainName, ...], Blocks] = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[Size, ...], Blocks] = (64,)
    layers_per_block: NumBlocks = 1
    act_fn: PlainName = "silu"
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    sample_size: Size | tuple[Size, ...] = 32
    scaling_factor: PositiveFloat = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[PositiveFloat, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    quantization_config: None = None

    def __post_init__(self) -> None:
        """Raise UserError unless all resolutions have their blocks."""
        blocks = (self.block_out_channels, self.down_block_types, self.up_block_types)
        if len(set(map(len, blocks))) > 1:
            raise UserError(
                "block_out_channels, down_block_types and up_block_types differ in length"
            )


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
        """Unscaled latents (B, C, h, w) => images (B, 3, H, W), nominally in [-1, 1].

        They are not clamped, so that every pixel keeps its gradient.
        """
        images: Tensor = self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample
        return images.float()


def load_autoencoder(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load the VAE `name`: a hub name, a local folder, or scenes/vae (see resolve_pretrained).

    Raises UserError for a folder that does not hold a whole AutoencoderKL.
    """
    folder = resolve_pretrained(name, "--vae")
    vae = load_vae(folder, dtype)
    # DATE differentiates through the decoder, whose activations are then most of the memory.
    vae.enable_gradient_checkpointing()
    return Autoencoder(vae.to(device), identify(name, folder))


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    """Load the frozen AutoencoderKL of a folder."""
    from diffusers import AutoencoderKL  # takes a second, which training without a grid saves

    settings = asdict(read_model_config(AutoencoderConfig, folder))
    del settings["quantization_config"]
    return load_frozen(
        "an AutoencoderKL",
        folder,
        lambda: AutoencoderKL(**settings),  # type: ignore[no-untyped-call]
        lambda: AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        ),
    )
