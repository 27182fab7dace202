"""The frozen encoders a backbone was trained with, opened by name and checked by hash."""

import hashlib

import torch
from torch import nn

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.autoencoder import Autoencoder, load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.models.weights import WeightsInfo
from ifvit.shards import EncoderIdentity


def open_autoencoder(info: WeightsInfo, device: str) -> Autoencoder:
    """The VAE of the training latents. Raises UserError if its weights are other ones now."""
    autoencoder = load_autoencoder(info.vae.name, device)
    check_identity("vae", autoencoder.identity, info.vae)
    return autoencoder


def open_text_encoder(info: WeightsInfo, device: str) -> TextEncoder:
    """The encoder of the training captions. Raises UserError if its weights are other ones now."""
    encoder = load_text_encoder(info.text_encoder.name, device)
    check_identity("text encoder", encoder.identity, info.text_encoder)
    return encoder


def check_identity(role: str, found: EncoderIdentity, trained_with: EncoderIdentity) -> None:
    """Raise UserError unless `found` has the weights that the backbone was trained with."""
    if found.sha256 != trained_with.sha256:
        raise UserError(
            f"{role} {found.name} has sha256 {found.sha256[:12]}…, but the weights were trained "
            f"with {trained_with.name} {trained_with.sha256[:12]}…; use that one"
        )


def weights_sha256(backbone: nn.Module) -> str:
    """Hash of parameter names and values: the same wherever and in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_device(device: str) -> str:
    """`auto` => this process's GPU when there is one, cpu otherwise.

    Raises UserError for an absent GPU.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{World.from_environment().local_rank % torch.cuda.device_count()}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no GPU here; use cpu or auto")
    return device
