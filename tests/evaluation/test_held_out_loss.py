"""The held-out loss of an evaluation is the one that training logged for the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_scenes import encode_scenes
from held_out_scenes import HeldOut
from made_backbone import small_shape

from ifvit.distributed import ProcessGroup, World
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.evaluation.rows import MetricsRow, read_training_rows
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.weights import load_weights
from ifvit.sampling.config import SamplingConfig
from ifvit.shards.reader import ShardReader
from ifvit.training.config import EngineConfig, SampleGridConfig, TrainConfig, ValidationConfig
from ifvit.training.train import train


@pytest.fixture(scope="session")
def training_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight scenes that are not held out, encoded alike."""
    return encode_scenes(tmp_path_factory.mktemp("training"), "train2014", 8, seed=4)


def test_training_and_evaluation_measure_the_same_number(
    config: EvaluateConfig, held_out: HeldOut, training_shards: str, tmp_path: Path
) -> None:
    channels, size, _ = held_out.manifest.latent_shape
    text = held_out.manifest.text
    assert text is not None
    recipe = TrainConfig(
        run=str(tmp_path / "trained"),
        shards=training_shards,
        backbone=small_shape(
            latent_size=size,
            latent_channels=channels,
            context_length=text.context_shape[0],
            context_width=text.context_shape[1],
        ),
        sample_grid=SampleGridConfig(every=0),
        validation=ValidationConfig(shards=held_out.shards, every=2, num_samples=20),
        max_steps=2,
        global_batch_size=4,
        micro_batch_size=4,
        engine=EngineConfig(precision="bf16"),
        log_every=2,
        trackers=(),
    )
    train(recipe)
    sampling = SamplingConfig(num_steps=2, precision="bf16")  # rounds the weights for images alone
    protocol = replace(config.protocol, scenes=False, sampling=sampling)
    (row,) = evaluate(replace(config, weights=recipe.run, images=None, protocol=protocol))
    assert isinstance(row, MetricsRow)
    assert row.held_out_loss is not None
    assert row.held_out_loss.value == read_training_rows(recipe.run)[-1].validation_loss


class Rank(ProcessGroup):
    """One of two ranks that run one after the other; each takes what the others left."""

    def __init__(self, rank: int, values: list[Any]) -> None:
        self.world, self._values = World(rank=rank, size=2, local_rank=rank), values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.world.rank] = value
        return self._values


def test_processes_share_the_work_and_find_the_losses_of_one(
    held_out: HeldOut, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.evaluation.held_out_loss._CHUNK_SIZE", 4)
    backbone, info = load_weights(run)
    loss = HeldOutLoss(DatasetConditions(ShardReader(held_out.shards)), 18, info, "cpu")
    values: list[Any] = [None, []]
    with pytest.raises((IndexError, ValueError)):  # the second rank has not measured yet
        loss.measure(backbone, Rank(0, values))
    found = loss.measure(backbone, Rank(1, values))
    assert np.array_equal(found, loss.measure(backbone))
