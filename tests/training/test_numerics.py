"""Gradients that are not finite, losses that jump, and scales that keep fp16 from both."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, losses, rows

from ifvit.errors import UserError
from ifvit.models.weights import load_weights
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.engine import GROWTH_INTERVAL, LossScale
from ifvit.training.guards import replay
from ifvit.training.state import TrainState
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    """A dataset in which image 7 holds one NaN."""
    samples = make_samples(21, context_shape=CONTEXT_SHAPE)
    broken = samples[7].moments.copy()
    broken[0, 0, 0] = np.nan
    samples[7] = replace(samples[7], moments=broken)
    write_shards(tmp_path / "damaged", samples, (12, 9))
    return str(tmp_path / "damaged")


@pytest.mark.parametrize("log_every", [1, 3, 8])
def test_the_first_step_that_is_not_finite_is_named_however_seldom_one_looks(
    recipe: Recipe, damaged: str, log_every: int
) -> None:
    config = recipe(shards=damaged, log_every=log_every, micro_batch_size=2)
    with pytest.raises(UserError) as error:
        train(config)
    tolerant = recipe("tolerant", shards=damaged, tolerate_nonfinite=8)
    train(tolerant)
    first = min(step for step, row in rows(tolerant).items() if row["loss"] is None)
    message = str(error.value)
    assert f"step {first}, rank 0: loss nan, gradient norm nan at positions [" in message
    assert "images [7]" in message
    assert f"ifvit train --replay {config.run}/failures/step_{first:08d}-rank_0" in message
    assert not Path(config.run, "weights").exists()


def test_a_failed_step_can_be_seen_again(
    recipe: Recipe, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(shards=damaged)
    with pytest.raises(UserError):
        train(config)
    (file,) = Path(config.run, "failures").iterdir()
    capsys.readouterr()
    replay(ReplayConfig(file=str(file)))
    then, now = capsys.readouterr().out.splitlines()
    assert then.split()[1:] == now.split()[1:] == ["loss", "nan", "gradient", "norm", "nan"]


def test_a_file_of_another_kind_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("something else")
    with pytest.raises(UserError, match="x: not written by a failed training step"):
        replay(ReplayConfig(file=str(tmp_path / "x")))


def test_tolerated_steps_change_nothing_and_are_counted(recipe: Recipe, damaged: str) -> None:
    config = recipe(shards=damaged, tolerate_nonfinite=8)
    state = train(config)
    nonfinite = [row["loss"] is None for row in rows(config).values()]
    assert state.nonfinite_steps == sum(nonfinite) > 0
    assert rows(config)[8]["nonfinite_steps"] == sum(nonfinite)
    few = recipe("few", shards=damaged, tolerate_nonfinite=sum(nonfinite) - 1)
    with pytest.raises(UserError, match=r"images \[7\]"):
        train(few)


def test_tolerated_steps_leave_the_averages_alone(recipe: Recipe, damaged: str) -> None:
    config = recipe(shards=damaged, tolerate_nonfinite=8, checkpoint_every=1)
    train(config)
    before, refused = None, 0
    for step, row in rows(config).items():
        folder = f"{config.run}/weights/step_{step:08d}"
        raw, average = (load_weights(f"{folder}/{kind}")[0].norm.bias for kind in ("raw", "ema"))
        if before is not None:
            expected = before if row["loss"] is None else torch.lerp(before, raw, 0.1)
            torch.testing.assert_close(average, expected)
            refused += row["loss"] is None and not torch.allclose(average, raw)
        before = average
    assert refused


def test_fp16_skips_what_its_scale_makes_overflow_and_comes_close_to_fp32(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, half = recipe("exact"), recipe("half", engine=EngineConfig(precision="fp16"))
    train(exact)
    train(half)
    assert losses(half) == pytest.approx(losses(exact), rel=1e-2)
    monkeypatch.setattr(LossScale, "__init__", lambda self: vars(self).update(TOO_LARGE))
    overflowing = recipe("overflowing", engine=EngineConfig(precision="fp16"))
    assert train(overflowing).nonfinite_steps == 0
    table = rows(overflowing)
    assert table[8]["overflows"] > 2
    assert table[8]["loss_scale"] == TOO_LARGE["value"] / 2 ** table[8]["overflows"]


def test_a_resumed_run_in_fp16_goes_on_with_its_loss_scale(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {**TOO_LARGE, "value": 2.0**22}
    monkeypatch.setattr(LossScale, "__init__", lambda self: vars(self).update(start))
    whole, broken = (
        recipe(name, engine=EngineConfig(precision="fp16")) for name in ("whole", "broken")
    )
    train(whole)
    train(replace(broken, max_steps=6))
    train(broken)
    table, expected = rows(broken), rows(whole)
    for key in ("loss", "loss_scale", "overflows"):
        assert [row[key] for row in table.values()] == [row[key] for row in expected.values()]
    # So that Adam has counted fewer updates than steps, and made some of them.
    assert 0 < table[8]["overflows"] < 5


TOO_LARGE = {"value": 2.0**40, "finite_updates": 0, "overflows": 0}


def test_the_loss_scale_doubles_after_enough_finite_gradients_and_halves_down_to_one() -> None:
    scale = LossScale(value=4.0)
    assert all(scale.adapt(finite=True) for _ in range(GROWTH_INTERVAL))
    assert (scale.value, scale.finite_updates) == (8.0, 0)
    assert scale.adapt(finite=True)
    assert [scale.adapt(finite=False) for _ in range(4)] == [True, True, True, False]
    assert (scale.value, scale.overflows, scale.finite_updates) == (1.0, 3, 0)


def test_a_spike_stands_out_of_the_losses_before_it() -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.1, size=400)
    calm = [float(loss) for loss in noise]
    jumps = {20: 1.9, 200: 2.2, 300: 3.0, 350: math.nan}

    def count(values: list[float]) -> TrainState:
        state = TrainState()
        for start in range(0, 400, 10):
            state = replace(state, step=start + 10).observe(values[start : start + 10])
        return state

    assert count(calm).loss_spikes == 0
    jumping = count([jumps.get(step, loss) for step, loss in enumerate(calm)])
    assert jumping.loss_spikes == 2  # the first comes before there is a history
    assert jumping.loss_mean == pytest.approx(1.0, abs=0.1)


def test_what_is_known_of_losses_does_not_depend_on_how_often_one_looks() -> None:
    values = [1.0, 2.0, 0.5, 4.0]
    at_once = replace(TrainState(), step=4).observe(values)
    state = TrainState()
    for loss in values:
        state = replace(state, step=state.step + 1).observe([loss])
    assert state == at_once
    assert at_once.loss_mean == pytest.approx(np.mean(values))
    assert at_once.loss_variance == pytest.approx(np.var(values))
