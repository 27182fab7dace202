"""The verb `import`: published weights of other code bases => a run that every verb can read."""

import io
import pickle
import sys
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.models.clip import load_text_encoder
from ifvit.models.import_config import ImportConfig
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.models.reference import from_reference_state_dict
from ifvit.models.weights import WeightsInfo, save_weights, step_name


def import_weights(config: ImportConfig) -> None:
    """Write `RUN/weights/step_…/ema` (or `raw`).

    Raises UserError for a file that is not the state dict of such a backbone, or holds code.
    """
    tensors = _read(config.file)
    text_encoder = load_text_encoder(config.text_encoder)
    backbone = from_reference_state_dict(
        tensors,
        num_heads=config.num_heads,
        context_length=text_encoder.context_shape[0],
    )
    info = WeightsInfo(
        step=config.step,
        ema_decay=config.ema_decay,
        scaling_factor=config.scaling_factor,
        vae=identify(config.vae, resolve_pretrained(config.vae)),
        text_encoder=text_encoder.identity,
        recipe_sha256="",
    )
    kind = "raw" if config.ema_decay is None else "ema"
    folder = storage.join(config.run, "weights", step_name(config.step), kind)
    save_weights(folder, backbone, info)
    shape = backbone.shape
    sys.stdout.write(
        f"{folder}: {shape.conditioning}, {shape.num_image_blocks} image-only blocks a side, "
        f"{shape.num_text_blocks} text blocks, {backbone.num_parameters():,} parameters\n"
    )


def _read(url: str) -> Mapping[str, Tensor]:
    data = storage.read_bytes(url)
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, SafetensorError):
        raise UserError(
            f"{url}: not tensors alone, as torch.save and safetensors write them; is it whole? "
            "A pickle that holds code is not loaded"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(f"{url}: not a state dict; save nnet_ema.state_dict() by itself")
    return found
