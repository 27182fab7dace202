"""The hook that saves checkpoints, exports weights, and removes those that need not be kept.

Only files and folders of the names that training writes are removed.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from ifvit import storage
from ifvit.connections import StoreError, is_remote
from ifvit.errors import UserError
from ifvit.evaluation.metrics import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows
from ifvit.models.weights import (
    WeightsInfo,
    exported_backbone,
    read_stored_weights,
    remove_weights,
    save_weights,
    step_name,
)
from ifvit.records import field_hints
from ifvit.storage import join, list_names
from ifvit.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    Part,
    commit,
    committed_steps,
    is_part_name,
    manifest_sha256,
    saved_steps,
    step_folders,
    step_url,
    write_part,
)
from ifvit.training.config import VALIDATION_LOSS, TrainConfig
from ifvit.training.engine import Engine, weights_prefix
from ifvit.training.guards import StopRequest
from ifvit.training.lease import Lease
from ifvit.training.loop import StepReport, TrainState
from ifvit.training.metrics_log import MetricsLog


class SaveCheckpoint:
    """Writes a checkpoint every `checkpoint_every` steps, and exports weights, EMA and raw.

    Training waits only while the state is copied to host memory. Then a thread on every process
    writes this process's partition of the state as one part; when all parts are written, the main
    process exports weights and commits the checkpoint. When a save fails, all processes stop
    after their next step and raise the error.
    """

    name = "checkpoint"
    on_stop = True

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        info: WeightsInfo,
        lease: Lease,
        metrics: MetricsLog,
        stop: StopRequest,
    ) -> None:
        """Raise UserError when no evaluation has the metric `keep_best`."""
        self.every = config.checkpoint_every
        self._config, self._engine, self._info = config, engine, info
        self._lease, self._metrics, self._stop = lease, metrics, stop
        self._shards_sha256 = manifest_sha256(config.shards)
        hints = field_hints(MetricsRow).items()
        metric_names = {name for name, hint in hints if Estimate in (hint, *get_args(hint))}
        metric_names.add(VALIDATION_LOSS)
        if config.keep_best is not None and config.keep_best not in metric_names:
            raise UserError(
                f"keep_best: evaluations have no metric named {config.keep_best}; "
                f"use for example frechet_distance, clip_score or {VALIDATION_LOSS}"
            )
        world = engine.world
        self._part_name = f"part-{world.rank:05d}-of-{world.size:05d}-{lease.token}.safetensors"
        first, *others = engine.ema_decays
        self._exports = {"raw": None, "ema": first, **{f"ema_{decay}": decay for decay in others}}
        """Name of each folder of exported weights => EMA decay, None for the trained weights."""
        self._host: dict[str, Tensor] = {}
        """Copies of the state in host memory, allocated at the first save and reused."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Finish the last save when the context ends, also when SystemExit ends it.

        Raises UserError if that save failed, also in place of the SystemExit, because its exit
        code promises the launcher a checkpoint.
        """
        with self._thread:
            try:
                yield
            except SystemExit:
                self.wait()
                raise
            self.wait()

    def wait(self) -> None:
        """Wait for the running save. Raises UserError on every process if the last one failed."""
        if self._pending is not None:
            self._pending.result()

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Copy the state and start to write it; all processes call this together.

        Raises UserError when the previous save failed.
        """
        self.wait()
        partition = self._copy_state(state.step)
        checkpoint = Checkpoint(
            url=step_url(self._config.run, state.step),
            state=state,
            scalars=self._engine.scalars(),
            backbone=asdict(self._config.backbone),
            target=self._info.target,
            text_encoder=self._info.text_encoder,
            recipe_sha256=self._info.recipe_sha256,
            shards_sha256=self._shards_sha256,
            parts=(),
        )
        self._engine.synchronize()
        self._pending = self._thread.submit(self._write, checkpoint, partition)

    def _copy_state(self, step: int) -> list[str]:
        """Copy to host memory what this process writes => the names of its partition.

        Partitions have about equal sizes. The main process also copies the weights to export.
        """
        world = self._engine.world
        prefixes = map(weights_prefix, self._exports.values())
        exported = tuple(prefixes) if self._is_exported(step) else ()
        sizes = [0] * world.size
        partition = []
        for name, tensor in self._engine.iter_state():
            owner = sizes.index(min(sizes))
            sizes[owner] += tensor.nbytes
            if owner == world.rank:
                partition.append(name)
            elif not (world.is_main and name.startswith(exported)):
                continue
            if name not in self._host:
                # A GPU copies at full speed only to page-locked memory.
                pinned = tensor.is_cuda
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._host[name].copy_(tensor.detach(), non_blocking=True)
        return partition

    def _write(self, checkpoint: Checkpoint, partition: list[str]) -> None:
        """Write the copied state as a checkpoint; runs in the thread of every process."""
        group = self._engine.group
        tensors = {name: self._host[name] for name in partition}

        def write() -> Part:
            with self._named_errors(checkpoint):
                return write_part(checkpoint.url, self._part_name, tensors)

        try:
            parts = tuple(group.on_all(write))
            group.on_main(partial(self._complete, replace(checkpoint, parts=parts)))
        except BaseException:
            self._stop.request()
            raise

    def _complete(self, checkpoint: Checkpoint) -> None:
        """Export, commit and prune, once all parts are written; on the main process only."""
        step = checkpoint.state.step
        with self._named_errors(checkpoint):
            if self._is_exported(step):
                self._export_weights(step)
            self._metrics.publish()
            self._lease.check()
            commit(checkpoint)
        try:
            scores = self._score_steps()
            prune_checkpoints(self._config, checkpoint, scores)
            exported = replace(self._info, step=step)
            prune_exports(self._config, self._exports.keys(), exported, scores)
        except (UserError, OSError) as error:  # for example a file that NFS still holds open
            message = f"older checkpoints and weights stay until the next save ({error})"
            sys.stderr.write(f"{self._config.run}: {message}\n")

    def _score_steps(self) -> Mapping[int, float]:
        """Value of `keep_best` by step, or its negative if higher is better."""
        metric = self._config.keep_best
        if metric is None:
            return {}
        if metric == VALIDATION_LOSS:
            return dict(self._metrics.validation_losses)
        rows = main_series(list(read_rows(join(self._config.run, FOLDER)).values()))
        values = {row.step: getattr(row, metric) for row in rows}
        sign = 1 if metric in LOWER_IS_BETTER else -1
        return {step: sign * v.value for step, v in values.items() if isinstance(v, Estimate)}

    def _is_exported(self, step: int) -> bool:
        every = self._config.export_every
        return every is None or step % every == 0 or step == self._config.max_steps

    def _export_weights(self, step: int) -> None:
        folder = join(self._config.run, "weights", step_name(step))
        for name, decay in self._exports.items():
            prefix = weights_prefix(decay)
            weights = {
                key.removeprefix(prefix): tensor
                for key, tensor in self._host.items()
                if key.startswith(prefix)
            }
            backbone = exported_backbone(self._config.backbone, weights)
            info = replace(self._info, step=step, ema_decay=decay)
            save_weights(join(folder, name), backbone, info)

    @contextmanager
    def _named_errors(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Turn the errors of a store or a full disk into one line."""
        try:
            yield
        except (UserError, OSError, SafetensorError) as error:
            step = checkpoint.state.step
            raise UserError(
                f"{self._config.run}: saving step {step} failed on rank {self._engine.world.rank} "
                f"({error}); earlier checkpoints are complete, run the same command again to "
                "continue"
            ) from error


def prune_checkpoints(config: TrainConfig, saved: Checkpoint, scores: Mapping[int, float]) -> None:
    """Remove the checkpoints that need not be kept, and the leftovers of interrupted saves.

    The checkpoint of the lowest score is kept, too.
    `saved` is the checkpoint that was committed last. Later ones are damaged, because the run did
    not continue from them; they stay until the run has reached their steps.
    """
    run = config.run
    steps = [step for step in saved_steps(run) if step <= saved.state.step]
    committed = sorted({*steps} & {*committed_steps(run)})
    kept = set(committed[-config.keep_checkpoints :])
    if config.keep_every:
        kept.update(step for step in committed if step % config.keep_every == 0)
    kept |= _best_step(committed, scores)
    for step in set(steps) - kept:
        # The manifest goes first: a half-removed checkpoint must not look complete.
        storage.remove(join(step_url(run, step), MANIFEST))
        _remove_files(step_url(run, step), ())
    # An earlier attempt at the same step may have left other parts.
    _remove_files(saved.url, [MANIFEST, *(part.name for part in saved.parts)])


def _remove_files(url: str, kept: Sequence[str]) -> None:
    """Remove the files of a checkpoint, except those `kept`, and the folder if it is then empty."""
    for name in set(list_names(url)) - set(kept):
        # A process that was killed while it wrote NAME has left .NAME.XXXXXXXX.
        written = re.sub(r"^\.(.+)\.\w{8}$", r"\1", name)
        if written == MANIFEST or is_part_name(written):
            storage.remove(join(url, name))
    _remove_empty(url)


def prune_exports(
    config: TrainConfig, kinds: Set[str], info: WeightsInfo, scores: Mapping[int, float]
) -> None:
    """Remove the exported weights that need not be kept; `info` describes those exported last.

    Only weights whose weights.json names this step and this run's encoders and scaling are removed.
    """
    folder = join(config.run, "weights")
    steps = [step for step in step_folders(folder) if step <= info.step]
    kept = {*steps[-config.keep_exports :]}
    kept |= _best_step(steps, scores)
    for step in set(steps) - kept:
        url = join(folder, step_name(step))
        for kind in kinds & set(list_names(url)):
            if _is_own_export(join(url, kind), replace(info, step=step)):
                remove_weights(join(url, kind))
                _remove_empty(join(url, kind))
        _remove_empty(url)


def _is_own_export(url: str, info: WeightsInfo) -> bool:
    """Whether weights.json in folder `url` says what `info` does, apart from decay and recipe."""
    try:
        stored = read_stored_weights(url).info
    except StoreError:
        raise
    except UserError:
        return False
    own = replace(info, ema_decay=stored.ema_decay, recipe_sha256=stored.recipe_sha256)
    return stored == own


def _remove_empty(url: str) -> None:
    """Remove a local folder that is empty; an object store has no empty folders."""
    if not is_remote(url):
        with suppress(OSError):
            Path(url).rmdir()


def _best_step(steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
    """That of `steps` with the lowest score, the first of equals."""
    measured = [(scores[step], step) for step in steps if step in scores]
    return {min(measured)[1]} if measured else set()
