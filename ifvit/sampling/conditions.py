"""The frozen encoders a backbone was trained with, opened by name and checked by hash."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

from ifvit.errors import UserError
from ifvit.models.autoencoders import Autoencoder, load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.models.weights import WeightsInfo
from ifvit.shards import EncoderIdentity


def open_autoencoder(info: WeightsInfo, device: str) -> Autoencoder:
    """The VAE of the training latents. Raises UserError if its weights are other ones now."""
    autoencoder = load_autoencoder(info.vae.name, device)
    check_identity("vae", autoencoder.identity, info.vae)
    return autoencoder


def open_text_encoder(info: WeightsInfo, device: str) -> TextEncoder:
    """The encoder of the training captions.

    Raises UserError if its weights are other ones now, or if the backbone was trained on classes.
    """
    trained_with = require_text_encoder(info)
    encoder = load_text_encoder(trained_with.name, device)
    check_identity("text encoder", encoder.identity, trained_with)
    return encoder


def require_text_encoder(info: WeightsInfo) -> EncoderIdentity:
    """Who encoded the training captions. Raises UserError for weights that draw classes."""
    if info.text_encoder is None:
        raise UserError(
            f"the weights draw {len(info.classes)} classes; methods and texts need captions"
        )
    return info.text_encoder


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How prompts become what a backbone takes."""

    encode: Callable[[list[str]], Tensor]
    """B captions => contexts (B, M, D), or B names or numbers of classes => numbers (B,)."""
    null: Tensor
    """One row that stands for no prompt, (M, D) or ()."""


def open_conditions(info: WeightsInfo, device: str) -> Conditions:
    """The encoder of captions or classes, whichever the backbone was trained on."""
    if info.text_encoder is None:
        return number_conditions(info.classes)
    encoder = open_text_encoder(info, device)
    return Conditions(encode=encoder.encode, null=encoder.null_context())


def number_conditions(classes: tuple[str, ...]) -> Conditions:
    """Class numbers; the number behind the last one stands for no class."""
    return Conditions(encode=partial(number_classes, classes), null=torch.tensor(len(classes)))


def number_classes(classes: tuple[str, ...], names: list[str]) -> Tensor:
    """Numbers (B,) of classes given by name or number. Raises UserError for an unknown one."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        close = get_close_matches(unknown[0], classes) or classes[:3]
        raise UserError(
            f"class {unknown[0]} is none of the {len(classes)}, such as {', '.join(close)}; "
            f"give one of those or a number below {len(classes)}"
        )
    return torch.tensor([numbers[name] for name in names])


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
