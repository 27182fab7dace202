"""Gradients that are not finite stop the run, name the image, and can be computed again."""

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, FLOW, FLOW_AND_MUON, losses, rows, small_recipe
from safetensors.torch import save_file

from ifvit.errors import UserError
from ifvit.models.weights import load_weights
from ifvit.records import dump_sealed
from ifvit.training.config import ReplayConfig, TrainConfig
from ifvit.training.loop import TrainState
from ifvit.training.replay import _read_failure, _sha256, replay
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def tolerant(
    damaged: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, TrainState]:
    """A run that skips the steps with the damaged image and saves after every step."""
    run = str(tmp_path_factory.mktemp("tolerant") / "run")
    config = small_recipe(run, damaged, tolerate_nonfinite=8, checkpoint_every=1, **FLOW_AND_MUON)
    return config, train(config)


@pytest.mark.parametrize("log_every", [1, 3, 8])
def test_the_first_nonfinite_step_is_named_and_can_be_computed_again(
    recipe: Recipe,
    damaged: str,
    tolerant: tuple[TrainConfig, TrainState],
    capsys: pytest.CaptureFixture[str],
    log_every: int,
) -> None:
    config = recipe(shards=damaged, log_every=log_every, micro_batch_size=2)
    with pytest.raises(UserError) as error:
        train(config)
    first = min(step for step, row in rows(tolerant[0]).items() if row["loss"] is None)
    message = str(error.value)
    assert f"step {first}, rank 0: loss nan, gradient norm nan at positions [" in message
    assert "images [7]" in message
    file = f"{config.run}/failures/step_{first:08d}-rank_0.safetensors"
    assert message.endswith(f"ifvit train --replay {file}")
    assert not Path(config.run, "weights").exists()
    capsys.readouterr()
    replay(ReplayConfig(file=file))
    then, now = capsys.readouterr().out.splitlines()
    assert then.split()[1:] == now.split()[1:] == ["loss", "nan", "gradient", "norm", "nan"]


def test_a_step_on_deterministic_latents_of_their_own_scaling_can_be_computed_again(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make_samples(21, moments_shape=(4, 8, 8), context_shape=CONTEXT_SHAPE)
    samples[7].moments[0, 0, 0] = np.nan
    write_shards(tmp_path, samples, (12, 9), deterministic=True)
    config = recipe(shards=str(tmp_path), scaling_factor="per_channel")
    with pytest.raises(UserError, match=r"images \[7\]"):
        train(config)
    (file,) = Path(config.run, "failures").iterdir()
    replay(ReplayConfig(file=str(file)))
    then, now = capsys.readouterr().out.splitlines()[-2:]
    assert then.split()[1:] == now.split()[1:] == ["loss", "nan", "gradient", "norm", "nan"]


def test_a_file_of_another_kind_cannot_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("something else")
    with pytest.raises(UserError, match="x: not written by a failed training step"):
        replay(ReplayConfig(file=str(tmp_path / "x")))


Tensors = dict[str, torch.Tensor]


def write_failure(folder: Path, facts: dict[str, Any], tensors: Tensors) -> str:
    """A file of these facts and tensors with a valid seal."""
    facts["tensors_sha256"] = _sha256(tensors)
    file = folder / "x.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, {"failure": dump_sealed(facts).decode()})
    return str(file)


@pytest.fixture(scope="module")
def failure(damaged: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that a failed step of a flow has written."""
    run = str(tmp_path_factory.mktemp("failed") / "run")
    config = small_recipe(run, damaged, objective=FLOW)
    with pytest.raises(UserError, match="loss nan"):
        train(config)
    (path,) = Path(config.run, "failures").iterdir()
    return path


def test_a_repaired_failure_has_the_loss_of_the_step_on_repaired_shards(
    failure: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, tensors = _read_failure(str(failure))
    whole = make_samples(21, context_shape=CONTEXT_SHAPE)[7].moments[0, 0, 0]
    tensors["moments"].nan_to_num_(float(whole))
    file = write_failure(tmp_path, asdict(facts), tensors)
    replay(ReplayConfig(file=file))
    loss = capsys.readouterr().out.splitlines()[1].split()[2]
    repaired = recipe(objective=FLOW, max_steps=facts.step + 1)
    train(repaired)
    assert float(loss) == pytest.approx(losses(repaired)[-1], rel=1e-6)


def test_flipped_bytes_of_a_failure_are_found(failure: Path, tmp_path: Path) -> None:
    chance, data, file = random.Random(0), failure.read_bytes(), tmp_path / "x.safetensors"
    for number in range(60):
        flipped = bytearray(data)
        # Half of the flips hit the header, which is much smaller than the tensors.
        flipped[chance.randrange(len(data) if number % 2 else 4000)] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"x\.safetensors: ") as error:
            replay(ReplayConfig(file=str(file)))
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, tensors: facts.update(step=-1),
        lambda facts, tensors: facts.update(scaling={"scale": 0.0}),
        lambda facts, tensors: facts.update(precision="fp8"),
        lambda facts, tensors: tensors.pop("moments"),
        lambda facts, tensors: tensors.pop("head_norm.bias"),
        lambda facts, tensors: tensors.update(moments=tensors["moments"][:, :2]),
        lambda facts, tensors: tensors.update(condition=tensors["condition"][:, :1]),
        lambda facts, tensors: tensors.update(positions=tensors["positions"][:1]),
        lambda facts, tensors: tensors.update(positions=tensors["positions"].float()),
        lambda facts, tensors: tensors.update({"head_norm.bias": torch.zeros(1)}),
    ],
)
def test_a_failure_that_fits_its_seal_but_not_its_backbone_is_one_line(
    failure: Path, tmp_path: Path, change: Callable[[dict[str, Any], Tensors], object]
) -> None:
    facts, tensors = _read_failure(str(failure))
    changed = asdict(facts)
    change(changed, tensors)
    file = write_failure(tmp_path, changed, tensors)
    with pytest.raises(UserError, match=r"x\.safetensors: "):
        replay(ReplayConfig(file=file))


def test_tolerated_steps_are_skipped_and_counted(
    recipe: Recipe, damaged: str, tolerant: tuple[TrainConfig, TrainState]
) -> None:
    config, state = tolerant
    table = rows(config)
    num_nonfinite = sum(row["loss"] is None for row in table.values())
    assert state.nonfinite_steps == table[8]["nonfinite_steps"] == num_nonfinite > 0
    before, num_compared = None, 0
    for step, row in table.items():
        folder = f"{config.run}/weights/step_{step:08d}"
        raw, ema = (load_weights(f"{folder}/{kind}")[0].state_dict() for kind in ("raw", "ema"))
        for name in ("head_norm.bias", "blocks.0.mlp.fc1.weight") if before else ():
            skipped = row["loss"] is None
            expected = before[name] if skipped else torch.lerp(before[name], raw[name], 0.1)
            torch.testing.assert_close(ema[name], expected)
            num_compared += skipped and not torch.allclose(ema[name], raw[name])
        before = ema
    assert num_compared
    few = recipe("few", shards=damaged, tolerate_nonfinite=num_nonfinite - 1)
    with pytest.raises(UserError, match=r"images \[7\]"):
        train(few)
