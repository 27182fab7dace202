"""The verb `bench train`: time of a training step, relative to its peers and to the hardware.

The contenders are the training loop with each of the paper's four variants, a bare loop, and
U-ViT's recipe.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.analysis.plan import activation_bytes, cast_bytes, state_bytes, update_bytes
from ifvit.bench.config import BenchTrainConfig
from ifvit.bench.measurement import (
    DTYPES,
    copy_probe,
    kept_bytes,
    matmul_probe,
    measure_rounds,
    median_ratio,
    print_result,
    seconds_on,
    spread,
)
from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NUM_TIMESTEPS, NoiseSchedule
from ifvit.distributed import choose_device
from ifvit.models.config import PRESETS, SETTINGS, FusionTransformerConfig, with_setting
from ifvit.models.cost import count_cost
from ifvit.models.weights import build_backbone, initial_weights
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import (
    EMA,
    Engine,
    build_optimizer,
    choose_normal_sampler,
    prepare_forward,
)
from ifvit.training.guards import StopRequest
from ifvit.training.loop import Hook, TrainState, fit
from ifvit.training.profiling import device_name, peak_flops

SCALING_FACTOR = 0.2301
EARLY, INTERMEDIATE = "concat_early", "cross_attention_intermediate"
NUM_COMPILATIONS = 32
"""By default, torch compiles one function 8 times at most; the four variants need more."""

Row = dict[str, str | int | float]


def bench_train(config: BenchTrainConfig) -> None:
    """Measure all contenders in turn, and print a row for each variant and the ratios."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = NUM_COMPILATIONS
    device = torch.device(choose_device("auto"))
    recipes = {name: build_recipe(shape, config) for name, shape in _variants(config).items()}
    rows, ratios = _measure(recipes, config, device)
    result: dict[str, object] = {
        **ratios,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "preset": config.preset,
        "batch_size": config.batch_size,
        "precision": recipes[EARLY].engine.precision,
        "compile": config.compile,
        "attention": config.attention,
    }
    if config.json:
        print_result({"rows": rows, **result}, as_json=True)
        return
    _print_table(rows)
    print_result(result, as_json=False)


def _measure(
    recipes: Mapping[str, TrainConfig], config: BenchTrainConfig, device: torch.device
) -> tuple[list[Row], dict[str, float]]:
    """Measure a row for each recipe, the ratios, and the limits of the hardware."""
    engines = {name: EngineSteps(recipe) for name, recipe in recipes.items()}
    contenders: dict[str, Callable[[int], None]] = {
        **engines,
        "bare_loop": BareSteps(recipes[INTERMEDIATE], device),
        "uvit_recipe": UViTRecipeSteps(recipes[EARLY], device),
    }
    dtype = DTYPES[recipes[EARLY].engine.precision]
    matmul, copy = matmul_probe(device, dtype), copy_probe(device)
    timers: dict[str, Callable[[], float]] = {
        name: partial(seconds_on, device, partial(steps, config.steps))
        for name, steps in contenders.items()
    }
    timers |= {"matmul": matmul.seconds, "copy": copy.seconds}
    measure_rounds(timers, 2)  # first use of the device, and compilation
    memory = {name: _measure_memory(steps) for name, steps in engines.items()}
    seconds = measure_rounds(timers, config.rounds)
    ratios = {
        "intermediate_vs_early": median_ratio(seconds[EARLY], seconds[INTERMEDIATE]),
        "engine_overhead": median_ratio(seconds[INTERMEDIATE], seconds["bare_loop"]) - 1,
        "vs_uvit_recipe": median_ratio(seconds["uvit_recipe"], seconds[EARLY]),
        "matmul_flops_per_s": matmul.best(seconds["matmul"]),
        "copy_bytes_per_s": copy.best(seconds["copy"]),
    }
    # Without a peak from the vendor, MFU is relative to the measured matrix product.
    peak = peak_flops(device) or ratios["matmul_flops_per_s"]
    rows = []
    for name, recipe in recipes.items():
        step = statistics.median(seconds[name]) / config.steps
        row: Row = {"setting": name, "step_seconds": step, "spread": spread(seconds[name])}
        row |= _relate_to_hardware(recipe, step, ratios, peak) | memory[name]
        row["vs_uvit_recipe"] = median_ratio(seconds["uvit_recipe"], seconds[name])
        rows.append(row)
    return rows, ratios


def _variants(config: BenchTrainConfig) -> dict[str, FusionTransformerConfig]:
    """The four backbones that the paper compares, in the size of the preset."""
    return {name: with_setting(PRESETS[config.preset], name) for name in SETTINGS[:4]}


def build_recipe(shape: FusionTransformerConfig, config: BenchTrainConfig) -> TrainConfig:
    """Build the recipe of one process with plain PyTorch, without run folder and shards."""
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    return TrainConfig(
        run="bench",
        shards="bench",
        backbone=shape,
        engine=EngineConfig(
            backend="plain",
            precision=precision,
            compile=config.compile,
            attention=config.attention,
        ),
        global_batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
    )


class EngineSteps:
    """The loop of `ifvit train` on one batch in memory."""

    def __init__(self, config: TrainConfig) -> None:
        self.engine = Engine(config, initial_weights(config.backbone, config.seed))
        self.backbone = self.engine.backbone
        self.state = TrainState()
        self._objective = _objective(config, self.engine.device)
        self._batch = _random_batch(config, self.engine.device)

    def __call__(self, num_steps: int, hooks: Sequence[Hook] = ()) -> None:
        """Train for `num_steps` steps."""
        self.state = fit(
            self.state,
            self.state.step + num_steps,
            cast(Batches, _SameBatch(self._batch)),
            self._objective,
            self.engine,
            hooks,
            StopRequest(self.engine.world),
            log_every=num_steps,
        )

    def loss(self) -> Tensor:
        """Compute the loss of one step, with its graph."""
        batch = self._batch
        return self._objective(
            self.engine.predict_noise, batch.moments, batch.condition, 0, batch.positions
        ).total


class _SameBatch:
    """Stands in for `Batches` in the loop and yields one batch without end."""

    num_micro_batches = 1

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.global_batch_size = len(batch.positions)

    def stream(self, step: int, samples_seen: int, device: torch.device) -> Iterator[Batch]:
        while True:
            yield self._batch


class BareSteps:
    """The shortest loop for the same backbone: forward, backward, optimizer step, EMA."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.backbone = build_backbone(config.backbone)
        self.backbone.set_attention(config.engine.attention)
        self.backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides it
        prepare_forward(self.backbone, config.engine, device)
        self._objective = _objective(config, device)
        self._batch = _random_batch(config, device)
        self._parameters = list(self.backbone.parameters())
        self._optimizer = build_optimizer(self.backbone, config.optim)
        self._ema = EMA(self._parameters, config.ema_decays[0])

    def __call__(self, num_steps: int) -> None:
        """Train for `num_steps` steps."""
        batch = self._batch
        for step in range(num_steps):
            losses = self._objective(
                self.backbone, batch.moments, batch.condition, step, batch.positions
            )
            losses.total.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._ema.update(self._parameters)


class UViTRecipeSteps:
    """The training step of U-ViT's code (Bao et al. 2023), written from its description.

    Eager blocks, fp16 autocast and loss scaling on CUDA, AdamW tensor by tensor, EMA by a loop over
    the parameters, and a loss that is read on the host in every step. Its attention is torch's, as
    in U-ViT's code without xformers.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.backbone = build_backbone(config.backbone)
        self.backbone.to(device)  # type: ignore[arg-type]  # as above
        self._ema = deepcopy(self.backbone).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self.backbone.parameters(),
            lr=config.optim.learning_rate,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            foreach=False,
        )
        self._uses_fp16 = device.type == "cuda"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._uses_fp16)
        self._schedule, self._batch = NoiseSchedule(device), _random_batch(config, device)
        self._decay = config.ema_decays[0]

    def __call__(self, num_steps: int) -> None:
        """Train for `num_steps` steps."""
        for _ in range(num_steps):
            loss = self._loss()
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()
            parameters = self.backbone.parameters()
            for ema, parameter in zip(self._ema.parameters(), parameters, strict=True):
                ema.data.mul_(self._decay).add_((1 - self._decay) * parameter.data)
            loss.detach().mean().item()

    def _loss(self) -> Tensor:
        moments, context = self._batch.moments.float(), self._batch.condition.float()
        mean, logvar = moments.chunk(2, dim=1)
        x_0 = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * SCALING_FACTOR
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(NUM_TIMESTEPS, (len(x_0),), device=x_0.device)
        x_t = self._schedule.add_noise(x_0, noise, timesteps)
        with torch.autocast(x_0.device.type, torch.float16, enabled=self._uses_fp16):
            predicted = self.backbone(x_t, timesteps, context)
        return functional.mse_loss(predicted.float(), noise)


def _random_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Sample moments and contexts in the shapes of the recipe, in float16 as in shards."""
    shape, size = config.backbone, config.micro_batch_size
    moments = (size, 2 * shape.latent_channels, shape.latent_size, shape.latent_size)
    assert shape.context_shape is not None  # the presets take captions
    return Batch(
        moments=torch.randn(moments, device=device).half(),
        condition=torch.randn(size, *shape.context_shape, device=device).half(),
        positions=torch.arange(size, device=device),
    )


def _objective(config: TrainConfig, device: torch.device) -> NoisePrediction:
    return NoisePrediction(
        schedule=NoiseSchedule(device),
        scaling_factor=SCALING_FACTOR,
        seed=config.seed,
        sample_normal=choose_normal_sampler(config.engine),
    )


def _measure_memory(steps: EngineSteps) -> Row:
    """Measure `state_bytes` held between steps, and `step_bytes` that a step adds at its peak.

    On a GPU the allocator measures `step_bytes`. On a CPU they are the bytes of the gradients and
    of the tensors that the forward pass keeps for the backward pass.
    """
    engine = steps.engine
    parameters = list(steps.backbone.parameters())
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    state = num_bytes * (3 + len(engine.ema_decays))
    if engine.device.type != "cuda":
        return {"state_bytes": state, "step_bytes": num_bytes + kept_bytes(steps.loss, parameters)}
    torch.cuda.reset_peak_memory_stats(engine.device)
    before = torch.cuda.memory_allocated(engine.device)
    steps(1)
    engine.synchronize()
    peak = torch.cuda.max_memory_allocated(engine.device)
    return {"state_bytes": state, "step_bytes": peak - before}


def _relate_to_hardware(
    recipe: TrainConfig, step: float, limits: Mapping[str, float], peak: float
) -> Row:
    """Compare the seconds of a step with the limits of the hardware.

    The floor is the time of the matrix products plus the time of the optimizer's memory traffic.
    MFU (model FLOPs utilization) is relative to `peak` FLOP/s. `planned_bytes` are the bytes of
    state and step that `ifvit cost --plan` calculates.
    """
    shape, precision, batch_size = recipe.backbone, recipe.engine.precision, recipe.micro_batch_size
    assert isinstance(shape, FusionTransformerConfig)  # as all presets are
    cost, num_ema = count_cost(shape), len(recipe.ema_decays)
    # A backward pass costs as much as two forward passes.
    flops, layer_flops = (3 * count * batch_size for count in (cost.flops, cost.layer_flops))
    flops_seconds = flops / limits["matmul_flops_per_s"]
    bytes_seconds = update_bytes(cost.params, 1, 0, num_ema) / limits["copy_bytes_per_s"]
    activations = activation_bytes(shape, batch_size, precision, checkpointing=False)
    states = state_bytes(cost.params, 1, 0, num_ema) + cast_bytes(cost.params, precision)
    return {
        "images_per_s": batch_size / step,
        "floor_flops_seconds": flops_seconds,
        "floor_bytes_seconds": bytes_seconds,
        "vs_floor": step / (flops_seconds + bytes_seconds),
        "mfu": flops / step / peak,
        "mfu_paper": layer_flops / step / peak,
        "planned_bytes": states + activations,
    }


def _print_table(rows: list[Row]) -> None:
    head = f"{'':30}{'step':>9}{'spread':>8}{'images/s':>10}{'x floor':>9}{'MFU':>7}{'GB':>7}"
    sys.stdout.write(head + f"{'x U-ViT recipe':>16}\n")
    for row in rows:
        gigabytes = (float(row["state_bytes"]) + float(row["step_bytes"])) / 1e9
        sys.stdout.write(
            f"{row['setting']:<30}{row['step_seconds']:8.3f}s{row['spread']:8.1%}"
            f"{row['images_per_s']:10.1f}{row['vs_floor']:9.2f}{row['mfu']:7.1%}"
            f"{gigabytes:7.2f}{row['vs_uvit_recipe']:16.2f}\n"
        )
