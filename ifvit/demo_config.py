"""What the demo may be told; free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw scenes, encode, train early and intermediate fusion, sample, evaluate, report."""

    folder: str = "runs/demo"
    """Where everything goes; run again to continue there."""
    minutes: float = 4.5
    """Minutes of training, both models together, on a machine with two slow cores."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError("minutes must be positive")
