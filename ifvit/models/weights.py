"""Backbones with fresh weights, and the weights/ folders that everybody but the trainer loads.

A folder has config.json and diffusion_pytorch_model.safetensors, which diffusers reads, and
weights.json, which holds the provenance of the weights and the sha256 of their file. weights.json
is written last and thus marks a complete folder.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import (
    BackboneConfig,
    FusionUViTConfig,
    TokenTransformerConfig,
    restore_config,
)
from ifvit.models.fusion_transformer import FusionUViT, TokenTransformer
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import (
    exists,
    join,
    list_names,
    local_copy,
    read_json,
    sha256_of,
    upload,
    write_json,
)

Kind = Literal["ema", "raw"]

_CONFIG = "config.json"
_TENSORS = "diffusion_pytorch_model.safetensors"
_INFO = "weights.json"
_DIGEST = "tensors_sha256"


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Provenance of weights: what sampling and evaluation must know about their training."""

    step: int
    """Optimizer steps that the weights were trained for."""
    ema_decay: float | None
    """Decay of the EMA weights; None for raw weights."""
    scaling_factor: float
    """Factor by which the autoencoder's latents were multiplied in training."""
    vae: EncoderIdentity
    """The autoencoder whose latents the backbone was trained on."""
    text_encoder: EncoderIdentity | None
    """The text encoder whose context the backbone was trained on; None for classes."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by number."""
    recipe_sha256: str
    """Hash of the recipe that trained it."""


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build a backbone with fresh weights, drawn from torch's global generator."""
    if isinstance(config, FusionUViTConfig):
        return FusionUViT(config)
    if isinstance(config, TokenTransformerConfig):
        return TokenTransformer(config)
    from ifvit.models.unet import UNet  # the import of diffusers' U-Nets takes a second

    return UNet(config)


def restore_backbone(config: BackboneConfig, state_dict: Mapping[str, Tensor]) -> Backbone:
    """Build a float32 backbone in eval mode with a copy of `state_dict` as its weights.

    Raises RuntimeError if keys or shapes differ from those of `config`.
    """
    with torch.device("meta"):  # saves the time of drawing weights that are replaced at once
        backbone = build_backbone(config)
    backbone.to_empty(device="cpu")
    backbone.load_state_dict(state_dict)
    backbone.eval()
    return backbone


def save_weights(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
    """Write a folder (local or s3://) that `load_weights` and diffusers' from_pretrained read."""
    with tempfile.TemporaryDirectory() as local:
        backbone.save_pretrained(local, max_shard_size="1TB")
        for name in (_TENSORS, _CONFIG):
            upload(Path(local, name), join(folder, name))
        digest = sha256_of(Path(local, _TENSORS))
    write_json(join(folder, _INFO), {**dataclasses.asdict(info), _DIGEST: digest})


def load_weights(url: str, *, prefer: Kind = "ema") -> tuple[Backbone, WeightsInfo]:
    """Load a float32 backbone in eval mode and the provenance of its weights.

    `url` is a folder of `save_weights`, a step's folder that contains ema/ or raw/, or a run
    directory, of which the newest step is loaded. Weights of an object store are kept in the cache
    folder. Raises UserError if there are no complete weights, or if they do not fit config.json.
    """
    folder = find_weights(url, prefer=prefer)
    info, digest = _read_info(join(folder, _INFO))
    stored = read_json(join(folder, _CONFIG))
    path = local_copy(join(folder, _TENSORS), digest)
    try:
        tensors = safetensors.torch.load_file(path)
        return restore_backbone(restore_config(stored), tensors), info
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: {_CONFIG} and {_TENSORS} do not load ({reason})") from None


def find_weights(url: str, *, prefer: Kind = "ema") -> str:
    """Return the folder that `load_weights(url)` reads. Raises UserError if there is none."""
    steps = [name for name in list_names(join(url, "weights")) if name.startswith("step_")]
    # By length first: names have 8 digits, but a run may take more steps than that.
    steps.sort(key=lambda name: (len(name), name), reverse=True)
    kinds = (prefer, "raw" if prefer == "ema" else "ema")
    for folder in (url, *(join(url, "weights", step) for step in steps)):
        for candidate in (folder, *(join(folder, kind) for kind in kinds)):
            if exists(join(candidate, _INFO)):
                return candidate
    raise UserError(f"{url}: no weights there or in its weights/step_* folders; train first")


def step_name(step: int) -> str:
    """Return the folder name of a step, such as step_00000500, so that names sort like steps."""
    return f"step_{step:08d}"


def run_of(folder: str) -> str | None:
    """Return RUN for a folder RUN/weights/step_N; None for weights outside a run directory."""
    run, found, _ = folder.rpartition("/weights/step_")
    return run if found else None


def _read_info(url: str) -> tuple[WeightsInfo, str]:
    """Read weights.json: the provenance and the sha256 of the file of tensors."""
    stored = read_json(url)
    try:
        digest = stored.pop(_DIGEST)
        for key in ("vae", "text_encoder"):
            stored[key] = stored[key] and EncoderIdentity(**stored[key])
        stored["classes"] = tuple(stored.get("classes", ()))  # absent in files of older versions
        return WeightsInfo(**stored), digest
    except (KeyError, TypeError) as error:
        raise UserError(f"{url}: not a weights.json of ifvit ({error})") from None
