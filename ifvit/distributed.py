"""World: which process this is, as the launcher's environment tells it."""

import os
import re
from dataclasses import dataclass

EXIT_PREEMPTED = 75
"""Exit code of a process that was told to stop and saved its work: run it again to go on.

EX_TEMPFAIL of sysexits.h.
"""


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among `size`; `rank` 0 writes the files that exist once."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "World":
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun and accelerate set them; alone without.

        In a step of several tasks that `srun` started, what torchrun would set is first derived
        from SLURM's variables and exported, because torch and its libraries read it too.
        """
        # Not SLURM_NTASKS: a batch script has it too, and a SLURM_PROCID, yet is one process.
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            _export_slurm_step()
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def _export_slurm_step() -> None:
    step = os.environ
    os.environ.update(
        RANK=step["SLURM_PROCID"],
        WORLD_SIZE=step["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=step["SLURM_LOCALID"],
    )
    os.environ.setdefault("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"]))
    # The same on all tasks and after a requeue; below the ports that the kernel hands out.
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(step["SLURM_JOB_ID"]) % 10_000))


def first_host(nodes: str) -> str:
    """`"gpu[007-009,12],login"` => `"gpu007"`, from SLURM's short form of a list of hosts."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
