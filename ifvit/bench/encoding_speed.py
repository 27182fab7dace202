"""The verb `bench encode`: images per second of the encode job, relative to its models alone."""

import contextlib
import statistics
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
from data_pipeline.encoders import Batch, Encoders, decode_batches, load_encoders, one_thread
from data_pipeline.sources import open_source
from data_pipeline.units import FileStates
from ifvit import storage
from ifvit.bench.config import BenchEncodeConfig
from ifvit.bench.measurement import measure_rounds, median_ratio, print_result, seconds_on
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene
from ifvit.training.profiling import device_name

IMAGE_SHAPE = (640, 480)
NOISE = 6.0
"""Standard deviation of the noise that makes a JPEG of a scene as large as a photo, 100 kB."""


def bench_encode(config: BenchEncodeConfig) -> None:
    """Render images, measure the job and its models in turn, and print their ratio."""
    with tempfile.TemporaryDirectory(prefix="ifvit-bench-") as name, one_thread():
        recipe = _render_images(Path(name), config)
        encoders = load_encoders(recipe, has_classes=False)
        units = open_source(recipe).units(recipe.samples_per_shard)
        batches = list(decode_batches(units, recipe, FileStates()))
        _time_models(batches, encoders)  # first use of the device
        contenders = {
            "job": partial(_time_job, recipe),
            "models": partial(_time_models, batches, encoders),
        }
        with contextlib.redirect_stdout(sys.stderr):
            seconds = measure_rounds(contenders, config.rounds)
    result = {
        "images_per_s": config.num_images / statistics.median(seconds["job"]),
        "vs_models_alone": median_ratio(seconds["job"], seconds["models"]),
        "device": device_name(torch.device(encoders.device)),
        "vae": config.vae,
        "text_encoder": config.text_encoder,
        "image_size": config.image_size,
        "num_images": config.num_images,
    }
    print_result(result, config.json)


def _render_images(folder: Path, config: BenchEncodeConfig) -> EncodeConfig:
    """Write noisy enlarged scenes in COCO's layout and return the recipe that encodes them."""
    images, annotations = [], []
    for number in range(config.num_images):
        rendered = render_sampled_scene(0, number)
        smooth = np.asarray(Image.fromarray(rendered.image).resize(IMAGE_SHAPE))
        noisy = smooth + np.random.default_rng(number).normal(0, NOISE, smooth.shape)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:06d}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number:06d}.jpg"})
        annotations += [{"image_id": number, "caption": c} for c in write_captions(rendered.scene)]
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
    )


def _time_job(recipe: EncodeConfig) -> float:
    """Return the seconds from opening the source to the manifest, loading of models included."""
    started = time.perf_counter()
    encode(recipe)
    seconds = time.perf_counter() - started
    storage.remove(recipe.output)
    return seconds


def _time_models(batches: list[Batch], encoders: Encoders) -> float:
    """Return the seconds that the models alone take for the same batches."""

    def encode_all() -> None:
        for batch in batches:
            encoders.encode(batch)

    return seconds_on(torch.device(encoders.device), encode_all)
