"""The samples of an evaluation: prompts, their conditions, and the images generated for them.

Shapes: B batch, M text tokens, D context width, H, W image.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ifvit import storage
from ifvit.conditions import Condition
from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.references import RealImages
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.weights import WeightsInfo
from ifvit.rng import Stream, uniform_array
from ifvit.sampling.alignment import build_methods
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.load import (
    Model,
    check_identity,
    load_conditions,
    open_dataset_conditions,
)
from ifvit.sampling.samples import (
    SampleRow,
    batched,
    image_name,
    image_url,
    open_writer,
    read_images,
    unfinished_images,
    write_samples,
)
from ifvit.scenes.score import SceneScore
from ifvit.shards.reader import ShardReader

_NUM_SHOWN = 64
"""Images in grid.png."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The text that an image is generated for, and the caption that it is scored against."""

    position: int
    image_id: int | str
    text: str
    score_text: str = ""
    caption: int = 0
    """Number of the caption among those of its image; for labelled images, the class number."""


def read_prompts(reader: ShardReader, protocol: ProtocolConfig) -> list[Prompt]:
    """The captions of the first held-out images, or the names of their classes.

    Raises UserError if there are fewer images than the protocol samples.
    """
    count = protocol.num_samples
    if count > len(reader):
        raise UserError(
            f"{reader.url}: has {len(reader)} images, but num_samples is {count}; lower it"
        )
    positions, classes = np.arange(count), reader.manifest.classes
    chosen = np.zeros(count, np.int64)
    if protocol.caption_rule == "random" and not classes:
        draws = uniform_array(protocol.sampling.seed, 0, positions, Stream.CAPTION)
        chosen = (draws * reader.caption_counts(positions)).astype(np.int64)
    prompts = []
    for position, caption in enumerate(chosen.tolist()):
        entry = reader.metadata(position)
        if classes:  # two_red_circles => "two red circles"
            caption = reader.label(position)
            text = score_text = classes[caption].replace("_", " ")
        else:
            text = entry.captions[caption]
            score_text = text if protocol.score_caption == "same" else entry.captions[0]
        texts = {"text": text, "score_text": score_text}
        prompts.append(Prompt(position=position, image_id=entry.image_id, caption=caption, **texts))
    return prompts


@dataclass(frozen=True, kw_only=True)
class PromptConditions:
    """Conditions of prompts, as a backbone takes them."""

    read: Callable[[Sequence[Prompt]], Condition]
    """B prompts => contexts of captions, or class numbers (B,)."""
    null: Condition
    """Condition of no prompt, one row."""


def open_shard_conditions(reader: ShardReader, model: Model) -> DatasetConditions:
    """Conditions of the images of held-out shards; see `open_dataset_conditions`.

    Raises UserError unless the shards hold what the model was trained on, in its shape.
    """
    _check_fit(model, reader)
    return open_dataset_conditions(model.info, reader, str(model.backbone.device))


def of_prompts(conditions: DatasetConditions) -> PromptConditions:
    """Conditions of prompts that `read_prompts` has read from the same shards."""

    def read(prompts: Sequence[Prompt]) -> Condition:
        positions = [prompt.position for prompt in prompts]
        return conditions.read(positions, [prompt.caption for prompt in prompts])

    return PromptConditions(read=read, null=conditions.null)


def open_encoded_conditions(model: Model) -> PromptConditions:
    """Conditions of any text, by the text encoder of the training.

    Raises UserError for a text encoder that does not load or has changed.
    """
    conditions = load_conditions(model.info, str(model.backbone.device))
    return PromptConditions(
        read=lambda prompts: conditions.encode([prompt.text for prompt in prompts]),
        null=conditions.null,
    )


def _check_fit(model: Model, reader: ShardReader) -> None:
    manifest, info, backbone = reader.manifest, model.info, model.backbone
    check_identity(f"{reader.url}: vae", manifest.vae, info.vae)
    size, channels = backbone.config.latent_size, backbone.config.latent_channels
    if manifest.latent_shape != (channels, size, size):
        raise UserError(
            f"{reader.url}: latents {manifest.latent_shape} do not fit a backbone of "
            f"{channels} x {size} x {size} latents; encode at its image size"
        )


def generate_missing(
    folder: str,
    prompts: Sequence[Prompt],
    conditions: PromptConditions,
    sampler: Sampler,
    info: WeightsInfo,
    config: SamplingConfig,
) -> float | None:
    """Generate the images of `prompts` that `folder` lacks; return the seconds per image.

    Returns None if no image was missing.
    """
    by_position = {prompt.position: prompt for prompt in prompts}
    missing = [by_position[position] for position in unfinished_images(folder, list(by_position))]
    if not missing:
        return None
    started = time.perf_counter()
    methods = build_methods(config, sampler, info)
    batches = (
        ConditionBatch(
            positions=torch.tensor([prompt.position for prompt in batch]),
            condition=conditions.read(batch),
            prompts=[prompt.text for prompt in batch],
        )
        for batch in batched(missing, config.batch_size)
    )
    with open_writer(folder, [prompt.position for prompt in missing]) as write:
        for images in generate_images(sampler, batches, config, methods):
            write(images)
    return (time.perf_counter() - started) / len(missing)


def read_samples(folder: str, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Pixels]:
    """The generated images in the order of `prompts`, in batches (B, H, W, 3)."""
    for batch in batched(prompts, batch_size):
        yield read_images(image_url(folder, prompt.position) for prompt in batch)


def write_overview(
    folder: str,
    prompts: Sequence[Prompt],
    clip_scores: Sequence[float] = (),
    held_out_losses: Sequence[float] = (),
    scene_scores: Sequence[SceneScore] = (),
    real_images: RealImages | None = None,
) -> None:
    """Write samples.jsonl, grid.png and the real images of the prompts in the grid.

    The scores are those of the samples in the order of `prompts`, where they were computed.
    """
    shown = prompts[:_NUM_SHOWN]
    real: dict[int, str] = {}
    for prompt in shown:
        if real_images and (path := real_images.find(prompt.image_id)):
            real[prompt.position] = f"real_{image_name(prompt.position)}"
            png = encode_png(real_images.read(path))
            storage.write_bytes(storage.join(folder, real[prompt.position]), png)
    rows = (
        SampleRow(
            file=image_name(prompt.position),
            prompt=prompt.text,
            position=prompt.position,
            image_id=prompt.image_id,
            real=real.get(prompt.position),
            clip_score=clip_scores[prompt.position] if clip_scores else None,
            held_out_loss=held_out_losses[prompt.position] if held_out_losses else None,
            scores=scene_scores[prompt.position].aspects if scene_scores else None,
        )
        for prompt in prompts
    )
    write_samples(folder, rows)
    grid = make_grid(next(read_samples(folder, shown, _NUM_SHOWN)), math.isqrt(len(shown)))
    storage.write_bytes(storage.join(folder, "grid.png"), encode_png(grid))
