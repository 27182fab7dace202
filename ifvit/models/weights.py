"""Weights as everybody but the trainer loads them: a diffusers folder plus their provenance.

FOLDER/config.json and FOLDER/diffusion_pytorch_model.safetensors are what diffusers reads;
FOLDER/weights.json says where the weights come from, what their file's sha256 is and, written last,
that they are complete.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from safetensors import SafetensorError

from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.build import restore_backbone
from ifvit.models.config import restore_config
from ifvit.shards import EncoderIdentity
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
    """What must be known about weights to sample with them, and to trust them."""

    step: int
    """Optimiser steps behind these weights."""
    ema_decay: float | None
    """Decay of the exponential moving average; None for raw weights."""
    scaling_factor: float
    """Autoencoder latents times this are what the backbone was trained on."""
    vae: EncoderIdentity
    """The autoencoder whose latents it was trained on."""
    text_encoder: EncoderIdentity | None
    """The text encoder whose context it was trained on; None: it was trained on classes."""
    classes: tuple[str, ...] = ()
    """Names of those, by number."""
    recipe_sha256: str
    """Hash of the recipe that trained it."""


def save_weights(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
    """Write a folder (local or s3://) that `load_weights` and diffusers' from_pretrained read."""
    with tempfile.TemporaryDirectory() as local:
        backbone.save_pretrained(local, max_shard_size="1TB")
        for name in (_TENSORS, _CONFIG):
            upload(Path(local, name), join(folder, name))
        digest = sha256_of(Path(local, _TENSORS))
    write_json(join(folder, _INFO), {**dataclasses.asdict(info), _DIGEST: digest})


def load_weights(url: str, *, prefer: Kind = "ema") -> tuple[Backbone, WeightsInfo]:
    """The backbone, float32 in eval mode, and the provenance of its weights.

    `url` is a folder of `save_weights`, a step's folder with ema/ or raw/ in it, or a run
    directory, of which the newest step is taken. Only safetensors are read; those of an object
    store are kept in the cache folder.
    Raises UserError if there is nothing to load yet, or what is there does not fit together.
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
    """The folder that `load_weights(url)` reads. Raises UserError if there is none."""
    steps = [name for name in list_names(join(url, "weights")) if name.startswith("step_")]
    # Names are zero-padded, but a run of more steps than the padding must sort right, too.
    steps.sort(key=lambda name: (len(name), name), reverse=True)
    kinds = (prefer, "raw" if prefer == "ema" else "ema")
    for folder in (url, *(join(url, "weights", step) for step in steps)):
        for candidate in (folder, *(join(folder, kind) for kind in kinds)):
            if exists(join(candidate, _INFO)):
                return candidate
    raise UserError(f"{url}: no weights there or in its weights/step_* folders; train first")


def step_name(step: int) -> str:
    """`step_00000500`, so that names sort like steps."""
    return f"step_{step:08d}"


def run_of(folder: str) -> str | None:
    """RUN of RUN/weights/step_…; None for weights that lie by themselves."""
    run, found, _ = folder.rpartition("/weights/step_")
    return run if found else None


def _read_info(url: str) -> tuple[WeightsInfo, str]:
    """The record and the sha256 of the tensors' file."""
    stored = read_json(url)
    try:
        digest = stored.pop(_DIGEST)
        for key in ("vae", "text_encoder"):
            stored[key] = stored[key] and EncoderIdentity(**stored[key])
        stored["classes"] = tuple(stored.get("classes", ()))  # older ones all know captions only
        return WeightsInfo(**stored), digest
    except (KeyError, TypeError) as error:
        raise UserError(f"{url}: not a record of weights ({error})") from None
