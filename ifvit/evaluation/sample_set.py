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

from ifvit import storage
from ifvit.diffusion.sampler import ConditionBatch, generate_images
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.references import find_image, read_reference
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.rng import Stream, uniform_array
from ifvit.sampling.alignment import build_method
from ifvit.sampling.load import (
    Model,
    check_identity,
    load_model,
    load_sampler,
    require_text_encoder,
)
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


def open_model(weights: str, reader: ShardReader, device: str) -> Model:
    """Load a weights folder.

    Raises UserError for shards of other encoders than the backbone's, or of another size.
    """
    model = load_model(weights, device)
    _check_fit(model, reader)
    return model


def generate_missing(
    folder: str,
    model: Model,
    reader: ShardReader,
    prompts: list[Prompt],
    protocol: ProtocolConfig,
) -> float | None:
    """Generate the images of `prompts` that `folder` lacks; return the seconds per image.

    Returns None if no image was missing. Raises UserError when the folder holds images of other
    settings, so that none is lost.
    """
    claim_folder(folder, _describe(model, reader, protocol))
    wanted = {prompt.position: prompt for prompt in prompts}
    missing = [wanted[position] for position in missing_images(folder, wanted)]
    if not missing:
        return None
    started = time.perf_counter()
    classes = reader.manifest.classes
    null = torch.tensor(len(classes)) if classes else torch.tensor(np.array(reader.null_context))
    sampler = load_sampler(model, null)
    method = build_method(protocol.sampling, sampler, model.info)
    batches = _read_batches(reader, missing, protocol.sampling.batch_size)
    images = generate_images(sampler, batches, protocol.sampling, method)
    write_images(folder, [prompt.position for prompt in missing], images)
    return (time.perf_counter() - started) / len(missing)


def _read_batches(
    reader: ShardReader, prompts: list[Prompt], batch_size: int
) -> Iterator[ConditionBatch]:
    """Read the conditions of the prompts from the shards, one batch at a time."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        if reader.manifest.classes:
            condition = torch.tensor([prompt.caption for prompt in batch])
        else:
            contexts = [reader.context(prompt.position, prompt.caption) for prompt in batch]
            condition = torch.from_numpy(np.stack(contexts))
        yield ConditionBatch(
            positions=torch.tensor([prompt.position for prompt in batch]),
            condition=condition,
            prompts=[prompt.text for prompt in batch],
        )


def _describe(model: Model, reader: ShardReader, protocol: ProtocolConfig) -> dict[str, object]:
    """All that decides what a position's image looks like."""
    shards = json.dumps([entry.sha256 for entry in reader.manifest.shards])
    return protocol.sampling.settings | {
        "weights_sha256": model.sha256,
        "shards_sha256": hashlib.sha256(shards.encode()).hexdigest(),
        "caption_rule": protocol.caption_rule,
    }


def _check_fit(model: Model, reader: ShardReader) -> None:
    """Raise UserError unless the shards hold what the backbone was trained on, in its shape."""
    manifest, info, backbone = reader.manifest, model.info, model.backbone
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
