"""Guidance uses the null context that the weights were trained with: of "", or zeros."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_shards import make_samples, write_shards

from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.images import Pixels
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.text_encoders import TextEncoder, load_text_encoder
from ifvit.models.weights import load_weights, save_weights
from ifvit.rng import Stream, normal
from ifvit.sampling.config import ExportConfig, GenerateConfig, SamplingConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate
from ifvit.sampling.load import load_conditions, load_decoder
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.samples import read_images, read_settings
from ifvit.shards.reader import ShardReader

PROMPTS = ["two red circles", ""]
SETTINGS: dict[str, Any] = {"num_steps": 2, "guidance_scale": 5.0, "batch_size": 2}


@pytest.fixture(scope="module")
def zeros(weights: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the other tests, as if they had been trained with zeros."""
    folder = str(tmp_path_factory.mktemp("zeros"))
    backbone, info = load_weights(weights)
    save_weights(folder, backbone, dataclasses.replace(info, null_context="zeros"))
    return folder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder("scenes/clip")


def generate_prompts(weights: str, folder: Path) -> Pixels:
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n")
    given = {"weights": weights, "device": "cpu", **SETTINGS}
    config = GenerateConfig(
        prompts=str(folder / "prompts.txt"), output=str(folder / "prompted"), **given
    )
    empty = GenerateConfig(prompt="", output=str(folder / "empty"), **given)
    return read_images([*generate(config), *generate(empty)])


def test_the_empty_prompt_stands_for_the_null_context(
    weights: str, zeros: str, encoder: TextEncoder
) -> None:
    own, other = (load_conditions(load_weights(url)[1], "cpu") for url in (weights, zeros))
    contexts = encoder.encode(PROMPTS)
    torch.testing.assert_close(own.encode(PROMPTS), contexts)
    torch.testing.assert_close(own.null, contexts[1:])
    torch.testing.assert_close(other.encode(PROMPTS)[0], contexts[0])
    assert not other.encode(PROMPTS)[1].any()
    assert not other.null.any()


def test_shards_give_the_null_context_of_the_weights(
    weights: str, zeros: str, tmp_path: Path
) -> None:
    write_shards(tmp_path, make_samples(2), [2])
    reader = ShardReader(str(tmp_path))
    own, other = (
        DatasetConditions(reader, load_weights(url)[1].null_context).null
        for url in (weights, zeros)
    )
    np.testing.assert_array_equal(own, reader.null_context[None])
    assert own.shape == other.shape
    assert own.any()
    assert not other.any()


def test_generated_images_are_guided_by_zeros_as_by_hand(
    weights: str, zeros: str, encoder: TextEncoder, tmp_path: Path
) -> None:
    found = generate_prompts(zeros, tmp_path)
    assert read_settings(str(tmp_path / "empty"))["null_context"] == "zeros"
    backbone, info = load_weights(zeros)
    context = encoder.encode(PROMPTS[:1])
    null = torch.zeros_like(context)
    sampler = Sampler(
        backbone=backbone,
        schedule=NoiseSchedule(),
        decode=load_decoder(info, "cpu"),
        null_condition=null,
    )
    batches = [
        ConditionBatch(positions=torch.tensor([0]), condition=condition)
        for condition in (context, null)
    ]
    settings = SamplingConfig(**SETTINGS)
    expected = np.concatenate([*generate_images(sampler, batches, settings)])
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "own").mkdir()
    own = generate_prompts(weights, tmp_path / "own")
    assert (own[0] != found[0]).any()
    assert (own[1] != found[1]).any()


def test_an_exported_pipeline_is_guided_by_zeros(zeros: str, tmp_path: Path) -> None:
    export(ExportConfig(weights=zeros, output=str(tmp_path / "pipeline")))
    assert "| null context | zeros |" in (tmp_path / "pipeline/README.md").read_text()
    pipeline = FusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    channels = pipeline.backbone.config.latent_channels
    noise = normal(SamplingConfig().seed, 0, torch.tensor([0]), Stream.SAMPLING,
                   (channels, 8, 8))  # fmt: skip
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
    images = [
        pipeline(prompt, latents=noise, negative_prompt=negative, **options).images[0]
        for prompt, negative in ((PROMPTS[0], None), (PROMPTS[0], ""), ("", None))
    ]
    found = (np.stack(images) * 255).round()
    expected = generate_prompts(zeros, tmp_path)[[0, 0, 1]].astype(int)
    assert np.abs(found - expected).max() <= 1
