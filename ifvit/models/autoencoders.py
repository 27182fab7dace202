"""Frozen autoencoders: pixels <=> latents (B batch, C latent channels, H, W image, h, w latents).

Loaded are diffusers' AutoencoderKL (Rombach et al. 2022), whose posteriors are stored as moments,
and AutoencoderDC (Chen et al. 2024), which is deterministic.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.config import NumBlocks, Size
from ifvit.models.pretrained import identify, load_frozen, read_model_config, resolve_pretrained
from ifvit.records import PlainName, PositiveFloat, Rule, parse_json, record, shorten
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import read_bytes

Blocks = Rule("1 to 16 entries", lambda values: 1 <= len(values) <= 16)
Widths = Annotated[tuple[Size, ...], Blocks]
Types = Annotated[tuple[PlainName, ...], Blocks]
PerStage = Annotated[tuple[NumBlocks, ...], Blocks]
Kernels = Annotated[tuple[tuple[Size, ...], ...], Blocks]


@record
class AutoencoderKLConfig:
    """The keys of an AutoencoderKL's config.json; the defaults are those of diffusers."""

    in_channels: Size = 3
    out_channels: Size = 3
    down_block_types: Types = ("DownEncoderBlock2D",)
    up_block_types: Types = ("UpDecoderBlock2D",)
    block_out_channels: Widths = (64,)
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
        _require_equal_lengths(self, "block_out_channels", "down_block_types", "up_block_types")


@record
class AutoencoderDCConfig:
    """The keys of an AutoencoderDC's config.json; the defaults are those of diffusers."""

    in_channels: Size = 3
    latent_channels: Size = 32
    attention_head_dim: Size = 32
    encoder_block_types: PlainName | Types = "ResBlock"
    decoder_block_types: PlainName | Types = "ResBlock"
    encoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: PerStage = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: PerStage = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: Kernels = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: Kernels = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: PlainName = "pixel_shuffle"
    downsample_block_type: PlainName = "pixel_unshuffle"
    decoder_norm_types: PlainName | Types = "rms_norm"
    decoder_act_fns: PlainName | Types = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: PlainName = "relu"
    scaling_factor: PositiveFloat = 1.0
    quantization_config: None = None

    def __post_init__(self) -> None:
        """Raise UserError unless encoder and decoder have the same stages."""
        parts = ("block_out_channels", "layers_per_block", "qkv_multiscales")
        sides = ("encoder", "decoder")
        _require_equal_lengths(self, *(f"{side}_{part}" for part in parts for side in sides))


def _require_equal_lengths(config: object, *keys: str) -> None:
    if len({len(getattr(config, key)) for key in keys}) > 1:
        raise UserError(f"{', '.join(keys)} differ in length")


_CONFIGS: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKLConfig,
    "AutoencoderDC": AutoencoderDCConfig,
}
"""Classes of diffusers that are loaded, and the keys of their config.json that are safe to use."""


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

    path = str(folder / "config.json")
    named = parse_json(dict[str, Any], read_bytes(path), path).get("_class_name", "AutoencoderKL")
    if not isinstance(named, str) or named not in _CONFIGS:
        raise UserError(
            f"{path}: _class_name is {shorten(named)}; expected {' or '.join(_CONFIGS)}"
        )
    autoencoder_class = getattr(diffusers, named)
    settings = asdict(read_model_config(_CONFIGS[named], folder))
    del settings["quantization_config"]
    return load_frozen(
        f"an {named}",
        folder,
        lambda: autoencoder_class(**settings),
        lambda: autoencoder_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        ),
    )
