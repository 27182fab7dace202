"""The training loop; all that is not a step is a hook."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ifvit.diffusion.objective import NoisePrediction
from ifvit.training.batch import Batch
from ifvit.training.batches import Batches
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.optim import learning_rate
from ifvit.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step; tensors stay on the device until a hook reads them."""

    loss: Tensor
    """Mean loss of this process's share of the global batch, ()."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping, ()."""
    learning_rate: float


class Hook(Protocol):
    """Something that happens every `every` steps and after the last one, on every process."""

    every: int

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Look at the run after a step, without changing it."""


def fit(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    hooks: Sequence[Hook],
    config: TrainConfig,
) -> TrainState:
    """Train to `config.max_steps`; continued from any step it repeats the unbroken run."""
    with closing(batches.from_state(state, engine.device)) as stream:
        while state.step < config.max_steps:
            started = time.perf_counter()
            rate = learning_rate(state.step, config.max_steps, config.optim)
            engine.set_learning_rate(rate)
            loss = torch.zeros((), device=engine.device)
            data_wait = 0.0
            for remaining in reversed(range(batches.num_micro_batches)):
                batch, waited = _next(stream)
                data_wait += waited
                with engine.accumulate(last=not remaining):
                    loss += _differentiate(batch, objective, engine, state.step)
            grad_norm = engine.step()
            engine.update_averages()

            due = [hook for hook in hooks if _is_due(hook.every, state.step + 1, config.max_steps)]
            if due:
                engine.synchronize()  # so that `seconds` holds the work, not its submission
            seconds = time.perf_counter() - started
            state = state.advance(config.global_batch_size, seconds, data_wait)
            report = StepReport(
                loss=loss / batches.num_micro_batches,
                grad_norm=grad_norm,
                learning_rate=rate,
            )
            for hook in due:
                hook(state, report)
    return state


def _differentiate(batch: Batch, objective: NoisePrediction, engine: Engine, step: int) -> Tensor:
    """Forward and backward of one micro-batch => its mean loss, detached."""
    losses = objective(engine.denoise, batch.moments, batch.context, step, batch.positions)
    engine.backward(losses.total)
    return losses.total.detach()


def _next(stream: Iterator[Batch]) -> tuple[Batch, float]:
    started = time.perf_counter()
    batch = next(stream)
    return batch, time.perf_counter() - started


def _is_due(every: int, step: int, max_steps: int) -> bool:
    return step == max_steps or step % every == 0
