"""Makes run folders like those of training and evaluation, without training or evaluating."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from made_training_rows import made_training_row

from ifvit import storage
from ifvit.diffusion.config import Prediction
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, Protocol, row_url, samples_url
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.models.config import BackboneConfig
from ifvit.models.presets import PRESETS
from ifvit.models.weights import StoredWeights, WeightsInfo
from ifvit.records import dump_rows, dump_sealed
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.samples import SampleRow, write_samples
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity

PROMPTS = ["two red circles", "a blue square", "<script>alert(1)</script>"]


def estimate(value: float, error: float = 0.02) -> Estimate:
    low, high = value - 2 * error, value + 2 * error
    return Estimate(value=value, standard_error=error, num_samples=500, low=low, high=high)


def build_row(retrieval: float, step: int = 1200, **changes: object) -> MetricsRow:
    """Build a row of metrics; `changes` are fields of the protocol or of its sampling settings."""
    sampling = SamplingConfig(num_steps=25).settings
    changes |= {"sampling": sampling | {k: changes.pop(k) for k in sampling.keys() & changes}}
    protocol = Protocol(
        name="scenes",
        num_samples=500,
        caption_rule="first",
        score_caption="same",
        sampling=sampling,
        image_size=64,
        resize="center_crop+lanczos",
        prompts_sha256="a" * 64,
        features="scenes/clip",
        features_sha256="b" * 64,
        paper_prefix="",
        inception=None,
        inception_sha256=None,
        num_reference_images=500,
        reference_sha256="c" * 64,
    )
    return MetricsRow(
        weights="run",
        weights_sha256="d" * 64,
        step=step,
        ema_decay=0.999,
        protocol=dataclasses.replace(protocol, **changes),
        frechet_distance=estimate(0.12),
        clip_score=estimate(0.61),
        clip_score_paper=estimate(1.52),
        retrieval_at_16=estimate(retrieval),
        count_accuracy=estimate(0.5),
    )


def write_run(
    folder: Path,
    row: MetricsRow,
    fusion: str = "7*cross_attention",
    prediction: Prediction = "epsilon",
) -> str:
    """Write a complete run folder of the tiny preset with one evaluation."""
    shape = dataclasses.replace(PRESETS["tiny"], fusion=fusion)
    write_training(folder, shape, prediction=prediction)
    write_evaluation(folder, row)
    return str(folder)


def write_training(
    folder: Path, shape: BackboneConfig, seed: int = 1, prediction: Prediction = "epsilon"
) -> None:
    """Write the files of `ifvit train`; the weights have no tensors."""
    curve = [
        made_training_row(step, validation_loss=None if step % 400 else 2 / step)
        for step in range(10, 1201, 10)
    ]
    backbone = json.dumps(dataclasses.asdict(shape))
    encoder = EncoderIdentity(name="made-up", sha256="0" * 64)
    info = WeightsInfo(
        step=1200,
        ema_decay=0.999,
        scaling_factor=1.0,
        vae=encoder,
        text_encoder=TextEncoderIdentity(name="made-up", sha256="0" * 64)
        if shape.context_shape
        else None,
        prediction=prediction,
        classes=tuple(map(str, range(shape.num_classes or 0))),
        recipe_sha256="0" * 64,
    )
    stored = StoredWeights(
        info=info,
        config_sha256=hashlib.sha256(backbone.encode()).hexdigest(),
        tensors_sha256="0" * 64,
    )
    files = {
        folder / "config.yaml": f"seed: {seed}\nglobal_batch_size: 32\nbackbone: {backbone}\n"
        "validation: {shards: made, num_samples: 9}\n",
        folder / "metrics.jsonl": dump_rows(curve).decode(),
        folder / "weights/step_00001200/ema/config.json": backbone,
        folder / "weights/step_00001200/ema/weights.json": dump_sealed(stored).decode(),
    }
    for path, text in files.items():
        storage.write_bytes(str(path), text.encode())
    grid = encode_png(make_grid(noise(0), 3))
    storage.write_bytes(str(folder / "samples/step_00001200.png"), grid)


def write_evaluation(folder: Path, row: MetricsRow) -> None:
    """Write a row and its samples, which are images of noise."""
    protocol = row.protocol
    url = row_url(str(folder / FOLDER), protocol.name, protocol.guidance_scale, row.step)
    pixels, evaluation = noise(row.step), Path(samples_url(url))
    samples = [
        SampleRow(
            file=f"{n:05d}.png",
            prompt=prompt,
            position=n,
            image_id=n,
            real=f"real_{n:05d}.png" if n == 0 else None,
            scores={"count": False, "colour": True, "kind": True, "relation": None},
        )
        for n, prompt in enumerate(PROMPTS)
    ]
    write_samples(str(evaluation), samples)
    for n, image in enumerate(pixels):
        storage.write_bytes(str(evaluation / f"{n:05d}.png"), encode_png(image))
    storage.write_bytes(str(evaluation / "real_00000.png"), encode_png(pixels[0]))
    storage.write_sealed(url, row)


def noise(seed: int) -> Pixels:
    """Return one image (16, 16, 3) per prompt."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (len(PROMPTS), 16, 16, 3), dtype=np.uint8)
