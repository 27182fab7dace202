"""The averaged weights."""

import pytest
import torch

from ifvit.training.ema import EMA


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
