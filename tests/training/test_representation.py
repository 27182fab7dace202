"""Runs that align tokens with features: they resume exactly and export ordinary weights."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from made_backbone import SMALL_UNET
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, losses, rows, small_recipe

from ifvit.diffusion.config import RepresentationConfig
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.weights import load_weights
from ifvit.shards.reader import ShardReader
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.data import Batches
from ifvit.training.order import BatchOrder
from ifvit.training.replay import replay
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
ALONE = World(rank=0, size=1, local_rank=0)


@pytest.fixture
def aligned(recipe: Recipe, featured: str) -> TrainConfig:
    """The quick recipe, with alignment after block 1; grids of features and tokens differ."""
    config = recipe("aligned", shards=featured)
    backbone = replace(config.backbone, representation_block=1, representation_width=6)
    return replace(config, backbone=backbone)


@pytest.fixture(scope="module")
def trained(featured: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The recipe of `aligned`, trained; tests compare with its losses and do not change it."""
    config = small_recipe(str(tmp_path_factory.mktemp("trained") / "run"), featured)
    backbone = replace(config.backbone, representation_block=1, representation_width=6)
    config = replace(config, backbone=backbone)
    train(config)
    return config


def representation_losses(config: TrainConfig) -> list[float | None]:
    return [row["representation_loss"] for row in rows(config).values()]


def test_alignment_is_learned_and_weights_are_ordinary_ones(
    aligned: TrainConfig, recipe: Recipe
) -> None:
    train(replace(aligned, max_steps=30))
    found = [loss for loss in representation_losses(aligned) if loss is not None]
    assert len(found) == 30
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.05
    backbone, _ = load_weights(aligned.run)
    assert backbone.config == recipe().backbone
    exported = json.loads(Path(aligned.run, "weights/step_00000030/ema/config.json").read_text())
    assert exported["representation_block"] is None


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(aligned: TrainConfig) -> None:
    settings = RepresentationConfig(weight=1.0, stop_step=6)
    whole = replace(aligned, run=f"{aligned.run}_whole", representation=settings, log_every=4)
    train(whole)
    broken = replace(whole, run=f"{aligned.run}_broken")
    for max_steps in (3, 5, 8):
        train(replace(broken, max_steps=max_steps))
    for step in (4, 8):
        assert rows(broken)[step]["loss"] == rows(whole)[step]["loss"]
        mean = rows(whole)[step]["representation_loss"]
        assert mean is not None
        assert rows(broken)[step]["representation_loss"] == mean


def test_after_the_stop_step_features_are_not_read(aligned: TrainConfig) -> None:
    stopped = replace(aligned, representation=RepresentationConfig(stop_step=3))
    train(stopped)
    found = representation_losses(stopped)
    assert None not in found[:3]
    assert set(found[3:]) == {None}
    order = BatchOrder(
        shard_sizes=np.array([12, 9]),
        global_batch_size=7,
        seed=0,
        caption_dropout=0.0,
        random_flip=True,
        representation=stopped.representation,
    )
    reader = ShardReader(stopped.shards)
    batches = Batches(reader, order, 7, ALONE, num_threads=1)
    with closing(batches.stream(0, 0, torch.device("cpu"))) as stream:
        for step, batch in enumerate(islice(stream, 5)):
            if step >= 3:
                assert batch.features is None
                continue
            positions = np.arange(7)
            expected = np.empty((7, 4, 6), np.float16)
            samples, hflip = order.sample_indices(7 * step, positions), order.hflip(step, positions)
            assert hflip.any()
            reader.read_features(samples, expected, hflip)
            assert np.array_equal(batch.features, expected)


def test_without_alignment_features_change_nothing(
    recipe: Recipe, featured: str, trained: TrainConfig
) -> None:
    plain = recipe("plain", shards=featured)
    train(plain)
    assert set(representation_losses(plain)) == {None}
    assert losses(trained)[0] == losses(plain)[0]  # before the first update
    assert losses(trained)[2:] != losses(plain)[2:]


@pytest.mark.parametrize(
    ("engine", "tolerance"),
    [
        (EngineConfig(backend="plain", activation_checkpointing=True), 0.0),
        (EngineConfig(backend="plain", precision="bf16"), 2e-2),
    ],
)
def test_recomputation_and_bf16_give_the_same_losses(
    aligned: TrainConfig, trained: TrainConfig, engine: EngineConfig, tolerance: float
) -> None:
    other = replace(aligned, engine=engine)
    train(other)
    expected = representation_losses(trained)
    assert representation_losses(other) == pytest.approx(expected, rel=tolerance, abs=0)
    assert losses(other) == pytest.approx(losses(trained), rel=tolerance, abs=0)


def test_exported_weights_start_a_run_with_a_new_projector(
    aligned: TrainConfig, trained: TrainConfig, recipe: Recipe, featured: str
) -> None:
    tuned = replace(aligned, initial_weights=trained.run, max_steps=1)
    train(tuned)
    assert losses(tuned) != losses(trained)[:1]
    plain = recipe("plain", shards=featured, initial_weights=trained.run, max_steps=1)
    train(plain)
    assert losses(plain) == losses(tuned)


def test_recipes_that_do_not_fit_the_shards_are_one_line(
    aligned: TrainConfig, shards: str, recipe: Recipe
) -> None:
    with pytest.raises(UserError, match="holds no features; encode with --image_encoder"):
        train(replace(aligned, shards=shards))
    wider = replace(aligned.backbone, representation_width=8)
    with pytest.raises(UserError, match=r"features have 6 channels, but backbone\.repr.* is 8"):
        train(replace(aligned, backbone=wider))
    for backbone in (recipe().backbone, SMALL_UNET):
        with pytest.raises(UserError, match=r"has no effect; set backbone\.representation_block"):
            recipe(backbone=backbone, representation=RepresentationConfig(weight=1.0))


def test_a_failed_step_is_computed_again_with_its_features(
    aligned: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make_samples(21, context_shape=CONTEXT_SHAPE, feature_shape=(4, 6))
    broken = samples[7].features.copy()
    broken[2, 3] = np.nan
    samples[7] = replace(samples[7], features=broken)
    write_shards(tmp_path / "broken", samples, (12, 9))
    with pytest.raises(UserError, match=r"images \[7\]") as error:
        train(replace(aligned, shards=str(tmp_path / "broken"), micro_batch_size=4))
    file = str(error.value).split()[-1]
    capsys.readouterr()
    replay(ReplayConfig(file=file))
    then, now = capsys.readouterr().out.splitlines()
    assert then.split()[1:] == now.split()[1:] == ["loss", "nan", "gradient", "norm", "nan"]
