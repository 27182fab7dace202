"""A trained backbone draws held-out captions; what is drawn already is not drawn again."""

import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.samples import Prompt
from ifvit.models.backbone import Backbone
from ifvit.models.weights import WeightsInfo, load_weights
from ifvit.sampling.alignment.build import build_method
from ifvit.sampling.encoders import (
    check_identity,
    open_autoencoder,
    require_text_encoder,
    weights_sha256,
)
from ifvit.sampling.files import claim_folder, missing_images, write_images
from ifvit.sampling.sampler import Sampler, generate_images
from ifvit.shards import ShardReader


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights ready to draw, and what they are."""

    url: str
    sampler: Sampler
    info: WeightsInfo
    sha256: str


def open_model(weights: str, reader: ShardReader, device: str) -> Model:
    """Load a weights folder and its autoencoder.

    Raises UserError for shards of other encoders than the backbone's, or of another size.
    """
    backbone, info = load_weights(weights)
    _check_fit(backbone, info, reader)
    digest = weights_sha256(backbone)
    backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    classes = reader.manifest.classes
    sampler = Sampler(
        backbone=backbone,
        autoencoder=open_autoencoder(info, device),
        null_condition=torch.tensor(len(classes))
        if classes
        else torch.from_numpy(np.array(reader.null_context)),
        scaling_factor=info.scaling_factor,
    )
    return Model(url=weights, sampler=sampler, info=info, sha256=digest)


def draw_missing(
    folder: str,
    model: Model,
    reader: ShardReader,
    prompts: list[Prompt],
    protocol: ProtocolConfig,
) -> float | None:
    """Draw the prompts whose PNG is not in `folder` yet; seconds per image, None if all are there.

    Raises UserError when the folder holds images of other settings, so that none is lost.
    """
    claim_folder(folder, _describe(model, reader, protocol))
    drawn = {prompt.position: prompt for prompt in prompts}
    positions = missing_images(folder, drawn)

    def captions_of(batch: Tensor) -> list[str]:
        return [drawn[position].text for position in batch.tolist()]

    def condition_of(batch: Tensor) -> Tensor:
        if reader.manifest.classes:
            return torch.tensor([drawn[position].caption for position in batch.tolist()])
        contexts = [reader.context(p, drawn[p].caption) for p in batch.tolist()]
        return torch.from_numpy(np.stack(contexts))

    started = time.perf_counter()
    method_of = build_method(protocol.sampling, model.sampler, model.info, captions_of)
    images = generate_images(model.sampler, condition_of, positions, protocol.sampling, method_of)
    write_images(folder, positions, images)
    return (time.perf_counter() - started) / len(positions) if positions else None


def _describe(model: Model, reader: ShardReader, protocol: ProtocolConfig) -> dict[str, object]:
    """All that decides what a position's image looks like."""
    shards = json.dumps([entry.sha256 for entry in reader.manifest.shards])
    return protocol.sampling.settings | {
        "weights_sha256": model.sha256,
        "shards_sha256": hashlib.sha256(shards.encode()).hexdigest(),
        "caption_rule": protocol.caption_rule,
    }


def _check_fit(backbone: Backbone, info: WeightsInfo, reader: ShardReader) -> None:
    """Raise UserError unless the shards hold what the backbone was trained on, in its shape."""
    manifest = reader.manifest
    check_identity(f"{reader.url}: vae", manifest.vae, info.vae)
    if manifest.classes != info.classes:
        raise UserError(
            f"{reader.url}: holds {_count_classes(manifest.classes)}, but the weights draw "
            f"{_count_classes(info.classes)}; name held-out shards of those"
        )
    if not manifest.classes:
        text_encoder = require_text_encoder(info)
        check_identity(f"{reader.url}: text encoder", reader.text.encoder, text_encoder)
    size = backbone.shape.latent_size
    if manifest.moments_shape != (2 * backbone.shape.latent_channels, size, size):
        raise UserError(
            f"{reader.url}: moments {manifest.moments_shape} do not fit a backbone of "
            f"{backbone.shape.latent_channels} x {size} x {size} latents; encode at its image size"
        )


def _count_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes, such as {classes[0]}" if classes else "captions"
