"""What happens beside the steps: checkpoints, exported weights, pictures."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ifvit.images import encode_png
from ifvit.models.clip import load_text_encoder
from ifvit.models.uvit import FusionUViT
from ifvit.models.weights import WeightsInfo, save_weights
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.encoders import check_identity, open_autoencoder
from ifvit.sampling.grid import make_grid
from ifvit.sampling.sampler import Sampler, generate_images
from ifvit.shards import ShardReader
from ifvit.storage import join, write_bytes
from ifvit.training.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint, step_name
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.ema import EMA
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport
from ifvit.training.state import TrainState

_GRID_COLUMNS = 8


class SaveCheckpoint:
    """A checkpoint and exported weights, EMA and raw, every `checkpoint_every` steps."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: FusionUViT,
        engine: Engine,
        ema: EMA,
        info: WeightsInfo,
        shards_sha256: str,
    ) -> None:
        self.every = config.checkpoint_every
        self._config, self._backbone, self._engine, self._ema = config, backbone, engine, ema
        self._info, self._shards_sha256 = info, shards_sha256

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Gather the partitioned optimizer state on all processes, write on the main one."""
        optimizer = self._engine.optimizer_state()
        if self._engine.world.is_main:
            checkpoint = Checkpoint(
                state=state,
                shards_sha256=self._shards_sha256,
                backbone=dict(self._backbone.state_dict()),
                optimizer=optimizer,
                ema=self._ema.state_dict(),
            )
            # Weights first: a run whose last checkpoint is complete has its last weights too.
            self._export(state.step)
            save_checkpoint(self._config.run, checkpoint)
            prune_checkpoints(self._config.run, self._config.keep_checkpoints)
        self._engine.barrier()

    def _export(self, step: int) -> None:
        folder = join(self._config.run, "weights", step_name(step))
        raw = dataclasses.replace(self._info, step=step, ema_decay=None)
        save_weights(join(folder, "raw"), self._backbone, raw)
        averaged = dataclasses.replace(raw, ema_decay=self._ema.decay)
        with self._ema.applied():
            save_weights(join(folder, "ema"), self._backbone, averaged)


class SampleGrid:
    """A picture of the same prompts from the same noise, drawn with the averaged weights."""

    def __init__(
        self, config: TrainConfig, backbone: FusionUViT, engine: Engine, ema: EMA, info: WeightsInfo
    ) -> None:
        self.every = config.sample_grid.every
        self._run, self._engine, self._ema = config.run, engine, ema
        reader = ShardReader(config.shards)
        self._contexts = _grid_contexts(config.sample_grid, reader, engine.device)
        self._sampler = Sampler(
            backbone=backbone,
            autoencoder=open_autoencoder(info, str(engine.device)),
            null_context=torch.from_numpy(np.array(reader.null_context)),
            scaling_factor=info.scaling_factor,
        )
        self._sampling = SamplingConfig(
            num_steps=config.sample_grid.num_steps, guidance_scale=config.sample_grid.guidance_scale
        )

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Draw on the main process; the others wait."""
        if self._engine.world.is_main:
            positions = range(len(self._contexts))
            with self._ema.applied():
                drawn = generate_images(
                    self._sampler, self._contexts.__getitem__, positions, self._sampling
                )
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
