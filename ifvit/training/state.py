"""Where a run stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_HISTORY = 100
"""Steps over which the loss is averaged to tell spikes, and before which none is told."""
_SPIKE = 6.0
"""Standard deviations above its running mean at which a loss is a spike."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Position of a run: all that, with the tensors of a checkpoint, continues it."""

    step: int = 0
    """Optimizer steps done."""
    samples_seen: int = 0
    """Samples drawn so far; the loader's whole state."""
    seconds: float = 0.0
    """Time spent in training steps, over all restarts."""
    data_wait: float = 0.0
    """Share of `seconds`, in seconds, spent waiting for batches."""
    nonfinite_steps: int = 0
    """Steps without an update, because their gradient was not finite."""
    loss_spikes: int = 0
    """Losses that lay far above those before them."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    """Exponential moving averages over about the last hundred steps."""

    def advance(self, num_samples: int, seconds: float, data_wait: float) -> "TrainState":
        """The state after one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + num_samples,
            seconds=self.seconds + seconds,
            data_wait=self.data_wait + data_wait,
        )

    def go_back(self, num_steps: int, global_batch_size: int) -> "TrainState":
        """Where the run stood `num_steps` ago."""
        return replace(
            self,
            step=self.step - num_steps,
            samples_seen=self.samples_seen - num_steps * global_batch_size,
        )

    def observe(self, losses: Sequence[float]) -> "TrainState":
        """The state that knows the losses of the last `len(losses)` steps, counting spikes.

        A spike lies more than six standard deviations above the running mean. Mean and variance
        are West's (1979) incremental ones with exponential weights; what is not finite is left out.
        """
        mean, variance, spikes = self.loss_mean, self.loss_variance, self.loss_spikes
        for step, loss in enumerate(losses, start=self.step - len(losses)):
            if not math.isfinite(loss):
                continue
            above = loss - mean
            if step >= _HISTORY and above > _SPIKE * variance**0.5:
                spikes += 1
            weight = 1 / min(step + 1, _HISTORY)
            mean += weight * above
            variance = (1 - weight) * (variance + weight * above**2)
        return replace(self, loss_mean=mean, loss_variance=variance, loss_spikes=spikes)
