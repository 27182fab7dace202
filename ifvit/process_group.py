"""Processes of one launch: their device, small messages between them, progress bars."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from ifvit.distributed import World
from ifvit.errors import UserError

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""How long a process may upload while others wait; one that dies is noticed at once."""


class ProcessGroup:
    """Small objects between all processes, over a gloo group of its own.

    One thread at a time may use it: the main thread before training, then the one that saves.
    Made by all processes together, after the training engine.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None

    @property
    def world(self) -> World:
        """Which of the processes this one is."""
        return self._world

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank, on all of them."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0; a UserError that it raises there is raised on all."""
        result, error = None, None
        if self._world.is_main:
            try:
                result = action()
            except UserError as raised:
                error = raised
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # what rank 0 returned


@contextmanager
def open_process_group() -> Iterator[ProcessGroup]:
    """A channel among the processes of this launch, for verbs without a training engine."""
    world = World.from_environment()
    if world.size > 1:
        dist.init_process_group("gloo")
    try:
        yield ProcessGroup(world)
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def choose_device(device: str) -> str:
    """`cuda` => this process's GPU; so does `auto` when there is one, and cpu otherwise.

    Raises UserError for an absent GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no GPU here; use cpu or auto")
    if device == "cuda":  # a launcher may show each process only a GPU of its own
        return f"cuda:{World.from_environment().local_rank % torch.cuda.device_count()}"
    return device


Batch = TypeVar("Batch", bound=Sized)


def show_progress(
    batches: Iterable[Batch], total: int, title: str, world: World
) -> Iterator[Batch]:
    """Pass batches on and show, on rank 0, how many of its `total` items have gone by."""
    with tqdm(total=total, unit="image", desc=title, leave=False, disable=not world.is_main) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
