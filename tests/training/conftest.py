"""A small dataset and recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_shards import make_samples, write_shards

from ifvit.models.config import FusionUViTConfig
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

NUM_SAMPLES = 21
CONTEXT_SHAPE = (5, 12)


def write_dataset(folder: Path, seed: int = 0) -> str:
    """21 samples in two shards: moments (8, 8, 8), one to three captions each."""
    write_shards(folder, make_samples(NUM_SAMPLES, context_shape=CONTEXT_SHAPE, seed=seed), (12, 9))
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
