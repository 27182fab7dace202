"""A training step submits work and never waits for a result: on a GPU that would leave it idle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.models.config import PRESETS
from ifvit.models.weights import build_backbone
from ifvit.training.config import EngineConfig, OptimConfig
from ifvit.training.engine import Engine

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
"""Operations whose result has a value or a shape that the host must know."""


class NoteWaits(TorchDispatchMode):
    """Collects the names of such operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.name().split(".")[0] in WAITING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def waits_of_a_step(**fields: Any) -> list[str]:
    """What one step of the smallest backbone waits for, after a first one."""
    tolerant = fields.pop("tolerate_nonfinite", False)
    engine = Engine(
        build_backbone(PRESETS["tiny"]),
        EngineConfig(backend="plain", **fields),
        OptimConfig(max_grad_norm=1.0),
        ema_decays=(0.99,),
        micro_batch_size=2,
        num_micro_batches=1,
        tolerate_nonfinite=tolerant,
    )
    objective = NoisePrediction(schedule=NoiseSchedule(), scaling_factor=0.2, seed=1)
    moments, contexts = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 64)

    def step() -> None:
        engine.set_learning_rate(1e-3)
        losses = objective(engine.predict_noise, moments, contexts, 3, torch.arange(2))
        engine.backward(losses.total)
        engine.step()
        engine.update_ema()

    step()
    with NoteWaits() as noted:
        step()
    return noted.names


def test_a_step_waits_for_nothing() -> None:
    assert waits_of_a_step() == []
    assert waits_of_a_step(precision="bf16") == []


def test_what_must_look_at_the_gradient_waits_once() -> None:
    assert len(waits_of_a_step(tolerate_nonfinite=True)) == 1
    assert len(waits_of_a_step(precision="fp16")) == 1
