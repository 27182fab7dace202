"""Talk among processes that must not disturb the training collectives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ifvit.distributed import World
from ifvit.errors import UserError

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""How long a process may upload while others wait; one that dies is noticed at once."""


class SideChannel:
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
def open_channel() -> Iterator[SideChannel]:
    """A channel among the processes of this launch, for verbs without a training engine."""
    world = World.from_environment()
    if world.size > 1:
        dist.init_process_group("gloo")
    try:
        yield SideChannel(world)
    finally:
        if world.size > 1:
            dist.destroy_process_group()
