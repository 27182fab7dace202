"""One rank of several: trains the recipes of its command line one after the other.

Python, torch and DeepSpeed take longer to start than these runs take to train. A recipe called
`preempted` has rank 1 receive SIGUSR1 after its second step.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from ifvit.config import read_config
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.stop import Preempted
from ifvit.training.train import train


def preempt_after_two_steps() -> None:
    """Send SIGUSR1 to this process when it has trained two steps."""
    real, calls = Engine.update_averages, []

    def update_averages(engine: Engine) -> None:
        real(engine)
        calls.append(engine)
        if len(calls) == 2 and engine.world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    Engine.update_averages = update_averages  # type: ignore[method-assign]


def main() -> None:
    """Train every recipe; a run that ends early leaves `ended` with its exit code or message."""
    torch.set_num_threads(1)
    for recipe in map(Path, sys.argv[1:]):
        if recipe.stem == "preempted":
            preempt_after_two_steps()
        config = read_config(TrainConfig, ["--config", str(recipe)], prog="test")
        AcceleratorState._reset_state()
        try:
            train(config)
        except (Preempted, ValueError) as ending:
            rank = os.environ["RANK"]
            Path(config.run, f"ended-{rank}").write_text(str(ending))


if __name__ == "__main__":
    main()
