"""The averaged weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ifvit.models.weights import build_backbone, load_weights
from ifvit.training.config import TrainConfig
from ifvit.training.engine import EMA
from ifvit.training.train import train


def test_average_is_the_closed_form_of_its_recursion() -> None:
    values = [2.0, -1.0, 4.0, 0.5]
    ema = EMA([torch.tensor([values[0]])], decay=0.9)
    for value in values[1:]:
        ema.update([torch.tensor([value])])
    expected = 0.9**3 * 2.0 + 0.1 * (0.9**2 * -1.0 + 0.9 * 4.0 + 0.5)
    assert ema.shadows[0].item() == pytest.approx(expected, rel=1e-6)


def test_average_keeps_the_small_moves_that_bf16_would_round_away() -> None:
    ema = EMA([torch.ones(1)], decay=0.9999)
    for _ in range(10):
        ema.update([torch.full((1,), 2.0)])
    average = ema.shadows[0]
    assert average.item() == pytest.approx(2 - 0.9999**10, abs=1e-6)
    assert average.bfloat16().item() == 1.0


def test_average_does_not_follow_the_parameters_by_itself() -> None:
    parameter = torch.ones(3)
    ema = EMA([parameter], decay=0.5)
    parameter.fill_(7.0)
    assert ema.shadows[0].tolist() == [1.0, 1.0, 1.0]


def test_average_keeps_no_graph_of_the_parameters() -> None:
    parameter = torch.ones(3, requires_grad=True)
    ema = EMA([parameter], decay=0.5)
    ema.update([parameter])
    assert not ema.shadows[0].requires_grad


def test_a_run_exports_the_averages_of_its_weights_also_behind_a_restart(
    recipe: Callable[..., TrainConfig],
) -> None:
    config = recipe(max_steps=6, checkpoint_every=1, ema_decays=(0.9, 0.5))
    train(replace(config, max_steps=3))
    train(config)
    torch.manual_seed(config.seed)
    first = build_backbone(config.backbone).state_dict()
    averages = {"ema": (0.9, first), "ema_0.5": (0.5, first)}
    for step in range(1, 7):
        folder = f"{config.run}/weights/step_{step:08d}"
        backbone, info = load_weights(f"{folder}/raw")
        assert (info.step, info.ema_decay) == (step, None)
        assert info.scaling_factor == pytest.approx(1 / 1.5)  # of the shards' standard deviation
        weights = backbone.state_dict()
        for kind, (decay, before) in averages.items():
            average = {n: decay * before[n] + (1 - decay) * weights[n] for n in weights}
            averages[kind] = (decay, average)
            exported, info = load_weights(f"{folder}/{kind}")
            assert (info.step, info.ema_decay) == (step, decay)
            torch.testing.assert_close(dict(exported.state_dict()), average)
    assert not torch.allclose(averages["ema"][1]["pos_embed"], weights["pos_embed"])
