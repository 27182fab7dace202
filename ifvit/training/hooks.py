"""What happens beside the steps: checkpoints, exported weights, pictures."""

import dataclasses
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ifvit.images import encode_png
from ifvit.models.clip import load_text_encoder
from ifvit.models.weights import WeightsInfo, save_weights
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.encoders import check_identity, open_autoencoder
from ifvit.sampling.grid import make_grid
from ifvit.sampling.sampler import Sampler, generate_images
from ifvit.shards import ShardReader
from ifvit.storage import join, write_bytes
from ifvit.training.checkpoint import (
    PARTS,
    Checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_name,
)
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport
from ifvit.training.optim import MOMENTS
from ifvit.training.state import TrainState

_GRID_COLUMNS = 8


class SaveCheckpoint:
    """A checkpoint and exported weights, EMA and raw, every `checkpoint_every` steps."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        info: WeightsInfo,
        shards_sha256: str,
    ) -> None:
        self.every = config.checkpoint_every
        self._config, self._engine = config, engine
        self._info, self._shards_sha256 = info, shards_sha256

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Gather the partitioned state on all processes, write on the main one."""
        # Weights first: a run whose last checkpoint is complete has its last weights too.
        self._export(state.step)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for name, tensor in self._engine.iter_state():
            if self._engine.world.is_main:
                parts[_part(name)][name] = tensor
        if self._engine.world.is_main:
            checkpoint = Checkpoint(state=state, shards_sha256=self._shards_sha256, **parts)
            save_checkpoint(self._config.run, checkpoint)
            prune_checkpoints(self._config.run, self._config.keep_checkpoints)
        self._engine.barrier()

    def _export(self, step: int) -> None:
        """The trained weights in raw/, the first average in ema/, the others in ema_DECAY/."""
        folder = join(self._config.run, "weights", step_name(step))
        first, *others = self._engine.ema_decays
        kinds = {"raw": None, "ema": first, **{f"ema_{decay}": decay for decay in others}}
        for kind, decay in kinds.items():
            backbone = self._engine.whole_backbone(decay)
            info = dataclasses.replace(self._info, step=step, ema_decay=decay)
            if self._engine.world.is_main:
                save_weights(join(folder, kind), backbone, info)


def _part(name: str) -> str:
    """The part of a checkpoint in which the tensor `name` of `Engine.iter_state` is kept."""
    kind = name.partition(".")[0]
    return "backbone" if kind == "backbone" else "optimizer" if kind in MOMENTS else "ema"


class SampleGrid:
    """A picture of the same prompts from the same noise, drawn with the averaged weights."""

    def __init__(self, config: TrainConfig, engine: Engine, info: WeightsInfo) -> None:
        self.every = config.sample_grid.every
        self._run, self._engine = config.run, engine
        reader = ShardReader(config.shards, config.cache)
        self._contexts = _grid_contexts(config.sample_grid, reader, engine.device)
        self._build_sampler = partial(
            Sampler,
            autoencoder=open_autoencoder(info, str(engine.device)),
            null_context=torch.from_numpy(np.array(reader.null_context)),
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
            positions = range(len(self._contexts))
            drawn = generate_images(sampler, self._contexts.__getitem__, positions, self._sampling)
            images = np.concatenate(list(drawn))
            name = f"{step_name(state.step)}.png"
            write_bytes(
                join(self._run, "samples", name), encode_png(make_grid(images, _GRID_COLUMNS))
            )
        self._engine.barrier()


def _grid_contexts(config: SampleGridConfig, reader: ShardReader, device: torch.device) -> Tensor:
    """(N, M, D) contexts of the prompts, or of the first two rows' worth of training captions."""
    if not config.prompts:
        count = min(2 * _GRID_COLUMNS, len(reader))
        return torch.from_numpy(np.stack([reader.context(i, 0) for i in range(count)]))
    encoder = load_text_encoder(reader.text.encoder.name, str(device))
    check_identity("text encoder", encoder.identity, reader.text.encoder)
    return encoder.encode(list(config.prompts))
