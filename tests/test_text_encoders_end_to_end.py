"""Text encoders of today through the whole path: encode, verify, train, generate, evaluate, export.

Each encoder comes with an autoencoder and a way to store contexts; every pipeline is loaded by
plain diffusers and makes the images of `ifvit generate`.
"""

import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from made_autoencoders import KINDS as AUTOENCODERS
from made_autoencoders import save_autoencoder
from made_text_encoders import KINDS, make_text_encoder
from PIL import Image

from data_pipeline.config import EncodeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import verify
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.rows import MetricsRow
from ifvit.models.config import FusionTransformerConfig, TextOptions
from ifvit.rng import Stream, normal
from ifvit.sampling.config import ExportConfig, GenerateConfig, SamplingConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate
from ifvit.sampling.samples import read_images
from ifvit.shards.format import Manifest
from ifvit.training.config import EngineConfig, TrainConfig, ValidationConfig
from ifvit.training.train import train

CONTEXTS = ("stored", "int8", "computed")
CASES = list(zip(KINDS, cycle(AUTOENCODERS), cycle(CONTEXTS), strict=False))
CAPTIONS = (("a dog", "a photo of a dog on the street, a cat beside it"), ("two red circles", ""))
"""Short and long captions of the images by turns; the second image has no long one."""
PROMPTS = ("a green triangle left of three small yellow stars", "a cat")
NUM_IMAGES = 6
TEXT = TextOptions(max_length=40, precision="fp32")


def encode_images(folder: Path, context: str, name: str) -> Manifest:
    (folder / name).mkdir()
    generator = np.random.default_rng(len(name))
    rows = []
    for number in range(NUM_IMAGES):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(folder / name / f"{number}.png")
        short, long = CAPTIONS[number % 2]
        texts = {"short": f"{short} {number}", "long": long or None}
        rows.append(json.dumps({"path": f"{number}.png", **texts}))
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    is_computed = context == "computed"
    config = EncodeConfig(
        source="table", images=str(folder / name), captions=str(folder / f"{name}.jsonl"),
        caption_key="short, long", output=str(folder / f"{name}-shards"), image_size=64,
        vae=str(folder / "vae"), text_encoder=None if is_computed else str(folder / "text"),
        text=TextOptions() if is_computed else TEXT, int8_context=context == "int8",
        context="computed" if is_computed else "stored",
        samples_per_shard=4, batch_size=3, device="cpu", num_workers=1,
    )  # fmt: skip
    manifest = encode(config)
    assert manifest is not None
    verify(ShardsConfig(url=config.output))
    return manifest


def train_two_steps(folder: Path, context: str, manifest: Manifest) -> str:
    channels, size, _ = manifest.latent_shape
    width = manifest.text.context_shape[1] if manifest.text else 32
    backbone = FusionTransformerConfig(
        latent_channels=channels, latent_size=size, patch_size=1, width=32, num_heads=2,
        context_length=40, context_width=width, fusion="image concat image",
    )  # fmt: skip
    is_computed = context == "computed"
    config = TrainConfig(
        run=str(folder / "run"), shards=str(folder / "train-shards"), backbone=backbone,
        scaling_factor="per_channel", max_steps=2, global_batch_size=4, micro_batch_size=4,
        checkpoint_every=2, log_every=1, trackers=(), engine=EngineConfig(backend="plain"),
        validation=ValidationConfig(shards=str(folder / "val-shards"), every=2, num_samples=4),
        context="computed" if is_computed else "stored",
        text_encoder=str(folder / "text") if is_computed else None,
        text=TEXT if is_computed else TextOptions(),
    )  # fmt: skip
    train(config)
    return config.run


@pytest.mark.parametrize(("kind", "autoencoder", "context"), CASES)
def test_an_encoder_of_every_class_goes_from_images_to_a_pipeline_of_diffusers(
    kind: str, autoencoder: str, context: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / kind
    folder.mkdir()
    save_autoencoder(autoencoder, folder / "vae")
    make_text_encoder(kind, folder / "text")
    manifest = encode_images(folder, context, "train")
    encode_images(folder, context, "val")
    assert manifest.caption_sources == ("short", "long")
    assert manifest.num_captions == NUM_IMAGES * 3 // 2
    run = train_two_steps(folder, context, manifest)
    last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(last["loss"])
    assert np.isfinite(last["validation_loss"])

    generated = []
    for number, prompt in enumerate(PROMPTS):
        config = GenerateConfig(
            weights=run, prompt=prompt, num_images=1, num_steps=2, seed=5, device="cpu",
            output=str(folder / f"samples-{number}"),
        )  # fmt: skip
        generated.append(read_images(generate(config))[0].astype(int))

    sampling = SamplingConfig(num_steps=2, batch_size=4)
    protocol = ProtocolConfig(
        name="test", num_samples=4, sampling=sampling, clip="scenes/clip", paper_prefix=""
    )
    evaluation = EvaluateConfig(
        weights=run, shards=str(folder / "val-shards"), images=str(folder / "val"),
        protocol=protocol, device="cpu",
    )  # fmt: skip
    (row,) = evaluate(evaluation)
    assert isinstance(row, MetricsRow)
    for measured in (row.frechet_distance, row.held_out_loss, row.clip_score):
        assert measured is not None
        assert np.isfinite(measured.value)

    export(ExportConfig(weights=run, output=str(folder / "pipeline")))
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(5, 0, torch.arange(1), Stream.SAMPLING, manifest.latent_shape)
    found = pipeline(
        list(PROMPTS), latents=noise.repeat(2, 1, 1, 1), num_inference_steps=2, output_type="np"
    ).images
    assert np.abs(np.stack(generated) - (found * 255).round()).max() <= 1
    assert np.std(generated) > 1
