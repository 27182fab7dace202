"""The held-out loss of a run is that of its EMA weights, however the run was trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, finish, rows, start

from ifvit.diffusion.config import ObjectiveConfig
from ifvit.errors import UserError
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.weights import load_weights
from ifvit.shards.format import TextSettings, write_manifest
from ifvit.shards.reader import ShardReader
from ifvit.training.checkpoint import committed_steps
from ifvit.training.config import EngineConfig, TrainConfig, ValidationConfig
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
NAMES = ("validation_loss", *(f"validation_loss_t{k}" for k in range(8)))


def validations(config: TrainConfig) -> dict[int, list[float]]:
    """The nine numbers of each validation, by step."""
    return {
        step: [row[name] for name in NAMES]
        for step, row in rows(config).items()
        if row["validation_loss"] is not None
    }


@pytest.fixture
def validated(recipe: Recipe, other_shards: str) -> Recipe:
    """Builds a recipe that validates 20 samples every 4 steps."""
    validation = ValidationConfig(shards=other_shards, every=4, num_samples=20)

    def build(run: str = "run", **fields: object) -> TrainConfig:
        return recipe(run, **{"validation": validation, **fields})

    return build


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_the_loss_is_the_plain_error_of_the_exported_ema_weights(
    validated: Recipe, other_shards: str, prediction: str
) -> None:
    objective = ObjectiveConfig(prediction=prediction, min_snr_gamma=1.0)  # type: ignore[arg-type]
    config = validated(objective=objective, max_steps=5)
    train(config)
    backbone, info = load_weights(config.run)
    conditions = DatasetConditions(ShardReader(other_shards))
    losses = HeldOutLoss(conditions, 20, info, "cpu").measure(backbone)
    assert losses.shape == (20, 8)
    mean, *by_time = validations(config)[5]
    assert mean == losses.mean(axis=1).mean() == pytest.approx(np.mean(by_time), rel=1e-12)
    assert by_time == losses.mean(axis=0).tolist()
    seen: list[torch.Tensor] = []

    def predict_nothing(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    plain = HeldOutLoss(conditions, 20, info, "cpu").measure(predict_nothing).mean(axis=0)
    if prediction == "epsilon":
        assert plain == pytest.approx(1, abs=0.1)  # the variance of the noise, without a weight
    times = [float(t[0]) for t in seen]
    exact = [1000 * (k + 0.5) / 8 for k in range(8)]
    assert times == (exact if prediction == "flow" else [int(t) for t in exact])


def test_validation_changes_no_loss_of_the_training(validated: Recipe, whole: TrainConfig) -> None:
    config = validated()
    train(config)
    assert list(validations(config)) == [4, 8]
    assert [row["loss"] for row in rows(config).values()] == [
        row["loss"] for row in rows(whole).values()
    ]
    assert rows(config)[8]["validation_seconds"] > 0


def test_restarts_do_not_change_the_validation(validated: Recipe) -> None:
    whole, resumed = validated("whole"), validated("resumed", checkpoint_every=3)
    train(whole)
    train(replace(resumed, max_steps=6))
    assert list(validations(resumed)) == [4, 6]
    train(resumed)
    found = validations(resumed)
    del found[6]  # the last step of the first part
    assert found == validations(whole)
    other = replace(whole.validation, every=2)
    again = validated("again")
    train(replace(again, max_steps=4))
    train(replace(again, validation=other))  # a resumed run may validate more often
    assert list(validations(again)) == [4, 6, 8]
    assert {step: validations(again)[step] for step in (4, 8)} == validations(whole)
    fewer = replace(again.validation, num_samples=9)  # another set, whose losses do not compare
    with pytest.raises(UserError, match=r"started with validation\.num_samples: 20, .* now says 9"):
        train(replace(again, validation=fewer, max_steps=9))
    train(replace(again, validation=ValidationConfig(), max_steps=9))


def train_in_turn(recipes: list[TrainConfig]) -> None:
    """Train all recipes on one rank; DeepSpeed comes last, which accelerate cannot leave."""
    for config in recipes:
        AcceleratorState._reset_state()
        train(config)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_have_the_validation_of_one(validated: Recipe) -> None:
    """A learning rate of 0 keeps the weights equal, which sums of gradients in two parts do not."""
    optim = replace(validated().optim, learning_rate=0.0)
    alone = validated("alone", optim=optim)
    train(alone)
    engines = {"ddp": EngineConfig(backend="plain"), "zero3": EngineConfig(zero_stage=3)}
    pairs = [
        validated(name, optim=optim, engine=engine, micro_batch_size=4)
        for name, engine in engines.items()
    ]
    assert finish(start(train_in_turn, [pairs], 2)) == [0, 0]
    for pair in pairs:
        assert validations(pair) == validations(alone)


def test_a_seed_changes_the_noise_and_a_longer_set_keeps_its_first_samples(
    validated: Recipe, other_shards: str
) -> None:
    config = validated(max_steps=1)
    train(config)
    backbone, info = load_weights(config.run)
    conditions = DatasetConditions(ShardReader(other_shards))
    few, more = (HeldOutLoss(conditions, n, info, "cpu").measure(backbone) for n in (20, 21))
    assert np.allclose(few, more[:20], rtol=1e-6)
    assert not np.allclose(few, HeldOutLoss(conditions, 20, info, "cpu", seed=1).measure(backbone))
    with pytest.raises(UserError, match="has 21 samples, but num_samples is 22; lower it"):
        HeldOutLoss(conditions, 22, info, "cpu")


def test_a_run_of_any_precision_is_validated_in_fp32(validated: Recipe) -> None:
    single, half = validated("single"), validated("half", engine=EngineConfig(precision="bf16"))
    optim = replace(single.optim, learning_rate=0.0)
    single, half = replace(single, optim=optim), replace(half, optim=optim)
    train(single)
    train(half)
    assert validations(single) == validations(half)


def test_classes_are_validated(
    validated: Recipe, labelled: str, tmp_path: Path, recipe: Recipe
) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    write_shards(held_out, make_samples(9, labelled=True, seed=1), (9,))
    shape = replace(recipe().backbone, num_classes=2, context_length=None, context_width=None)
    validation = ValidationConfig(shards=str(held_out), every=4, num_samples=9)
    config = recipe(shards=labelled, backbone=shape, validation=validation)
    train(config)
    assert list(validations(config)) == [4, 8]


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(validated: Recipe) -> None:
    """A huge learning rate makes the loss rise after the first steps."""
    config = validated(
        keep_best="validation_loss", keep_checkpoints=1, checkpoint_every=4, max_steps=24
    )
    train(config)
    found = {step: values[0] for step, values in validations(config).items()}
    best = min(found, key=lambda step: found[step])
    assert committed_steps(config.run) == sorted({best, 24})


def test_held_out_shards_must_be_encoded_alike_and_not_be_trained_on(
    validated: Recipe, shards: str, other_shards: str, labelled: str, tmp_path: Path
) -> None:
    def refused(url: str) -> str:
        config = validated(validation=ValidationConfig(shards=url, every=4, num_samples=20))
        with pytest.raises(UserError) as error:
            train(config)
        assert not Path(config.run, "config.yaml").exists()
        return str(error.value)

    assert "belong to the training shards" in refused(shards)
    assert labelled in refused(labelled)
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, make_samples(21, context_shape=(4, 12)), (21,))
    assert f"{other}: contexts are 4x12" in refused(str(other))
    manifest = write_shards(tmp_path, make_samples(21), (21,))
    assert manifest.text
    settings = TextSettings(state="penultimate", precision="bf16")
    encoder = replace(manifest.text.encoder, settings=settings)
    write_manifest(str(tmp_path), replace(manifest, text=replace(manifest.text, encoder=encoder)))
    assert "text.state" in refused(str(tmp_path))
    assert CONTEXT_SHAPE == (5, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"log_every": 3}, "validation.every 4 is not a multiple of log_every 3"),
        ({"keep_best": "validation_loss", "checkpoint_every": 6}, "keep_best: validation_loss"),
        ({"keep_best": "validation_loss", "validation": ValidationConfig()}, "keep_best"),
    ],
)
def test_cadences_that_do_not_meet_are_refused(
    validated: Recipe, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validated(**fields)
