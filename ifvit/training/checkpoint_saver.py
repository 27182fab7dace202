"""Saving beside training: the loop waits for a copy in host memory, a thread does the rest."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors import SafetensorError
from torch import Tensor

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.side_channel import SideChannel
from ifvit.training.checkpoint import Checkpoint, commit, step_url, write_part

State = Iterable[tuple[str, Tensor]]


class HostCopy:
    """Copies of device tensors, in buffers that are made once and filled again at every save."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Begin to copy; the device must be synchronised before the copy is read."""
        if name not in self.tensors:
            # Page-locked memory is what a GPU copies to at full speed.
            self.tensors[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        self.tensors[name].copy_(tensor.detach(), non_blocking=True)


class CheckpointSaver:
    """Writes each process's share as one part; the main process commits when all have arrived.

    `finish` is called on the main process between the parts and the manifest, with the copies of
    all tensors for which `exported(name)` holds: what it writes is there when the checkpoint is.
    `prune` is called there after. `on_failure` is called on every process, from the thread.
    """

    def __init__(
        self,
        run: str,
        attempt: str,
        world: World,
        channel: SideChannel,
        *,
        exported: Callable[[str], bool],
        finish: Callable[[int, dict[str, Tensor]], None],
        prune: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._run, self._world, self._channel = run, world, channel
        self._part_name = f"part-{world.rank:05d}-of-{world.size:05d}-{attempt}.safetensors"
        self._exported, self._finish, self._prune = exported, finish, prune
        self._on_failure = on_failure
        self._copy = HostCopy()
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State, draft: Checkpoint, synchronize: Callable[[], None]) -> float:
        """Copy the engine's state and save it in the background => seconds of waiting; collective.

        `draft` lacks its parts. Waits for the save before and raises its UserError.
        """
        started = time.perf_counter()
        self.wait()
        share = self._take_share(state)
        synchronize()
        self._pending = self._executor.submit(self._save, draft, share)
        self._pending.add_done_callback(lambda save: save.exception() and self._on_failure())
        return time.perf_counter() - started

    def wait(self) -> None:
        """Return when no save is running. Raises UserError, everywhere, if the last one failed."""
        if self._pending is not None:
            self._pending.result()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around training; the last save is finished on the way out, whatever the reason.

        Raises its UserError, also in place of an exit that promises that all is saved.
        """
        with self._executor:
            try:
                yield
            except SystemExit:
                self.wait()
                raise
            self.wait()

    def _take_share(self, state: State) -> list[str]:
        """Copy what this process writes; shares are equal in bytes, and the same everywhere."""
        loads = [0] * self._world.size
        share = []
        for name, tensor in state:
            owner = loads.index(min(loads))
            loads[owner] += tensor.nbytes
            if owner == self._world.rank:
                share.append(name)
            if owner == self._world.rank or (self._world.is_main and self._exported(name)):
                self._copy.update(name, tensor)
        return share

    def _save(self, draft: Checkpoint, share: list[str]) -> None:
        step = draft.state.step
        part, error = None, None
        try:
            with self._named_errors(step):
                tensors = {name: self._copy.tensors[name] for name in share}
                part = write_part(step_url(self._run, step), self._part_name, tensors)
        except UserError as raised:
            error = raised
        parts, errors = zip(*self._channel.gather((part, error)), strict=True)
        for failure in filter(None, errors):
            raise failure
        self._channel.on_main(lambda: self._complete(replace(draft, parts=parts)))

    def _complete(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.state.step
        with self._named_errors(step):
            exported = {n: t for n, t in self._copy.tensors.items() if self._exported(n)}
            self._finish(step, exported)
            commit(self._run, checkpoint)
        try:
            self._prune()
        except (UserError, OSError) as error:  # a file that NFS still holds, say
            sys.stderr.write(f"{self._run}: older checkpoints stay until the next save ({error})\n")

    @contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        """Make one line of what a store or a full disk may raise."""
        try:
            yield
        except (UserError, OSError, SafetensorError) as error:
            raise UserError(
                f"{self._run}: saving step {step} failed on rank {self._world.rank} ({error}); "
                "the checkpoints before it are whole, run the same command again to go on"
            ) from error
