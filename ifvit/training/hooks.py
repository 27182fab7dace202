"""What happens beside the steps: checkpoints, exported weights, pictures."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ifvit.diffusion.config import SolverConfig
from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.images import encode_png, make_grid
from ifvit.models.weights import WeightsInfo, restore_backbone, save_weights, step_name
from ifvit.sampling.load import load_conditions, load_decoder
from ifvit.shards import ShardReader
from ifvit.storage import join, write_bytes
from ifvit.training.checkpoint import Checkpoint, Retention, commit, prune, step_url, write_part
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.engine import Engine, ema_name
from ifvit.training.lease import Lease
from ifvit.training.loop import StepReport
from ifvit.training.state import TrainState

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
        channel: ProcessGroup,
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


_GRID_COLUMNS = 8


class SaveCheckpoint:
    """A checkpoint and exported weights, averaged and raw, every `checkpoint_every` steps.

    Training waits only while the state is copied to host memory. `stall_seconds` adds that up.
    A save that fails calls `on_failure`, and the next call raises why.
    """

    name = "checkpoint"
    on_stop = True

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        channel: ProcessGroup,
        lease: Lease,
        info: WeightsInfo,
        shards_sha256: str,
        publish_metrics: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.every = config.checkpoint_every
        self.stall_seconds = 0.0
        self._config, self._engine, self._lease = config, engine, lease
        self._info, self._shards_sha256 = info, shards_sha256
        self._publish_metrics = publish_metrics
        first, *others = engine.ema_decays
        self._exports: dict[str, tuple[float | None, str]] = {
            "raw": (None, "backbone."),
            "ema": (first, f"{ema_name(first)}."),
            **{f"ema_{decay}": (decay, f"{ema_name(decay)}.") for decay in others},
        }
        prefixes = tuple(prefix for _, prefix in self._exports.values())
        retention = Retention(
            last=config.keep_checkpoints, every=config.keep_every, metric=config.keep_best
        )
        self.saver = CheckpointSaver(
            config.run,
            lease.token,
            engine.world,
            channel,
            exported=lambda name: name.startswith(prefixes),
            finish=self._finish,
            prune=lambda: prune(config.run, retention),
            on_failure=on_failure,
        )

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Copy the state; the rest is done beside training. Raises what the save before met."""
        draft = Checkpoint(
            state=state,
            scalars=self._engine.scalars(),
            backbone=dataclasses.asdict(self._config.backbone),
            recipe_sha256=self._info.recipe_sha256,
            shards_sha256=self._shards_sha256,
            parts=(),
        )
        self.stall_seconds += self.saver.save(
            self._engine.iter_state(), draft, self._engine.synchronize
        )

    def _finish(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write what must be there when the checkpoint is; then see that the run is still ours."""
        folder = join(self._config.run, "weights", step_name(step))
        for kind, (decay, prefix) in self._exports.items():
            weights = {
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            }
            backbone = restore_backbone(self._config.backbone, weights)
            info = dataclasses.replace(self._info, step=step, ema_decay=decay)
            save_weights(join(folder, kind), backbone, info)
        self._publish_metrics()
        self._lease.check()


class SampleGrid:
    """A picture of the same prompts from the same noise, drawn with the averaged weights."""

    name = "samples"
    on_stop = False

    def __init__(self, config: TrainConfig, engine: Engine, info: WeightsInfo) -> None:
        self.every = config.sample_grid.every
        self._run, self._engine = config.run, engine
        reader = ShardReader(config.shards, config.cache)
        conditions, self._null_condition = _grid_conditions(config.sample_grid, reader, info)
        self._batch = ConditionBatch(positions=torch.arange(len(conditions)), condition=conditions)
        self._decode = load_decoder(info, str(engine.device))
        self._solver = SolverConfig(
            num_steps=config.sample_grid.num_steps, guidance_scale=config.sample_grid.guidance_scale
        )

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Draw on the main process; the others wait."""
        backbone = self._engine.gather_backbone(self._engine.ema_decays[0])
        if self._engine.world.is_main:
            sampler = Sampler(
                backbone=backbone, decode=self._decode, null_condition=self._null_condition
            )
            (images,) = generate_images(sampler, [self._batch], self._solver)
            name = f"{step_name(state.step)}.png"
            write_bytes(
                join(self._run, "samples", name), encode_png(make_grid(images, _GRID_COLUMNS))
            )
        self._engine.barrier()


def _grid_conditions(
    config: SampleGridConfig, reader: ShardReader, info: WeightsInfo
) -> tuple[Tensor, Tensor]:
    """(N, ...) conditions and the one of no prompt.

    Of the prompts; else of the first captions or classes, two rows full.
    """
    if config.prompts or info.text_encoder is None:
        conditions = load_conditions(info, "cpu")
        prompts = config.prompts or info.classes[: 2 * _GRID_COLUMNS]
        return conditions.encode(list(prompts)), conditions.null
    count = min(2 * _GRID_COLUMNS, len(reader))
    contexts = torch.from_numpy(np.stack([reader.context(i, 0) for i in range(count)]))
    return contexts, torch.from_numpy(np.array(reader.null_context))
