"""One rank of several: trains recipes one after the other.

In a run called `preempted`, rank 1 receives SIGUSR1 after its second step.
"""

import os
import signal
from pathlib import Path

from accelerate.state import AcceleratorState

from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import Preempted
from ifvit.training.train import train


def preempt_after_two_steps() -> None:
    """Send SIGUSR1 to this process when it has trained two steps."""
    real, calls = Engine.update_ema, []

    def update_ema(engine: Engine) -> None:
        real(engine)
        calls.append(engine)
        if len(calls) == 2 and engine.world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    Engine.update_ema = update_ema  # type: ignore[method-assign]


def train_in_turn(recipes: list[TrainConfig]) -> None:
    """Train every recipe; each rank of a run that ends early leaves its message in `ended-RANK`."""
    for config in recipes:
        if Path(config.run).name == "preempted":
            preempt_after_two_steps()
        AcceleratorState._reset_state()
        try:
            train(config)
        except (Preempted, ValueError) as ending:
            rank = os.environ["RANK"]
            Path(config.run, f"ended-{rank}").write_text(str(ending))
