"""A small dataset and recipe; real shard files, written by the encode job's own writer."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.write import npy_bytes, write_shard
from ifvit.models.config import FusionUViTConfig
from ifvit.shards import (
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    TextEncoding,
    write_manifest,
)
from ifvit.storage import write_bytes
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

NUM_SAMPLES = 21
CONTEXT_SHAPE = (5, 12)


def write_dataset(folder: Path, seed: int = 0) -> str:
    """21 samples in two shards: moments (8, 8, 8), one to three captions each."""
    draw = np.random.default_rng(seed)

    def sample(index: int) -> LatentSample:
        count = 1 + index % 3
        return LatentSample(
            key=f"{index:012d}",
            moments=draw.normal(size=(8, 8, 8)).astype(np.float16),
            context=draw.normal(size=(count, *CONTEXT_SHAPE)).astype(np.float16),
            metadata=SampleMetadata(
                image_id=index,
                captions=tuple(f"caption {index} {c}" for c in range(count)),
                width=64,
                height=64,
            ),
        )

    samples = [sample(index) for index in range(NUM_SAMPLES)]
    entries = [
        write_shard(folder, "shard-00000", samples[:12]),
        write_shard(folder, "shard-00001", samples[12:]),
    ]
    null_context = npy_bytes(np.zeros(CONTEXT_SHAPE, np.float16))
    write_bytes(str(folder / "null_context.npy"), null_context)
    manifest = Manifest(
        vae=EncoderIdentity(name="made-up", sha256="0" * 64),
        text=TextEncoding(
            encoder=EncoderIdentity(name="made-up", sha256="1" * 64),
            context_shape=CONTEXT_SHAPE,
            null_context_sha256=hashlib.sha256(null_context).hexdigest(),
        ),
        image_size=64,
        dtype="float16",
        moments_shape=(8, 8, 8),
        num_samples=NUM_SAMPLES,
        num_captions=sum(1 + index % 3 for index in range(NUM_SAMPLES)),
        latent_mean=0.0,
        latent_std=1.5,
        shards=tuple(entries),
    )
    write_manifest(str(folder), manifest)
    return str(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the small dataset."""
    return write_dataset(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the same summation order everywhere


@pytest.fixture
def recipe(shards: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a recipe of 8 quick steps; keyword arguments override its fields."""

    def build(run: str = "run", **fields: object) -> TrainConfig:
        defaults: dict[str, object] = {
            "backbone": FusionUViTConfig(
                latent_size=8,
                patch_size=2,
                width=32,
                depth=4,
                num_heads=2,
                context_length=CONTEXT_SHAPE[0],
                context_width=CONTEXT_SHAPE[1],
                conditioning="cross_attention",
                num_image_blocks=1,
                num_text_blocks=1,
            ),
            "optim": OptimConfig(learning_rate=1e-2, warmup_steps=4),
            "engine": EngineConfig(backend="plain"),
            "sample_grid": SampleGridConfig(every=0),
            "max_steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "ema_decays": (0.9,),
            "log_every": 1,
            "checkpoint_every": 100,
            "num_workers": 1,
        }
        values = {**defaults, "run": str(tmp_path / run), "shards": shards, **fields}
        return TrainConfig(**values)  # type: ignore[arg-type]

    return build
