"""The verb `generate`: prompts and trained weights => PNG files and samples.jsonl."""

import math
import sys
from dataclasses import asdict, fields

from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import encode_png
from ifvit.models.weights import load_weights
from ifvit.sampling.alignment.build import build_method
from ifvit.sampling.config import GenerateConfig, SamplingConfig
from ifvit.sampling.encoders import (
    choose_device,
    open_autoencoder,
    open_text_encoder,
    weights_sha256,
)
from ifvit.sampling.files import read_images, write_images, write_jsonl
from ifvit.sampling.grid import make_grid
from ifvit.sampling.sampler import Sampler, generate_images

_MAX_GRID = 64


def generate(config: GenerateConfig) -> list[str]:
    """Draw `num_images` per prompt; returns the URLs of the PNG files in order.

    Image k of prompt i has position k * num_prompts + i, so asking for more images of the same
    prompts keeps the first ones. Raises UserError for missing prompts, weights or encoders.
    """
    prompts = _read_prompts(config)
    device = choose_device(config.device)
    backbone, info = load_weights(config.weights)
    backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    text_encoder = open_text_encoder(info, device)
    sampler = Sampler(
        backbone=backbone,
        autoencoder=open_autoencoder(info, device),
        null_context=text_encoder.null_context(),
        scaling_factor=info.scaling_factor,
    )

    def prompts_of(positions: Tensor) -> list[str]:
        return [prompts[position % len(prompts)] for position in positions.tolist()]

    def context_of(positions: Tensor) -> Tensor:
        return text_encoder.encode(prompts_of(positions))

    positions = range(len(prompts) * config.num_images)
    method_of = build_method(config, sampler, info, prompts_of)
    batches = generate_images(sampler, context_of, positions, config, method_of)
    urls = write_images(config.output, positions, batches)
    given = asdict(config)
    settings = {
        **{field.name: given[field.name] for field in fields(SamplingConfig)},
        "weights": config.weights,
        "weights_sha256": weights_sha256(backbone),
        "step": info.step,
        "ema_decay": info.ema_decay,
    }
    rows = [
        {
            "file": url.rsplit("/", 1)[-1],
            "prompt": prompts[position % len(prompts)],
            "position": position,
            **settings,
        }
        for position, url in zip(positions, urls, strict=True)
    ]
    write_jsonl(storage.join(config.output, "samples.jsonl"), rows)
    if len(urls) > 1:
        shown = read_images(urls[:_MAX_GRID])
        grid = make_grid(shown, math.ceil(math.sqrt(len(shown))))
        storage.write_bytes(storage.join(config.output, "grid.png"), encode_png(grid))
    sys.stdout.write(f"{len(urls)} images in {config.output}\n")
    return urls


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None
    try:
        lines = storage.read_bytes(config.prompts).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{config.prompts}: not UTF-8 text ({error}); convert it") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompts}: no prompts in it; write one a line")
    return prompts
