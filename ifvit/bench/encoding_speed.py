"""The verb `bench encode`: images per second, and what the job adds to its two models."""

import contextlib
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.encoders import Encoders, decode_batches, load_encoders, one_thread
from data_pipeline.sources import open_source
from ifvit import storage
from ifvit.bench.config import BenchEncodeConfig
from ifvit.bench.timing import median_of_rounds, print_result
from ifvit.images import Pixels, to_model_range
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene

IMAGE_SHAPE = (640, 480)
GRAIN = 6.0
"""Deviation of the noise that makes a drawn JPEG as large as a photo's, about 100 kB."""

Inputs = list[tuple[Pixels, list[str]]]
"""What the models see: pixels (B, H, W, 3) of each batch, and its captions that are new."""


def bench_encode(config: BenchEncodeConfig) -> None:
    """Draw images, encode them in both ways in turn, print the ratio, remove everything."""
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as name, one_thread():
        recipe = _draw_images(Path(name), config)
        encoders = load_encoders(recipe, has_classes=False)
        inputs = _prepare(recipe, encoders)
        _time_models(inputs[:1], encoders)  # first use of the device
        with contextlib.redirect_stdout(sys.stderr):
            seconds = median_of_rounds(
                {
                    "job": partial(_time_job, recipe),
                    "models": partial(_time_models, inputs, encoders),
                },
                config.rounds,
            )
    on_gpu = encoders.device.startswith("cuda")
    print_result(
        {
            "images_per_s": config.num_images / seconds["job"],
            "vs_models_alone": seconds["job"] / seconds["models"],
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "vae": config.vae,
            "text_encoder": config.text_encoder,
            "image_size": config.image_size,
            "num_images": config.num_images,
        },
        config.json,
    )


def _draw_images(folder: Path, config: BenchEncodeConfig) -> EncodeConfig:
    """Enlarged scenes under noise with captions, in COCO's layout, and the recipe for them."""
    images, annotations = [], []
    for number in range(config.num_images):
        drawn = render_sampled_scene(0, number)
        smooth = np.asarray(Image.fromarray(drawn.image).resize(IMAGE_SHAPE))
        grainy = smooth + np.random.default_rng(number).normal(0, GRAIN, smooth.shape)
        picture = Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:06d}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number:06d}.jpg"})
        annotations += [{"image_id": number, "caption": c} for c in write_captions(drawn.scene)]
    captions = str(folder / "captions.json")
    storage.write_json(captions, {"images": images, "annotations": annotations})
    return EncodeConfig(
        images=str(folder),
        captions=captions,
        output=str(folder / "shards"),
        vae=config.vae,
        text_encoder=config.text_encoder,
        image_size=config.image_size,
        samples_per_shard=-(-config.num_images // 2),
        batch_size=config.batch_size,
        precision=config.precision,
        device=config.device,
        num_workers=config.num_workers,
    )


def _prepare(recipe: EncodeConfig, encoders: Encoders) -> Inputs:
    """The very batches that the job gives to its models."""
    units = open_source(recipe).units(recipe.samples_per_shard)
    return [
        (np.stack([image.pixels for image in encoded.decoded]), list(encoded.captions))
        for encoded in map(encoders.encode, decode_batches(units, recipe))
    ]


def _time_job(recipe: EncodeConfig) -> float:
    """Seconds from opening the source to the manifest, loading of the models included."""
    started = time.perf_counter()
    encode(recipe)
    seconds = time.perf_counter() - started
    storage.remove(recipe.output)
    return seconds


def _time_models(inputs: Inputs, encoders: Encoders) -> float:
    """Seconds in which the models alone encode the same batches."""
    assert encoders.text is not None
    started = time.perf_counter()
    for pixels, captions in inputs:
        moments = encoders.vae.encode(to_model_range(pixels, encoders.device))
        if captions:
            encoders.text.encode(captions)
    moments.cpu()  # the device has finished when its last result is here
    return time.perf_counter() - started
