"""Hooks that use the EMA weights while a run trains: the held-out loss, and grids of images."""

from abc import ABC, abstractmethod
from collections import deque

import numpy as np
import torch

from ifvit import storage
from ifvit.conditions import Condition, move, select_rows
from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.images import encode_png, make_grid
from ifvit.models.backbone import Backbone
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.weights import WeightsInfo, exported_backbone, step_name
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.load import load_conditions, load_decoder, schedule_of
from ifvit.sampling.samples import batched
from ifvit.training.config import SampleGridConfig, TrainConfig, ValidationConfig
from ifvit.training.engine import Engine
from ifvit.training.loop import StepReport, TrainState
from ifvit.training.metrics_log import MetricsLog

_GRID_COLUMNS = 8


class EmaHook(ABC):
    """Uses the EMA weights of the first decay on the main process while the others wait."""

    name: str
    on_stop = False

    def __init__(self, every: int, engine: Engine) -> None:
        self.every, self._engine = every, engine

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Gather the weights and use them; all processes call this together."""
        engine = self._engine
        weights = engine.iter_weights(engine.ema_decays[0])
        if engine.world.is_main:
            self.use(exported_backbone(engine.backbone.config, dict(weights)), state.step)
        else:
            deque(weights, maxlen=0)  # takes part in gathering, and keeps nothing
        engine.barrier()

    @abstractmethod
    def use(self, backbone: Backbone, step: int) -> None:
        """Do the work of the hook, with the backbone of these weights after a step."""


class Validation(EmaHook):
    """Adds the held-out loss of the EMA weights to the row of the step.

    Only the main process computes it, always in the same chunks and in fp32. It is therefore equal
    for any number of processes, after every restart and in evaluations, and runs of any precision
    compare. The noise does not depend on the run's seed, so that runs of several seeds compare.
    """

    name = "validation"

    def __init__(
        self,
        config: ValidationConfig,
        conditions: DatasetConditions,
        engine: Engine,
        info: WeightsInfo,
        metrics: MetricsLog,
    ) -> None:
        super().__init__(config.every, engine)
        self._loss = HeldOutLoss(conditions, config.num_samples, info, engine.device)
        self._metrics = metrics

    def use(self, backbone: Backbone, step: int) -> None:
        """Compute the loss."""
        self._metrics.add_validation(step, self._loss.measure(backbone))


class SampleGrid(EmaHook):
    """Renders a grid of images with EMA weights, always from the same prompts and noise."""

    name = "samples"

    def __init__(
        self, config: TrainConfig, conditions: DatasetConditions, engine: Engine, info: WeightsInfo
    ) -> None:
        grid = config.sample_grid
        super().__init__(grid.every, engine)
        self._folder = storage.join(config.run, "samples")
        self._schedule = schedule_of(info, engine.device)
        shown, self._null_condition = _grid_conditions(grid, conditions, info)
        self._decode = load_decoder(info, str(engine.device))
        self._sampling = SamplingConfig(
            num_steps=grid.num_steps, guidance_scale=grid.guidance_scale, precision=grid.precision
        )
        chunks = map(torch.tensor, batched(range(len(shown)), self._sampling.batch_size))
        self._batches = [
            ConditionBatch(positions=chunk, condition=select_rows(shown, chunk)) for chunk in chunks
        ]

    def use(self, backbone: Backbone, step: int) -> None:
        """Generate the images and write the grid."""
        sampler = Sampler(
            backbone=backbone,
            schedule=self._schedule,
            decode=self._decode,
            null_condition=self._null_condition,
        )
        images = np.concatenate([*generate_images(sampler, self._batches, self._sampling)])
        grid = encode_png(make_grid(images, _GRID_COLUMNS))
        storage.write_bytes(storage.join(self._folder, f"{step_name(step)}.png"), grid)


def _grid_conditions(
    config: SampleGridConfig, conditions: DatasetConditions, info: WeightsInfo
) -> tuple[Condition, Condition]:
    """N conditions of the grid, and the null condition, on the CPU.

    They come from the prompts of the recipe, or else from the first captions or classes, which
    fill two rows.
    """
    if config.prompts or info.text_encoder is None:
        trained = load_conditions(info, "cpu")
        prompts = config.prompts or info.classes[: 2 * _GRID_COLUMNS]
        return trained.encode(list(prompts)), trained.null
    count = min(2 * _GRID_COLUMNS, len(conditions.reader))
    shown = conditions.read(range(count), [0] * count)
    return move(shown, "cpu"), move(conditions.null, "cpu")
