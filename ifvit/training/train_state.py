"""Position of a run, with the sums and means of its losses; a checkpoint stores it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ifvit.records import NonNegativeFloat, NonNegativeInt, record

_HISTORY = 100
"""Number of steps over which the loss is averaged; the losses of the first ones are no spikes."""
_SPIKE = 6.0
"""A loss this many standard deviations above its running mean is a spike."""
_LARGEST_LOSS = 1e9
"""Larger losses count as this one, so that all sums stay finite."""

Quarters = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]
StepLosses = Sequence[float]
"""Nine numbers of one step: the mean loss; the sum of the losses in each quarter of the timesteps,
the cleanest first; the number of samples in each quarter."""


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

    def add(self, losses: StepLosses) -> "LossSums":
        """The sums with one more step."""
        by_time, num_samples = losses[1:5], losses[5:9]
        return LossSums(
            total=self.total + losses[0],
            num_steps=self.num_steps + 1,
            by_time=tuple(map(float.__add__, self.by_time, by_time)),  # type: ignore[arg-type]
            num_samples=tuple(map(float.__add__, self.num_samples, num_samples)),  # type: ignore[arg-type]
        )

    @property
    def mean(self) -> float:
        """Mean loss of the steps; nan without a finite step."""
        return self.total / self.num_steps if self.num_steps else math.nan

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
    loss_spikes: NonNegativeInt = 0
    """Number of losses far above the losses before them."""
    loss_mean: NonNegativeFloat = 0.0
    loss_variance: NonNegativeFloat = 0.0
    """Exponential moving averages over about the last hundred steps."""
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
        """Add the losses of the last `len(losses)` steps to the means and count spikes.

        A spike lies more than six standard deviations above the running mean. Mean and variance
        are West's (1979) incremental ones with exponential weights; non-finite losses are ignored.
        `since_log` starts anew with the first step after each multiple of `log_every`.
        """
        mean, variance, spikes = self.loss_mean, self.loss_variance, self.loss_spikes
        since_log = self.since_log
        for step, values in enumerate(losses, start=self.step - len(losses)):
            if step % log_every == 0:
                since_log = LossSums()
            if not math.isfinite(values[0]):
                continue
            loss, *_ = finite = [min(value, _LARGEST_LOSS) for value in values]
            since_log = since_log.add(finite)
            above = loss - mean
            if step >= _HISTORY and above > _SPIKE * variance**0.5:
                spikes += 1
            weight = 1 / min(step + 1, _HISTORY)
            mean += weight * above
            variance = (1 - weight) * (variance + weight * above**2)
        return replace(
            self, loss_mean=mean, loss_variance=variance, loss_spikes=spikes, since_log=since_log
        )
