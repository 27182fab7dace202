"""The verb `generate`: prompts and trained weights => PNG files and samples.jsonl."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import Pixels, encode_png
from ifvit.models.weights import load_weights
from ifvit.sampling.config import GenerateConfig, SamplingConfig
from ifvit.sampling.encoders import (
    choose_device,
    open_autoencoder,
    open_text_encoder,
    weights_sha256,
)
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

    def context_of(positions: Tensor) -> Tensor:
        return text_encoder.encode([prompts[p % len(prompts)] for p in positions.tolist()])

    positions = range(len(prompts) * config.num_images)
    batches = generate_images(sampler, context_of, positions, sampling_of(config))
    urls, shown = write_images(config.output, positions, batches)
    settings = {
        **asdict(sampling_of(config)),
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
    if len(shown) > 1:
        grid = make_grid(shown, math.ceil(math.sqrt(len(shown))))
        storage.write_bytes(storage.join(config.output, "grid.png"), encode_png(grid))
    return urls


def sampling_of(config: SamplingConfig) -> SamplingConfig:
    """The sampling part of a larger config."""
    names = [field.name for field in fields(SamplingConfig)]
    return SamplingConfig(**{name: getattr(config, name) for name in names})


def write_images(
    folder: str, positions: Sequence[int], batches: Iterable[Pixels]
) -> tuple[list[str], Pixels]:
    """Write POSITION.png as the batches come; returns their URLs and the first images, for a grid.

    The first images are (N, H, W, 3) with N at most 64.
    """
    images = itertools.chain.from_iterable(batches)
    urls: list[str] = []
    shown: list[Pixels] = []
    for position, image in zip(positions, images, strict=True):
        urls.append(storage.join(folder, f"{position:05d}.png"))
        storage.write_bytes(urls[-1], encode_png(image))
        if len(shown) < _MAX_GRID:
            shown.append(image)
    return urls, np.stack(shown)


def write_jsonl(url: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    storage.write_bytes(url, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None
    lines = storage.read_bytes(config.prompts).decode("utf-8", errors="replace").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompts}: no prompts in it; write one a line")
    return prompts
