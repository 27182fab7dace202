"""Autoencoders of today through the whole path: encode, verify, train, generate, export, diffusers.

Each autoencoder comes with another way to scale its latents.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from made_autoencoders import KINDS, save_autoencoder
from PIL import Image
from torch import Tensor

from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig, StatsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import inspect_shards, stats, verify
from ifvit.conditions import Condition
from ifvit.diffusion.objectives import LatentScaler, Objective
from ifvit.diffusion.schedules import alphas_cumprod
from ifvit.errors import UserError
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.weights import load_weights
from ifvit.rng import Stream, normal
from ifvit.sampling.config import ExportConfig, GenerateConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate
from ifvit.sampling.load import load_decoder
from ifvit.sampling.samples import read_images
from ifvit.shards.format import write_manifest
from ifvit.shards.reader import ShardReader
from ifvit.training.config import EngineConfig, SampleGridConfig, TrainConfig, ValidationConfig
from ifvit.training.train import train

NUM_IMAGES = 10
SCALINGS: dict[str, dict[str, Any]] = {
    "kl4": {"scaling_factor": None},
    "kl16": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "kl32": {"scaling_factor": "per_channel"},
    "dc": {"scaling_factor": "per_channel"},
}


@dataclass(frozen=True)
class Trained:
    kind: str
    shards: str
    config: TrainConfig

    @property
    def deterministic(self) -> bool:
        return self.kind == "dc"

    def reader(self) -> ShardReader:
        return ShardReader(self.shards)

    def moments(self) -> np.ndarray:
        reader = self.reader()
        return np.stack([reader.moments(sample) for sample in range(len(reader))])


def encode_images(folder: Path, kind: str, name: str, first: int) -> str:
    """Encode random pictures of smooth colours; `first` tells one set from another."""
    generator = np.random.default_rng(first)
    (folder / name).mkdir()
    rows = ["path,caption"]
    for number in range(first, first + NUM_IMAGES):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(folder / name / f"{number}.png")
        rows.append(f"{number}.png,circle number {number}")
    (folder / f"{name}.csv").write_text("\n".join(rows))
    config = EncodeConfig(
        source="table", images=str(folder / name), captions=str(folder / f"{name}.csv"),
        output=str(folder / f"{name}-shards"), vae=str(folder / "vae"), text_encoder="scenes/clip",
        image_size=64, samples_per_shard=4, batch_size=3, device="cpu", num_workers=1, flip=True,
    )  # fmt: skip
    assert encode(config) is not None
    return config.output


def recipe(folder: Path, shards: str, run: str = "run", **fields: Any) -> TrainConfig:
    channels, size, _ = ShardReader(shards).manifest.latent_shape
    backbone = FusionTransformerConfig(
        latent_channels=channels, latent_size=size, patch_size=1, width=32, num_heads=2,
        context_length=16, context_width=64, fusion="image cross_attention image",
    )  # fmt: skip
    return TrainConfig(
        run=str(folder / run), shards=shards, backbone=backbone, max_steps=2, global_batch_size=4,
        micro_batch_size=4, checkpoint_every=2, log_every=1, trackers=(), random_flip=True,
        engine=EngineConfig(backend="plain"), **fields,
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two steps, with held-out loss and grid, on shards of the autoencoder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    save_autoencoder(request.param, folder / "vae")
    shards = encode_images(folder, request.param, "train", 0)
    held_out = encode_images(folder, request.param, "val", NUM_IMAGES)
    config = recipe(
        folder, shards, **SCALINGS[request.param],
        sample_grid=SampleGridConfig(every=2, num_steps=2),
        validation=ValidationConfig(shards=held_out, every=2, num_samples=4),
    )  # fmt: skip
    train(config)
    return Trained(request.param, shards, config)


def test_shards_verify_and_show_what_they_hold(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = trained.reader().manifest
    verify(ShardsConfig(url=trained.shards))
    stats(StatsConfig(url=trained.shards))
    inspect_shards(InspectConfig(url=trained.shards, grid=str(tmp_path / "grid.png")))
    assert Image.open(tmp_path / "grid.png").size[0] > 64
    text = capsys.readouterr().out
    channels, height, width = manifest.latent_shape
    stored = f"latents {channels}" if trained.deterministic else f"moments {2 * channels}"
    assert f"{stored}x{height}x{width}" in text
    assert " ".join(f"{mean:.5f}" for mean in manifest.channel_mean) in text


def test_statistics_are_those_of_all_latents(trained: Trained) -> None:
    manifest, moments = trained.reader().manifest, trained.moments().astype(np.float64)
    assert manifest.deterministic == trained.deterministic
    assert moments.shape == (NUM_IMAGES, *manifest.moments_shape)
    channels = manifest.latent_shape[0]
    mean, variance = moments[:, :channels], 0.0
    if not trained.deterministic:
        variance = np.exp(moments[:, channels:])
    second, axes = mean**2 + variance, (0, 2, 3)
    std = np.sqrt(second.mean(axes) - mean.mean(axes) ** 2)
    np.testing.assert_allclose(manifest.channel_mean, mean.mean(axes), rtol=1e-9)
    np.testing.assert_allclose(manifest.channel_std, std, rtol=1e-9)
    assert manifest.latent_mean == pytest.approx(mean.mean(), rel=1e-9)
    assert manifest.latent_std == pytest.approx(np.sqrt(second.mean() - mean.mean() ** 2), rel=1e-9)


def test_latents_are_scaled_as_the_recipe_says(trained: Trained) -> None:
    info = load_weights(trained.config.run)[1]
    moments = torch.from_numpy(trained.moments())
    objective = Objective(
        trained.config.objective, scaling=info.scaling, deterministic=trained.deterministic, seed=0
    )
    positions = torch.arange(len(moments))
    steps = range(1 if trained.deterministic else 200)
    latents = torch.cat([objective.sample_posterior(moments, step, positions) for step in steps])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3), correction=0)
    if trained.config.scaling_factor == "per_channel":
        atol = 1e-4 if trained.deterministic else 2e-2
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=atol)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=atol)
    elif trained.config.scaling_factor is None:
        assert latents.std() == pytest.approx(1.0, abs=2e-2)
    else:
        unscaled = latents / 0.3611 + 0.1159
        assert unscaled.mean() == pytest.approx(trained.reader().manifest.latent_mean, abs=1e-2)


def test_the_decoder_inverts_the_scaling_and_has_a_gradient(trained: Trained) -> None:
    info = load_weights(trained.config.run)[1]
    scaler, shape = LatentScaler(info.scaling), trained.reader().manifest.latent_shape
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaler.unscale(scaler.scale(z)), z)
    latents = scaler.scale(z).requires_grad_()
    load_decoder(info, "cpu")(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().sum() > 0


def test_training_logs_a_held_out_loss_and_draws_a_grid(trained: Trained) -> None:
    run = Path(trained.config.run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert np.isfinite(rows[-1]["validation_loss"])
    assert list((run / "samples").rglob("*.png"))


@pytest.mark.parametrize("trained", ["dc"], indirect=True)
def test_the_held_out_loss_of_deterministic_latents_has_no_posterior_noise(
    trained: Trained,
) -> None:
    info, reader = load_weights(trained.config.run)[1], trained.reader()
    scaling = np.array([info.scaling_factor, info.shift_factor], np.float32)[:, None, :, None, None]
    x_0 = torch.from_numpy((trained.moments() - scaling[1]) * scaling[0])

    def oracle(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        abar = alphas_cumprod()[timesteps].float().view(-1, 1, 1, 1)
        return (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()

    losses = HeldOutLoss(DatasetConditions(reader), len(reader), info, "cpu").measure(oracle)
    assert losses.max() < 1e-6


@pytest.mark.parametrize("method", ["plain", "date"])
def test_images_are_generated_with_and_without_an_alignment_method(
    trained: Trained, method: str, tmp_path: Path
) -> None:
    config = GenerateConfig(
        weights=trained.config.run, prompt="circle number 3", num_images=2, num_steps=3, seed=5,
        output=str(tmp_path), device="cpu", method=method,
    )  # fmt: skip
    assert read_images(generate(config)).shape == (2, 64, 64, 3)


def test_plain_diffusers_decodes_the_images_of_generate(trained: Trained, tmp_path: Path) -> None:
    config = GenerateConfig(
        weights=trained.config.run, prompt="circle number 3", num_images=2, num_steps=3, seed=5,
        output=str(tmp_path / "samples"), device="cpu",
    )  # fmt: skip
    generated = read_images(generate(config)).astype(int)
    folder = tmp_path / "pipeline"
    export(ExportConfig(weights=trained.config.run, output=str(folder)))
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(5, 0, torch.arange(2), Stream.SAMPLING, trained.reader().manifest.latent_shape)
    found = pipeline(
        ["circle number 3"] * 2, latents=noise, num_inference_steps=3, output_type="np"
    ).images
    assert np.abs(generated - (found * 255).round()).max() <= 1
    assert generated.std() > 1

    index = json.loads((folder / "model_index.json").read_text())
    info = load_weights(trained.config.run)[1]
    assert index["vae"][1] == ("AutoencoderDC" if trained.kind == "dc" else "AutoencoderKL")
    assert np.array_equal(index["scaling_factor"], info.scaling_factor)
    assert np.array_equal(index["shift_factor"], info.shift_factor)
    stated = json.loads((folder / "vae/config.json").read_text())
    if trained.kind == "kl32":
        assert stated["scaling_factor"] == 1.0
        np.testing.assert_array_equal(stated["latents_mean"], info.shift_factor)
        np.testing.assert_allclose(stated["latents_std"], 1.0 / np.array(info.scaling_factor))
    elif trained.kind == "dc":  # its config has no key for a scaling per channel
        assert stated["scaling_factor"] == 0.41407
    else:
        assert stated["scaling_factor"] == info.scaling_factor
        assert stated["shift_factor"] == info.shift_factor


def test_weights_of_another_scaling_are_refused(trained: Trained, tmp_path: Path) -> None:
    run, other = trained.config.run, {"scaling_factor": 0.5, "shift_factor": 0.25}
    first = recipe(tmp_path, trained.shards, initial_weights=run, **other)
    with pytest.raises(UserError, match=r"has scaling_factor: .*, but the recipe says 0\.5, shift"):
        train(first)
    branched = recipe(tmp_path, trained.shards, "branched", branch=f"{run}@latest", **other)
    with pytest.raises(UserError, match="scaling_factor and shift_factor to match"):
        train(replace(branched, max_steps=3))
    info = load_weights(run)[1]  # numbers that can be copied from weights.json
    same = {"scaling_factor": info.scaling_factor, "shift_factor": info.shift_factor}
    train(recipe(tmp_path, trained.shards, "started", initial_weights=run, **same))
    train(replace(branched, max_steps=3, **same))


def test_a_channel_without_deviation_cannot_be_scaled_by_it(
    trained: Trained, tmp_path: Path
) -> None:
    shards = tmp_path / "constant"
    shards.mkdir()
    reader = trained.reader()
    for path in Path(trained.shards).glob("*"):
        if path.is_file():
            (shards / path.name).write_bytes(path.read_bytes())
    stds = (*reader.manifest.channel_std[:-1], 0.0)
    write_manifest(str(shards), replace(reader.manifest, channel_std=stds))
    config = recipe(tmp_path, str(shards), scaling_factor="per_channel")
    number = reader.manifest.latent_shape[0] - 1
    with pytest.raises(UserError, match=rf"constant: channel {number} of the latents is constant"):
        train(config)
