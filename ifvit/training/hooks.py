"""What happens beside the steps: checkpoints, exported weights, pictures."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ifvit.images import encode_png, make_grid
from ifvit.models.build import restore_backbone
from ifvit.models.weights import WeightsInfo, save_weights, step_name
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.encoders import open_autoencoder, open_conditions
from ifvit.sampling.sampler import Sampler, generate_images
from ifvit.shards import ShardReader
from ifvit.side_channel import SideChannel
from ifvit.storage import join, write_bytes
from ifvit.training.checkpoint import Checkpoint
from ifvit.training.checkpoint_saver import CheckpointSaver
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.engine import Engine, average_name
from ifvit.training.lease import Lease
from ifvit.training.loop import StepReport
from ifvit.training.retention import Retention, prune
from ifvit.training.state import TrainState

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
        channel: SideChannel,
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
            "ema": (first, f"{average_name(first)}."),
            **{f"ema_{decay}": (decay, f"{average_name(decay)}.") for decay in others},
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
        self._conditions, null_condition = _grid_conditions(config.sample_grid, reader, info)
        self._build_sampler = partial(
            Sampler,
            autoencoder=open_autoencoder(info, str(engine.device)),
            null_condition=null_condition,
            scaling_factor=info.scaling_factor,
        )
        self._sampling = SamplingConfig(
            num_steps=config.sample_grid.num_steps, guidance_scale=config.sample_grid.guidance_scale
        )

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Draw on the main process; the others wait."""
        backbone = self._engine.whole_backbone(self._engine.ema_decays[0])
        if self._engine.world.is_main:
            sampler = self._build_sampler(backbone=backbone)
            positions = range(len(self._conditions))
            drawn = generate_images(
                sampler, self._conditions.__getitem__, positions, self._sampling
            )
            images = np.concatenate(list(drawn))
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
        conditions = open_conditions(info, "cpu")
        prompts = config.prompts or info.classes[: 2 * _GRID_COLUMNS]
        return conditions.encode(list(prompts)), conditions.null
    count = min(2 * _GRID_COLUMNS, len(reader))
    contexts = torch.from_numpy(np.stack([reader.context(i, 0) for i in range(count)]))
    return contexts, torch.from_numpy(np.array(reader.null_context))
