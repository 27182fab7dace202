"""The training loop; all that is not a step is a hook."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ifvit.diffusion.objectives import Losses, NoisePrediction
from ifvit.diffusion.schedules import NUM_TIMESTEPS
from ifvit.training.config import TrainConfig
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine, learning_rate
from ifvit.training.guards import Preempted, StopRequest, report_nonfinite
from ifvit.training.state import TrainState
from ifvit.training.timing import StepProfiler


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step, the same on every process."""

    loss: float
    """Mean loss of the global batch."""
    loss_by_time: tuple[float, ...]
    """The same of each quarter of the timesteps, the cleanest first; nan where no sample is."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float


class Hook(Protocol):
    """Something that happens every `every` steps and after the last one, on every process."""

    every: int
    name: str
    """How the time that the steps wait for it is called."""
    on_stop: bool
    """Whether it also happens after the last step before a signal ends the run."""

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Look at the run after a step, without changing it."""


def fit(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    hooks: Sequence[Hook],
    config: TrainConfig,
    stop: StopRequest,
    profiler: StepProfiler,
) -> TrainState:
    """Train to `config.max_steps`; continued from any step it repeats the unbroken run.

    Raises Preempted after a signal, when what must be saved is saved, and UserError when more
    gradients are not finite than the recipe tolerates.
    """
    losses: list[Tensor] = []
    with closing(batches.from_state(state, engine.device)) as stream:
        while state.step < config.max_steps:
            stop.ask()
            started = time.perf_counter()
            rate = learning_rate(state.step, config.max_steps, config.optim)
            engine.set_learning_rate(rate)
            share, data_wait = _accumulate(
                stream, batches.num_micro_batches, objective, engine, state
            )
            losses.append(share.total)
            with engine.timer.phase("optimizer"):
                grad_norm = engine.step()
            with engine.timer.phase("ema"):
                engine.update_ema()

            signal = stop.answer()
            step = state.step + 1
            due = [h for h in hooks if _is_due(h.every, step, config) or (signal and h.on_stop)]
            if due:
                engine.synchronize()  # so that `seconds` holds the work, not its submission
            seconds = time.perf_counter() - started
            state = state.advance(config.global_batch_size, seconds, data_wait)
            refused = engine.skipped_steps(wait=bool(due))
            state = replace(state, nonfinite_steps=state.nonfinite_steps + refused)
            if refused and state.nonfinite_steps > config.tolerate_nonfinite:
                before = state.go_back(refused, config.global_batch_size)
                report_nonfinite(before, batches, objective, engine, config)
            if due:
                means = engine.mean(torch.stack(losses)).tolist()
                losses.clear()
                state = state.observe(means)
                report = StepReport(
                    loss=means[-1],
                    loss_by_time=_mean_by_time(share, engine),
                    grad_norm=float(grad_norm),
                    learning_rate=rate,
                )
                for hook in due:
                    with engine.timer.host_phase(hook.name):
                        hook(state, report)
            profiler.step()
            if signal:
                raise Preempted(signal, state.step)
    return state


def _accumulate(
    stream: Iterator[Batch],
    num_micro_batches: int,
    objective: NoisePrediction,
    engine: Engine,
    state: TrainState,
) -> tuple[Losses, float]:
    """Gradients of this process's share of a step => its losses, and seconds of waiting."""
    parts = []
    data_wait = 0.0
    for remaining in reversed(range(num_micro_batches)):
        started = time.perf_counter()
        with engine.timer.host_phase("data"):
            batch = next(stream)
        data_wait += time.perf_counter() - started
        with engine.accumulate(last=not remaining):
            with engine.timer.phase("forward"):
                moments, condition, positions = batch.moments, batch.condition, batch.positions
                losses = objective(engine.predict_noise, moments, condition, state.step, positions)
            with engine.timer.phase("backward"):
                engine.backward(losses.total)
        parts.append((losses.per_sample, losses.timesteps))
    per_sample, timesteps = map(torch.cat, zip(*parts, strict=True))
    share = Losses(total=per_sample.mean(), per_sample=per_sample, timesteps=timesteps)
    return share, data_wait


def _mean_by_time(share: Losses, engine: Engine) -> tuple[float, ...]:
    """Mean losses of the global batch in each quarter of the timesteps; collective."""
    quarters = share.timesteps * 4 // NUM_TIMESTEPS
    both = torch.stack([share.per_sample, torch.ones_like(share.per_sample)])
    sums, counts = engine.mean(both.new_zeros(2, 4).index_add(1, quarters, both))
    return tuple((sums / counts).tolist())


def _is_due(every: int, step: int, config: TrainConfig) -> bool:
    return step == config.max_steps or step % every == 0
