"""The verb `generate`: prompts and trained weights => PNG files and samples.jsonl."""

import json
import math
import sys
from hashlib import sha256
from typing import Any

from torch import Tensor

from ifvit import storage
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.weights import WeightsInfo, load_weights
from ifvit.process_group import choose_device
from ifvit.sampling.alignment.methods import build_method
from ifvit.sampling.conditions import (
    number_classes,
    open_autoencoder,
    open_conditions,
    weights_sha256,
)
from ifvit.sampling.config import GenerateConfig
from ifvit.sampling.guidance import compile_backbone
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

_MAX_GRID = 64


def generate(config: GenerateConfig) -> list[str]:
    """Draw `num_images` per prompt; returns the URLs of the PNG files in order.

    Image k of prompt i has position k * num_prompts + i, so asking for more images of the same
    prompts keeps the first ones. Images that are there already are not drawn again, and several
    processes (torchrun, srun) draw a share each; the last to finish writes samples.jsonl.
    Raises UserError for missing prompts, weights or encoders, or for images of other settings.
    """
    prompts = _read_prompts(config)
    world = World.from_environment()
    device = choose_device(config.device)
    backbone, info = load_weights(config.weights)
    backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    if config.compile:
        compile_backbone(backbone)
    _check_prompts(config, info, prompts)
    conditions = open_conditions(info, device)
    sampler = Sampler(
        backbone=backbone,
        autoencoder=open_autoencoder(info, device),
        null_condition=conditions.null,
        scaling_factor=info.scaling_factor,
    )

    def prompts_of(positions: Tensor) -> list[str]:
        return [prompts[position % len(prompts)] for position in positions.tolist()]

    def condition_of(positions: Tensor) -> Tensor:
        return conditions.encode(prompts_of(positions))

    settings = config.settings | {
        "weights_sha256": weights_sha256(backbone),
        "step": info.step,
        "ema_decay": info.ema_decay,
    }
    claim = settings | {"prompts_sha256": sha256(json.dumps(prompts).encode()).hexdigest()}
    method_of = build_method(config, sampler, info, prompts_of)
    claim_folder(config.output, claim)
    positions = range(len(prompts) * config.num_images)
    share = missing_images(config.output, positions[world.rank :: world.size])
    batches = generate_images(sampler, condition_of, share, config, method_of)
    write_images(config.output, share, batches)

    urls = [image_url(config.output, position) for position in positions]
    num_missing = len(missing_images(config.output, positions))
    if num_missing:
        sys.stdout.write(f"{num_missing} of {len(urls)} images are left to other processes\n")
    else:
        _write_overview(config, prompts, settings, urls)
    return urls


def _write_overview(
    config: GenerateConfig, prompts: list[str], settings: dict[str, Any], urls: list[str]
) -> None:
    """samples.jsonl and the grid, once every image is there."""
    rows = (
        {
            "file": image_name(position),
            "prompt": prompts[position % len(prompts)],
            "position": position,
            "weights": config.weights,
            **settings,
        }
        for position in range(len(urls))
    )
    write_jsonl(storage.join(config.output, "samples.jsonl"), rows)
    _write_grid(config.output, urls)
    sys.stdout.write(f"{len(urls)} images in {config.output}\n")


def _write_grid(folder: str, urls: list[str]) -> None:
    """The first images of several side by side."""
    if len(urls) > 1:
        shown = read_images(urls[:_MAX_GRID])
        grid = make_grid(shown, math.ceil(math.sqrt(len(shown))))
        storage.write_bytes(storage.join(folder, "grid.png"), encode_png(grid))


def read_prompt_file(url: str) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError for one without any."""
    try:
        lines = storage.read_bytes(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text ({error}); convert it") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{url}: no prompts in it; write one a line")
    return prompts


def _check_prompts(config: GenerateConfig, info: WeightsInfo, prompts: list[str]) -> None:
    """Raise UserError for prompts of the other kind than the weights draw, or unknown classes."""
    if config.classes and info.text_encoder:
        raise UserError(f"{config.weights}: draws captions, not classes; give --prompt")
    if config.prompt is not None and info.text_encoder is None:
        raise UserError(
            f"{config.weights}: draws classes, not captions; give --class, "
            f"for example {info.classes[0]}"
        )
    if info.text_encoder is None:
        number_classes(info.classes, prompts)


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.classes:
        return config.classes
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None
    return read_prompt_file(config.prompts)
