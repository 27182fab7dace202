"""Where a run stands."""

from dataclasses import dataclass, replace


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

    def advance(self, num_samples: int, seconds: float, data_wait: float) -> "TrainState":
        """The state after one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + num_samples,
            seconds=self.seconds + seconds,
            data_wait=self.data_wait + data_wait,
        )
