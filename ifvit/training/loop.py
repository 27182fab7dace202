"""The training loop; logging, checkpointing and sampling are hooks. `train` calls `fit`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ifvit.diffusion.objectives import Losses, NoisePrediction
from ifvit.diffusion.schedules import NUM_TIMESTEPS
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine
from ifvit.training.guards import NonfiniteGradient, Preempted, StopRequest
from ifvit.training.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Numbers of the last steps, the same on every process; nan where no step is finite."""

    loss: float
    """Mean loss of all steps since the last multiple of `log_every`."""
    loss_by_time: tuple[float, ...]
    """Likewise, of each quarter of the timesteps, the cleanest first."""
    grad_norm: float
    """Norm of the global gradient of the last step, before clipping."""
    learning_rate: float
    """Learning rate of the last step."""


class Hook(Protocol):
    """An action that every process runs every `every` steps and after the last step."""

    every: int
    name: str
    """Name of this hook in the step-time breakdown."""
    on_stop: bool
    """Whether the hook also runs when a signal ends the run."""

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Run after a step; a hook does not change the state of training."""


def fit(
    state: TrainState,
    max_steps: int,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    hooks: Sequence[Hook],
    stop: StopRequest,
    log_every: int,
) -> TrainState:
    """Train from `state` to `max_steps`; a resumed run has the losses of an uninterrupted one.

    Reports hold means over the steps since the last multiple of `log_every`.

    Raises Preempted after a signal, when the hooks for that case have run, and NonfiniteGradient
    when more gradients are not finite than the engine tolerates.
    """
    losses: list[Tensor] = []
    with closing(batches.stream(state.step, state.samples_seen, engine.device)) as stream:
        while state.step < max_steps:
            stop.ask()
            started = time.perf_counter()
            rate = engine.set_learning_rate(state.step, max_steps)
            local, data_wait = _accumulate(stream, batches, objective, engine, state.step)
            losses.append(torch.cat([local.total[None], _sums_by_time(local)]))
            with engine.timer.phase("optimizer"):
                grad_norm = engine.step()
            with engine.timer.phase("ema"):
                engine.update_ema()

            signal = stop.answer()
            due = [hook for hook in hooks if _is_due(hook, state.step + 1, max_steps, signal)]
            if due:
                engine.synchronize()  # so that `seconds` covers the work and not its submission
            seconds = time.perf_counter() - started
            state = state.advance(batches.global_batch_size, seconds, data_wait)
            state = _count_skipped(state, batches, engine, wait=bool(due))
            if due:
                state = state.observe(engine.mean(torch.stack(losses)).tolist(), log_every)
                losses.clear()
                report = StepReport(
                    loss=state.since_log.mean,
                    loss_by_time=state.since_log.mean_by_time,
                    grad_norm=float(grad_norm),
                    learning_rate=rate,
                )
                for hook in due:
                    with engine.timer.host_phase(hook.name):
                        hook(state, report)
            engine.timer.end_step()
            if signal:
                raise Preempted(signal, state.step)
    return state


def _accumulate(
    stream: Iterator[Batch],
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    step: int,
) -> tuple[Losses, float]:
    """Accumulate the gradients of this process's micro-batches.

    Returns their losses and the seconds spent waiting for data.
    """
    per_sample, timesteps = [], []
    data_wait = 0.0
    for remaining in reversed(range(batches.num_micro_batches)):
        started = time.perf_counter()
        with engine.timer.host_phase("data"):
            batch = next(stream)
        data_wait += time.perf_counter() - started
        with engine.accumulate(last=not remaining):
            with engine.timer.phase("forward"):
                losses = objective(
                    engine.predict_noise, batch.moments, batch.condition, step, batch.positions
                )
            with engine.timer.phase("backward"):
                engine.backward(losses.total)
        per_sample.append(losses.per_sample)
        timesteps.append(losses.timesteps)
    all_losses = torch.cat(per_sample)
    local = Losses(total=all_losses.mean(), per_sample=all_losses, timesteps=torch.cat(timesteps))
    return local, data_wait


def _count_skipped(
    state: TrainState, batches: Batches, engine: Engine, *, wait: bool
) -> TrainState:
    """Count skipped steps. Raises NonfiniteGradient when they are more than is tolerated."""
    num_skipped = engine.skipped_steps(wait=wait)
    state = replace(state, nonfinite_steps=state.nonfinite_steps + num_skipped)
    if num_skipped and state.nonfinite_steps > engine.tolerate_nonfinite:
        raise NonfiniteGradient(
            step=state.step - num_skipped,
            samples_seen=state.samples_seen - num_skipped * batches.global_batch_size,
        )
    return state


def _sums_by_time(local: Losses) -> Tensor:
    """Sums of the losses in each quarter of the timesteps, then numbers of samples, (8,)."""
    quarters = local.timesteps * 4 // NUM_TIMESTEPS
    both = torch.stack([local.per_sample, torch.ones_like(local.per_sample)])
    return both.new_zeros(2, 4).index_add(1, quarters, both).flatten()


def _is_due(hook: Hook, step: int, max_steps: int, signal: int | None) -> bool:
    return step == max_steps or step % hook.every == 0 or bool(signal and hook.on_stop)
