"""The training loop and the position of a run; logging, checkpointing and sampling are hooks.

`train` calls `fit`. A checkpoint stores the `TrainState`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ifvit.diffusion.objectives import Losses, Objective
from ifvit.diffusion.schedules import NUM_TIMESTEPS
from ifvit.records import NonNegativeFloat, NonNegativeInt, record
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine
from ifvit.training.guards import NonfiniteGradient, Preempted, StopRequest

_LARGEST_LOSS = 1e9
"""Larger losses count as this one, so that all sums stay finite."""

Quarters = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]
StepLosses = Sequence[float]
"""Eleven numbers of one step: the mean loss; the sum of the losses in each quarter of the
timesteps, the cleanest first; the number of samples in each quarter; the loss of representations
and 1, or two zeros in a step without it."""


@record
class LossSums:
    """Sums over the steps since the last row of the metrics log, except steps that are not finite.

    A checkpoint holds them, so that a resumed run logs the means of the uninterrupted one.
    """

    total: NonNegativeFloat = 0.0
    """Sum of the mean losses of the steps."""
    num_steps: NonNegativeInt = 0
    by_time: Quarters = (0.0, 0.0, 0.0, 0.0)
    """Sum of the losses of the samples in each quarter of the timesteps."""
    num_samples: Quarters = (0.0, 0.0, 0.0, 0.0)
    representation: float = 0.0
    """Sum of the losses of representations, which rounding may make negative."""
    num_aligned: NonNegativeFloat = 0.0
    """Number of steps that have such a loss."""

    def add(self, losses: StepLosses) -> "LossSums":
        """The sums with one more step."""
        by_time = map(float.__add__, self.by_time, losses[1:5])
        num_samples = map(float.__add__, self.num_samples, losses[5:9])
        return LossSums(
            total=self.total + losses[0],
            num_steps=self.num_steps + 1,
            by_time=tuple(by_time),  # type: ignore[arg-type]  # four, as mypy cannot see
            num_samples=tuple(num_samples),  # type: ignore[arg-type]
            representation=self.representation + losses[9],
            num_aligned=self.num_aligned + losses[10],
        )

    @property
    def mean(self) -> float:
        """Mean loss of the steps; nan without a finite step."""
        return self.total / self.num_steps if self.num_steps else math.nan

    @property
    def mean_representation(self) -> float:
        """Mean loss of representations; nan without a step that has one."""
        return self.representation / self.num_aligned if self.num_aligned else math.nan

    @property
    def mean_by_time(self) -> tuple[float, ...]:
        """Mean loss of each quarter of the timesteps; nan without samples."""
        pairs = zip(self.by_time, self.num_samples, strict=True)
        return tuple(total / count if count else math.nan for total, count in pairs)


@record
class TrainState:
    """Position of a run; together with the tensors of a checkpoint it continues the run."""

    step: NonNegativeInt = 0
    """Number of finished optimizer steps."""
    samples_seen: NonNegativeInt = 0
    """Number of samples read so far; the whole state of the loader."""
    seconds: NonNegativeFloat = 0.0
    """Time spent in training steps, over all restarts."""
    data_wait: NonNegativeFloat = 0.0
    """Part of `seconds` that was spent waiting for batches."""
    nonfinite_steps: NonNegativeInt = 0
    """Number of steps skipped because their gradient was not finite."""
    since_log: LossSums = LossSums()
    """The losses of the steps since the last row of the metrics log."""

    def advance(self, num_samples: int, seconds: float, data_wait: float) -> "TrainState":
        """The state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + num_samples,
            seconds=self.seconds + seconds,
            data_wait=self.data_wait + data_wait,
        )

    def observe(self, losses: Sequence[StepLosses], log_every: int) -> "TrainState":
        """Add the losses of the last `len(losses)` steps to the sums, except non-finite ones.

        `since_log` starts anew with the first step after each multiple of `log_every`.
        """
        since_log = self.since_log
        for step, values in enumerate(losses, start=self.step - len(losses)):
            if step % log_every == 0:
                since_log = LossSums()
            if math.isfinite(values[0]) and math.isfinite(values[9]):
                since_log = since_log.add([min(value, _LARGEST_LOSS) for value in values])
        return replace(self, since_log=since_log)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Numbers of the last step, the same on every process."""

    grad_norm: float
    """Norm of the global gradient, before clipping."""
    learning_rate: float


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
    objective: Objective,
    engine: Engine,
    hooks: Sequence[Hook],
    stop: StopRequest,
    log_every: int,
) -> TrainState:
    """Train from `state` to `max_steps`; a resumed run has the losses of an uninterrupted one.

    `state.since_log` holds means over the steps since the last multiple of `log_every`.

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
            losses.append(torch.cat([local.total[None], _sums_by_time(local), _aligned(local)]))
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
                report = StepReport(grad_norm=float(grad_norm), learning_rate=rate)
                for hook in due:
                    with engine.timer.host_phase(hook.name):
                        hook(state, report)
            engine.timer.end_step()
            if signal:
                raise Preempted(signal, state.step)
    return state


def _accumulate(
    stream: Iterator[Batch], batches: Batches, objective: Objective, engine: Engine, step: int
) -> tuple[Losses, float]:
    """Accumulate the gradients of this process's micro-batches.

    Returns their losses and the seconds spent waiting for data.
    """
    per_sample, timesteps, representation = [], [], []
    data_wait = 0.0
    for remaining in reversed(range(batches.num_micro_batches)):
        started = time.perf_counter()
        with engine.timer.host_phase("data"):
            batch = next(stream)
        data_wait += time.perf_counter() - started
        with engine.accumulate(last=not remaining):
            with engine.timer.phase("forward"):
                losses = objective(
                    engine.predict,
                    batch.moments,
                    batch.condition,
                    step,
                    batch.positions,
                    batch.features,
                )
            with engine.timer.phase("backward"):
                engine.backward(losses.total)
        per_sample.append(losses.per_sample)
        timesteps.append(losses.timesteps)
        if losses.representation is not None:
            representation.append(losses.representation)
    all_losses = torch.cat(per_sample)
    local = Losses(
        total=all_losses.mean(),
        per_sample=all_losses,
        timesteps=torch.cat(timesteps),
        representation=torch.stack(representation).mean() if representation else None,
    )
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
    quarters = (local.timesteps * 4 // NUM_TIMESTEPS).long()
    both = torch.stack([local.per_sample, torch.ones_like(local.per_sample)])
    return both.new_zeros(2, 4).index_add(1, quarters, both).flatten()


def _aligned(local: Losses) -> Tensor:
    """The loss of representations and 1, or zeros without it, (2,)."""
    if local.representation is None:
        return local.total.new_zeros(2)
    return torch.stack([local.representation, torch.ones_like(local.representation)])


def _is_due(hook: Hook, step: int, max_steps: int, signal: int | None) -> bool:
    return step == max_steps or step % hook.every == 0 or bool(signal and hook.on_stop)
