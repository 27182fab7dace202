"""The processes of one launch: which of them this one is, its device, and messages between them.

`World` reads the launcher's environment. `ProcessGroup` passes small objects between processes on
the CPU: training uses it for checkpoints, evaluation for features and captions.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from ifvit.errors import UserError

T = TypeVar("T")
Batch = TypeVar("Batch", bound=Sized)

_TIMEOUT = timedelta(hours=2)
"""Longest wait for other processes, for example for an upload; a death is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among `size` processes; rank 0 writes the files that exist once."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK of torchrun or accelerate; by default one process.

        For the tasks of an `srun` step these variables are first derived from SLURM's and exported,
        because torch and its libraries read them too.
        """
        # SLURM_NTASKS cannot be used: it is also set in the batch script, which is one process.
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            _export_slurm_step()
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


ALONE = World(rank=0, size=1, local_rank=0)


def _export_slurm_step() -> None:
    step = os.environ
    os.environ.update(
        RANK=step["SLURM_PROCID"],
        WORLD_SIZE=step["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=step["SLURM_LOCALID"],
    )
    os.environ.setdefault("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"]))
    # Equal on all tasks and after a requeue; below the ports that the kernel assigns by itself.
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(step["SLURM_JOB_ID"]) % 10_000))


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: `"gpu[007-009,12],login"` => `"gpu007"`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def choose_device(device: str) -> str:
    """`cuda` => the GPU of this process; `auto` => likewise, or `cpu` without a GPU.

    Raises UserError when the device is a GPU and torch finds none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no GPU here; use cpu or auto")
    if device == "cuda":  # modulo, because a launcher may show each process only its own GPU
        return f"cuda:{World.from_environment().local_rank % torch.cuda.device_count()}"
    return device


class ProcessGroup:
    """CPU process group (gloo) that passes small objects between all processes.

    All processes create it together, after the training engine. One thread at a time may use it:
    the main thread before training, then the thread that saves checkpoints.
    """

    def __init__(self, world: World, timeout: timedelta = _TIMEOUT) -> None:
        self.world = world
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank, on each of them."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank => all results, in order of rank.

        Raises the first UserError or OSError of any rank on all of them.
        """
        result, error = None, None
        try:
            result = action()
        except (UserError, OSError) as raised:
            error = raised
        answers = self.gather((result, error))
        for _, error in answers:
            if error is not None:
                raise error
        return [result for result, _ in answers]  # type: ignore[misc]  # no rank failed

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result, or raise its error, on all ranks."""
        results = self.on_all(lambda: action() if self.world.is_main else None)
        return results[0]  # type: ignore[return-value]  # rank 0 has run the action


@contextmanager
def one_line_for_lost_processes() -> Iterator[None]:
    """Turn the error of a connection to a process that has ended into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"rank {World.from_environment().rank}: another process of this launch has ended or "
            "does not answer; its own message or log says why; repair that and run the same "
            "command again"
        ) from error


@contextmanager
def open_process_group() -> Iterator[ProcessGroup]:
    """Open a CPU process group, also where a training engine has connected the processes."""
    world = World.from_environment()
    connects = world.size > 1 and not dist.is_initialized()
    if connects:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        with one_line_for_lost_processes():
            yield ProcessGroup(world)
    finally:
        if connects:
            dist.destroy_process_group()


def show_progress(
    batches: Iterable[Batch], total: int, title: str, world: World
) -> Iterator[Batch]:
    """Yield the batches; rank 0 shows how many of `total` images have passed."""
    with tqdm(total=total, unit="image", desc=title, leave=False, disable=not world.is_main) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
