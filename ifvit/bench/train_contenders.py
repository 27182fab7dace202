"""What trains in `bench train`: the product, a bare loop, and U-ViT's recipe.

Each is called with a number of steps. They train on one batch, which is on the device already.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.diffusion.objective import NoisePrediction
from ifvit.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule
from ifvit.models.build import build_backbone
from ifvit.training.batch import Batch
from ifvit.training.batches import Batches
from ifvit.training.config import TrainConfig
from ifvit.training.ema import EMA
from ifvit.training.engine import Engine
from ifvit.training.forward import prepare_draws, prepare_forward
from ifvit.training.loop import fit
from ifvit.training.optim import build_optimizer
from ifvit.training.profile import StepProfiler
from ifvit.training.state import TrainState
from ifvit.training.stop import StopRequest

SCALING_FACTOR = 0.2301


def make_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Random moments and contexts of the recipe's shape, float16 as shards have them."""
    shape, size = config.backbone, config.micro_batch_size
    moments = (size, 2 * shape.latent_channels, shape.latent_size, shape.latent_size)
    assert shape.context_shape is not None  # the presets take captions
    contexts = (size, *shape.context_shape)
    return Batch(
        moments=torch.randn(moments, device=device).half(),
        condition=torch.randn(contexts, device=device).half(),
        positions=torch.arange(size, device=device),
    )


def make_objective(config: TrainConfig, device: torch.device) -> NoisePrediction:
    """The objective as `ifvit train` has it."""
    return NoisePrediction(
        schedule=NoiseSchedule(device),
        scaling_factor=SCALING_FACTOR,
        seed=config.seed,
        draw=prepare_draws(config.engine),
    )


class EngineSteps:
    """The loop of `ifvit train` itself, without data to read and without hooks."""

    def __init__(self, config: TrainConfig) -> None:
        self.backbone = build_backbone(config.backbone)
        self.backbone.set_attention(config.engine.attention)
        self.engine = Engine(
            self.backbone,
            config.engine,
            config.optim,
            ema_decays=config.ema_decays,
            micro_batch_size=config.micro_batch_size,
            num_micro_batches=1,
        )
        self._config, self._state = config, TrainState()
        self._objective = make_objective(config, self.engine.device)
        self._batch = make_batch(config, self.engine.device)
        self._stop = StopRequest(self.engine.world)
        self._profiler = StepProfiler("", self.engine.world, enabled=False)

    def __call__(self, num_steps: int) -> None:
        """Train."""
        config = replace(self._config, max_steps=self._state.step + num_steps)
        self._state = fit(
            self._state,
            cast(Batches, _SameBatch(self._batch)),
            self._objective,
            self.engine,
            [],
            config,
            self._stop,
            self._profiler,
        )

    def loss(self) -> Tensor:
        """The loss of a step, to be differentiated."""
        batch = self._batch
        return self._objective(
            self.engine.denoise, batch.moments, batch.condition, 0, batch.positions
        ).total


class _SameBatch:
    """As much of `Batches` as the loop needs."""

    num_micro_batches = 1

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def from_state(self, state: TrainState, device: torch.device) -> Iterator[Batch]:
        while True:
            yield self._batch


class BareSteps:
    """The least that trains the same backbone: forward, backward, update, average."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.backbone = build_backbone(config.backbone)
        self.backbone.set_attention(config.engine.attention)
        self.backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides it
        prepare_forward(self.backbone, config.engine, device)
        self._objective = make_objective(config, device)
        self._batch = make_batch(config, device)
        self._parameters = list(self.backbone.parameters())
        self._optimizer = build_optimizer(self._parameters, config.optim)
        self._average = EMA(self._parameters, config.ema_decays[0])

    def __call__(self, num_steps: int) -> None:
        """Train."""
        batch = self._batch
        for step in range(num_steps):
            losses = self._objective(
                self.backbone, batch.moments, batch.condition, step, batch.positions
            )
            losses.total.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._average.update(self._parameters)


class UViTRecipeSteps:
    """U-ViT's way to train (Bao et al. 2023 and its code), written from the description.

    Eager blocks, under CUDA with fp16 autocast and loss scaling; AdamW tensor by tensor; averages
    by a loop over the parameters; every step gathers the loss and looks at it on the host. Its
    attention is torch's, as where xformers is not installed.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.backbone = build_backbone(config.backbone)
        self.backbone.to(device)  # type: ignore[arg-type]  # as above
        self._averaged = deepcopy(self.backbone).requires_grad_(False)
        optim = config.optim
        self._optimizer = torch.optim.AdamW(
            self.backbone.parameters(),
            lr=optim.learning_rate,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            foreach=False,
        )
        self._halves = device.type == "cuda"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._halves)
        self._schedule, self._batch = NoiseSchedule(device), make_batch(config, device)
        self._decay = config.ema_decays[0]

    def __call__(self, num_steps: int) -> None:
        """Train."""
        for _ in range(num_steps):
            loss = self._loss()
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()
            for averaged, parameter in zip(
                self._averaged.parameters(), self.backbone.parameters(), strict=True
            ):
                averaged.data.mul_(self._decay).add_((1 - self._decay) * parameter.data)
            loss.detach().mean().item()

    def _loss(self) -> Tensor:
        moments, context = self._batch.moments.float(), self._batch.condition.float()
        mean, logvar = moments.chunk(2, dim=1)
        x_0 = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * SCALING_FACTOR
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(NUM_TIMESTEPS, (len(x_0),), device=x_0.device)
        x_t = self._schedule.add_noise(x_0, noise, timesteps)
        with torch.autocast(x_0.device.type, torch.float16, enabled=self._halves):
            predicted = self.backbone(x_t, timesteps, context)
        return functional.mse_loss(predicted.float(), noise)
