"""Which units are this process's, decided without talking to the others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.config import EncodeConfig
from ifvit.distributed import World
from ifvit.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `size`-th unit from `number` on."""

    number: int
    size: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This share of the units; interleaved, so that shares end at about the same time."""
        return items[self.number :: self.size]


def find_share(config: EncodeConfig, world: World) -> Share:
    """The tasks of the recipe or of the SLURM array, times the processes of each task.

    Raises UserError when a number of tasks comes without this one's place among them.
    """
    array = _slurm_array()
    num_tasks = config.num_tasks or (array.size if array else 1)
    task = config.task if config.task is not None else (array.number if array else None)
    if task is None:
        task = 0
        if num_tasks > 1:
            raise UserError(f"num_tasks is {num_tasks}, but task is not set; give 0 or more")
    if not 0 <= task < num_tasks:
        raise UserError(f"task is {task} of {num_tasks}; it must be 0 to {num_tasks - 1}")
    return Share(number=task * world.size + world.rank, size=num_tasks * world.size)


def _slurm_array() -> Share | None:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    names = ("ID", "MIN", "STEP", "COUNT")
    task, first, step, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    return Share(number=(task - first) // step, size=count)
