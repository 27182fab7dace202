"""Captions of one evaluation, and the images generated for them."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.references import find_image, read_reference
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.models.backbone import Backbone
from ifvit.models.weights import WeightsInfo, load_weights
from ifvit.rng import Stream, uniform_array
from ifvit.sampling.alignment.methods import build_method
from ifvit.sampling.conditions import (
    check_identity,
    open_autoencoder,
    require_text_encoder,
    weights_sha256,
)
from ifvit.sampling.sampler import Sampler, generate_images
from ifvit.sampling.samples import (
    claim_folder,
    image_name,
    image_url,
    missing_images,
    read_images,
    write_images,
    write_jsonl,
)
from ifvit.scenes.score import SceneScore
from ifvit.shards import ShardReader

_NUM_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The caption that is drawn for one held-out image, and the one it is scored against."""

    position: int
    image_id: int | str
    caption: int
    """Its number among the image's captions; in a labelled set, the number of the class."""
    text: str
    score_text: str


def read_prompts(reader: ShardReader, protocol: ProtocolConfig) -> list[Prompt]:
    """The captions of the first images, or the names of their classes.

    Raises UserError when there are not that many.
    """
    count = protocol.num_samples
    if count > len(reader):
        raise UserError(
            f"{reader.url}: {len(reader)} images, num_samples asks for {count}; lower it"
        )
    if reader.manifest.classes:
        return [_name_class(reader, position) for position in range(count)]
    positions = np.arange(count)
    chosen = np.zeros(count, np.int64)
    if protocol.caption_rule == "random":
        shares = uniform_array(protocol.sampling.seed, 0, positions, Stream.CAPTION)
        chosen = (shares * reader.caption_counts(positions)).astype(np.int64)
    prompts = []
    for position, caption in enumerate(chosen.tolist()):
        entry = reader.metadata(position)
        scored = caption if protocol.score_caption == "same" else 0
        prompts.append(
            Prompt(
                position=position,
                image_id=entry.image_id,
                caption=caption,
                text=entry.captions[caption],
                score_text=entry.captions[scored],
            )
        )
    return prompts


def _name_class(reader: ShardReader, position: int) -> Prompt:
    """What `two_red_circles` reads as a caption."""
    label = reader.label(position)
    text = reader.manifest.classes[label].replace("_", " ")
    image_id = reader.metadata(position).image_id
    return Prompt(position=position, image_id=image_id, caption=label, text=text, score_text=text)


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of which captions of which images are drawn, in order."""
    drawn = [[prompt.image_id, prompt.text] for prompt in prompts]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def write_overview(
    folder: str,
    prompts: list[Prompt],
    references: list[Path],
    image_size: int,
    scores: Sequence[SceneScore] | None,
) -> None:
    """Write samples.jsonl, grid.png and the real images of the prompts in the grid."""
    shown = prompts[:_NUM_SHOWN]
    real: dict[int, str] = {}
    for prompt in shown:
        path = find_image(references, prompt.image_id)
        if path is not None:
            real[prompt.position] = f"real_{image_name(prompt.position)}"
            pixels = read_reference(path, image_size)
            storage.write_bytes(storage.join(folder, real[prompt.position]), encode_png(pixels))
    rows = (
        {
            "file": image_name(prompt.position),
            "prompt": prompt.text,
            "position": prompt.position,
            "image_id": prompt.image_id,
            "real": real.get(prompt.position),
            "scores": asdict(scores[prompt.position]) if scores else None,
        }
        for prompt in prompts
    )
    write_jsonl(storage.join(folder, "samples.jsonl"), rows)
    grid = make_grid(next(read_samples(folder, shown, _NUM_SHOWN)), math.isqrt(len(shown)))
    storage.write_bytes(storage.join(folder, "grid.png"), encode_png(grid))


def read_samples(folder: str, prompts: list[Prompt], batch_size: int) -> Iterator[Pixels]:
    """The drawn images in the order of `prompts`, (B, H, W, 3) at a time."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield read_images(image_url(folder, prompt.position) for prompt in batch)


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
    size = backbone.config.latent_size
    if manifest.moments_shape != (2 * backbone.config.latent_channels, size, size):
        raise UserError(
            f"{reader.url}: moments {manifest.moments_shape} do not fit a backbone of "
            f"{backbone.config.latent_channels} x {size} x {size} latents; encode at its image size"
        )


def _count_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes, such as {classes[0]}" if classes else "captions"
