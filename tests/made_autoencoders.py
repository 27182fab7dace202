"""Small random autoencoders of every class that ifvit loads, in Hugging Face layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL

KINDS = ("kl4", "kl16", "kl32", "dc")
"""AutoencoderKL with 4, 16 and 32 channels (f8), and AutoencoderDC with 32 channels (f32)."""


def make_autoencoder(kind: str, seed: int = 0) -> Any:
    """Build the autoencoder with random weights, which are a function of kind and seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _dc() if kind == "dc" else _kl(int(kind.removeprefix("kl")))


def save_autoencoder(kind: str, folder: Path, seed: int = 0) -> str:
    """Write config.json and safetensors into a folder, and return its path."""
    make_autoencoder(kind, seed).save_pretrained(folder)
    return str(folder)


def _kl(channels: int) -> AutoencoderKL:
    """Like those of Stable Diffusion with 4 channels, of Flux.1 and SD3 without quant convs."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        **({} if channels == 4 else {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
    )


def _dc() -> AutoencoderDC:
    """Like DC-AE f32c32: no layers at the finest resolution, attention at the coarsest."""
    widths = (8, 8, 16, 16, 32, 32)
    multiscales = ((), (), (), (), (), (5,))
    blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    return AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
        decoder_act_fns=("relu",) * 3 + ("silu",) * 3,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
