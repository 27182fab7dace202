"""The averaged weights."""

import contextlib

import pytest
import torch
from torch import nn

from ifvit.training.ema import EMA


def test_average_is_the_closed_form_of_its_recursion() -> None:
    layer = nn.Linear(1, 1, bias=False)
    values = [2.0, -1.0, 4.0, 0.5]
    layer.weight.data.fill_(values[0])
    ema = EMA(layer, decay=0.9)
    for value in values[1:]:
        layer.weight.data.fill_(value)
        ema.update()
    expected = 0.9**3 * 2.0 + 0.1 * (0.9**2 * -1.0 + 0.9 * 4.0 + 0.5)
    assert ema.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_average_keeps_the_small_moves_that_bf16_would_round_away() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = EMA(layer, decay=0.9999)
    layer.weight.data.fill_(2.0)
    for _ in range(10):
        ema.update()
    average = ema.state_dict()["weight"]
    assert average.item() == pytest.approx(2 - 0.9999**10, abs=1e-6)
    assert average.bfloat16().item() == 1.0


def test_applied_shows_the_average_and_puts_the_weights_back_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    ema = EMA(layer, decay=0.5)
    start = layer.weight.detach().clone()
    layer.weight.data.add_(1.0)
    ema.update()
    seen = []
    with contextlib.suppress(RuntimeError), ema.applied():
        seen.append(layer.weight.detach().clone())
        raise RuntimeError
    assert torch.allclose(seen[0], start + 0.5)
    assert torch.allclose(layer.weight, start + 1.0)
    assert torch.allclose(ema.state_dict()["weight"], start + 0.5)
