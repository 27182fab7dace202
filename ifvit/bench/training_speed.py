"""The verb `bench train`: time and memory of a training step with any fusion maps, side by side.

The paper's four settings are also compared with U-ViT's recipe.
"""

import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.analysis.plan import activation_bytes, state_bytes
from ifvit.bench.config import BenchTrainConfig
from ifvit.bench.measurement import (
    median_ratio,
    print_result,
    seconds_on,
    spread,
)
from ifvit.diffusion.schedules import NUM_TIMESTEPS, NoiseSchedule
from ifvit.distributed import choose_device
from ifvit.models.config import FusionTransformerConfig, name_map, without_representation
from ifvit.models.cost import count_cost
from ifvit.models.presets import PRESETS, SETTINGS, setting_of, with_maps
from ifvit.models.weights import build_backbone
from ifvit.studies.step_time import SCALING_FACTOR, EngineSteps, measure_rounds, random_batch
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.profiling import device_name, peak_flops

EARLY, INTERMEDIATE = "concat_early", "cross_attention_intermediate"
NUM_COMPILATIONS = 256
"""By default, torch compiles one function 8 times at most; several maps need more."""

Row = dict[str, str | int | float | None]


def bench_train(config: BenchTrainConfig) -> None:
    """Measure all contenders in turn, and print a row for each map and the ratios."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = NUM_COMPILATIONS
    device = torch.device(choose_device("auto"))
    maps = with_maps(config.backbone or PRESETS["small"], config.maps or SETTINGS[:4])
    recipes = {name: build_recipe(backbone, config) for name, backbone in maps.items()}
    engines = {name: EngineSteps(recipe) for name, recipe in recipes.items()}
    contenders: dict[str, Callable[[int], None]] = {**engines}
    if not config.maps:
        contenders["uvit_recipe"] = UViTRecipeSteps(recipes[EARLY], device)
    timers = {
        name: partial(seconds_on, device, partial(steps, config.steps))
        for name, steps in contenders.items()
    }
    measure_rounds(timers, 2)  # first use of the device, and compilation
    peaks = {name: _peak_bytes(steps) for name, steps in engines.items()}
    seconds = measure_rounds(timers, config.rounds)
    first = next(iter(recipes))
    rows: list[Row] = []
    for name, recipe in recipes.items():
        step = statistics.median(seconds[name]) / config.steps
        vs_first = median_ratio(seconds[name], seconds[first])
        row: Row = {"step_seconds": step, "spread": spread(seconds[name]), "vs_first": vs_first}
        row |= _describe(maps[name], recipe, step, device) | {"peak_bytes": peaks[name]}
        rows.append(row)
    ratios = (
        {}
        if config.maps
        else {
            "intermediate_vs_early": median_ratio(seconds[EARLY], seconds[INTERMEDIATE]),
            "vs_uvit_recipe": median_ratio(seconds["uvit_recipe"], seconds[EARLY]),
        }
    )
    result: dict[str, object] = {
        **ratios,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "width": maps[first].width,
        "batch_size": config.batch_size,
        "precision": recipes[first].engine.precision,
        "compile": config.compile,
        "attention": config.attention,
    }
    if config.json:
        print_result({"rows": rows, **result}, as_json=True)
        return
    _print_table(rows)
    print_result(result, as_json=False)


def _describe(
    backbone: FusionTransformerConfig, recipe: TrainConfig, step: float, device: torch.device
) -> Row:
    """Map, speed, and the bytes that `ifvit cost --plan` counts, of a step of `step` seconds.

    MFU (model FLOPs utilization) is relative to the vendor's peak; None on an unknown device.
    """
    cost, batch_size, peak = count_cost(backbone), recipe.micro_batch_size, peak_flops(device)
    flops = 3 * cost.flops * batch_size  # a backward pass costs as much as two forward passes
    precision = recipe.engine.precision
    state = state_bytes(cost.params, 1, 0, len(recipe.ema_decays))
    activations = activation_bytes(backbone, batch_size, precision, checkpointing=False)
    return {
        "setting": setting_of(backbone),
        "fusion": backbone.fusion,
        "num_text_blocks": backbone.num_text_blocks,
        "images_per_s": batch_size / step,
        "mfu": None if peak is None else flops / step / peak,
        "params": cost.params,
        "planned_bytes": state + activations,
    }


def _peak_bytes(steps: EngineSteps) -> int | None:
    """Return the bytes of the state, and those that a step adds at its peak; None on a CPU."""
    engine = steps.engine
    if engine.device.type != "cuda":
        return None
    state = sum(x.nbytes for x in steps.backbone.parameters()) * (3 + len(engine.ema_decays))
    torch.cuda.reset_peak_memory_stats(engine.device)
    before = torch.cuda.memory_allocated(engine.device)
    steps(1)
    engine.synchronize()
    return state + torch.cuda.max_memory_allocated(engine.device) - before


def build_recipe(shape: FusionTransformerConfig, config: BenchTrainConfig) -> TrainConfig:
    """Build the recipe of one process with plain PyTorch, without run folder and shards."""
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    return TrainConfig(
        run="bench",
        shards="bench",
        backbone=without_representation(shape),  # there are no features to align with
        engine=EngineConfig(
            backend="plain", precision=precision, compile=config.compile, attention=config.attention
        ),
        global_batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
    )


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
        self._schedule, self._batch = NoiseSchedule(device), random_batch(config, device)
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
        mean, logvar = self._batch.moments.float().chunk(2, dim=1)
        x_0 = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * SCALING_FACTOR
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(NUM_TIMESTEPS, (len(x_0),), device=x_0.device)
        x_t = self._schedule.add_noise(x_0, noise, timesteps)
        with torch.autocast(x_0.device.type, torch.float16, enabled=self._uses_fp16):
            predicted = self.backbone(x_t, timesteps, self._batch.condition)
        return functional.mse_loss(predicted.float(), noise)


def _print_table(rows: list[Row]) -> None:
    head = f"{'step':>9}{'spread':>8}{'x first':>9}{'images/s':>10}{'MFU':>7}{'planned':>11}"
    sys.stdout.write(head + f"{'peak':>11}  fusion map\n")
    for row in rows:
        fusion, mfu, peak = row["fusion"], row["mfu"], row["peak_bytes"]
        fusion = name_map(str(fusion), int(row["num_text_blocks"] or 0))
        sys.stdout.write(
            f"{row['step_seconds']:8.3f}s{row['spread']:8.1%}{row['vs_first']:9.3f}"
            f"{row['images_per_s']:10.1f}{'-' if mfu is None else format(mfu, '.1%'):>7}"
            f"{_gigabytes(row['planned_bytes'])}{_gigabytes(peak)}  {fusion}\n"
        )
    sys.stdout.write(
        "\nstep: median; spread: interquartile range / median; x first: median of the ratios to\n"
        "the first row, taken within rounds; planned: memory that `ifvit cost --plan` counts;\n"
        "MFU and peak memory are measured on a GPU only.\n\n"
    )


def _gigabytes(num_bytes: str | int | float | None) -> str:
    return f"{'-' if num_bytes is None else f'{float(num_bytes) / 1e9:.2f} GB':>11}"
