"""The verb `generate`: prompts and trained weights => PNG files, samples.jsonl and a grid."""

import math
import sys
from collections.abc import Iterator

import torch

from ifvit import storage
from ifvit.diffusion.sampler import ConditionBatch, generate_images
from ifvit.distributed import World, choose_device
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.clip import MAX_CHARACTERS
from ifvit.models.weights import WeightsInfo
from ifvit.records import decode_lines
from ifvit.sampling.alignment import build_methods
from ifvit.sampling.config import GenerateConfig
from ifvit.sampling.load import (
    Conditions,
    load_conditions,
    load_model,
    load_sampler,
    number_classes,
)
from ifvit.sampling.samples import (
    SampleRow,
    batched,
    claim_folder,
    hash_json,
    image_name,
    image_url,
    missing_images,
    open_writer,
    read_images,
    unfinished_images,
    write_samples,
)

_MAX_GRID = 64
"""Images in grid.png."""


def generate(config: GenerateConfig) -> list[str]:
    """Generate `num_images` images per prompt; return the URLs of the PNG files in order.

    Image k of prompt i has position k * num_prompts + i, so the first images stay when more images
    of the same prompts are requested. Undamaged images are kept. Several processes (torchrun, srun)
    generate a partition each; the last one to finish writes samples.jsonl and the grid.
    Raises UserError for missing prompts, weights or encoders, and if the folder holds images of
    other settings.
    """
    model = load_model(config.weights, choose_device(config.device), config, compile=config.compile)
    prompts = _read_prompts(config, model.info)
    conditions = load_conditions(model.info, str(model.backbone.device))
    sampler = load_sampler(model, conditions.null, config)
    methods = build_methods(config, sampler, model.info)
    settings = config.settings | {
        "weights_sha256": model.sha256,
        "step": model.info.step,
        "ema_decay": model.info.ema_decay,
        "null_context": model.info.null_context,
    }
    claim_folder(config.output, settings | {"prompts_sha256": hash_json(prompts)})

    world = World.from_environment()
    positions = range(len(prompts) * config.num_images)
    partition = unfinished_images(config.output, positions[world.rank :: world.size])
    batches = _encode_batches(prompts, conditions, partition, config.batch_size)
    with open_writer(config.output, partition) as write:
        for images in generate_images(sampler, batches, config, methods):
            write(images)

    urls = [image_url(config.output, position) for position in positions]
    if num_missing := len(missing_images(config.output, positions)):
        sys.stdout.write(f"{num_missing} of {len(urls)} images are left to the other processes\n")
        return urls
    texts = prompts * config.num_images
    write_samples(
        config.output,
        (SampleRow(file=image_name(n), prompt=texts[n], position=n) for n in positions),
    )
    if len(urls) > 1:
        shown = read_images(urls[:_MAX_GRID])
        grid = make_grid(shown, math.ceil(math.sqrt(len(shown))))
        storage.write_bytes(storage.join(config.output, "grid.png"), encode_png(grid))
    sys.stdout.write(f"{len(urls)} images in {config.output}\n")
    return urls


def _encode_batches(
    prompts: list[str], conditions: Conditions, positions: list[int], batch_size: int
) -> Iterator[ConditionBatch]:
    """Encode the prompts of `positions`, one batch at a time."""
    for batch in batched(positions, batch_size):
        texts = [prompts[position % len(prompts)] for position in batch]
        yield ConditionBatch(
            positions=torch.tensor(batch), condition=conditions.encode(texts), prompts=texts
        )


def _read_prompts(config: GenerateConfig, info: WeightsInfo) -> list[str]:
    """Return the prompts or classes. Raises UserError if they do not fit the weights."""
    if config.classes and info.text_encoder:
        raise UserError(f"{config.weights}: trained on captions; give --prompt, not --class")
    if config.prompt is not None and info.text_encoder is None:
        raise UserError(
            f"{config.weights}: trained on classes; give --class, not --prompt, "
            f"for example --class {info.classes[0]}"
        )
    prompts = config.classes or [config.prompt or ""]
    if config.prompts is not None:
        prompts = read_prompt_file(config.prompts)
    if info.text_encoder is None:
        number_classes(info.classes, prompts)
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > MAX_CHARACTERS:
            raise UserError(
                f"prompt {number} has {len(prompt)} characters; give at most {MAX_CHARACTERS}"
            )
    return prompts


def read_prompt_file(url: str) -> list[str]:
    """Read the non-empty lines of a text file. Raises UserError if there are none."""
    lines = decode_lines(storage.read_bytes(url), url)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{url}: no prompts in this file; write one per line")
    return prompts
