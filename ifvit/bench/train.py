"""The verb `bench train`: what a training step costs, beside others and beside the hardware."""

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ifvit.analysis.plan_formulas import (
    activation_bytes,
    cast_bytes,
    state_bytes,
    update_bytes,
)
from ifvit.bench.config import BenchTrainConfig
from ifvit.bench.roofline import Probe, copy_probe, kept_bytes, matmul_probe
from ifvit.bench.timing import measure_rounds, median_ratio, print_result, seconds_on, spread
from ifvit.bench.train_contenders import BareSteps, EngineSteps, UViTRecipeSteps
from ifvit.models.config import FusionUViTConfig
from ifvit.models.flops import count_cost
from ifvit.models.presets import PRESETS
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.hardware import device_name, peak_flops

EARLY, INTERMEDIATE = "concat_early", "cross_attention_intermediate"
NUM_COMPILATIONS = 32
"""Of the blocks' code at most: torch counts together what the settings share, and makes do without
compilation after 8, where three of them alone need 9."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Row = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What the device can do: measured in this run, and as the vendor has it for bf16."""

    flops_per_s: float
    bytes_per_s: float
    nominal_flops_per_s: float | None


def bench_train(config: BenchTrainConfig) -> None:
    """Time all contenders in turn, print a row for each setting and the ratios."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = NUM_COMPILATIONS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipes = {name: _recipe(shape, config, device) for name, shape in _settings(config).items()}
    engines = {name: EngineSteps(recipe) for name, recipe in recipes.items()}
    contenders: dict[str, Callable[[int], None]] = {
        **engines,
        "bare_loop": BareSteps(recipes[INTERMEDIATE], device),
        "uvit_recipe": UViTRecipeSteps(recipes[EARLY], device),
    }
    dtype = _DTYPES[recipes[EARLY].engine.precision]
    probes = {"matmul": matmul_probe(device, dtype), "copy": copy_probe(device)}
    timers: dict[str, Callable[[], float]] = {
        name: partial(seconds_on, device, partial(steps, config.steps))
        for name, steps in contenders.items()
    }
    timers |= {name: probe.seconds for name, probe in probes.items()}
    measure_rounds(timers, 2)  # first use of the device, and compilation, also for changing steps
    memory = {name: _measure_memory(steps) for name, steps in engines.items()}
    seconds = measure_rounds(timers, config.rounds)
    ceiling = _ceiling(probes, seconds, device)
    rows = [
        _row(name, recipe, seconds, config, ceiling) | memory[name]
        for name, recipe in recipes.items()
    ]
    result: dict[str, object] = {
        "intermediate_vs_early": median_ratio(seconds[EARLY], seconds[INTERMEDIATE]),
        "engine_overhead": median_ratio(seconds[INTERMEDIATE], seconds["bare_loop"]) - 1,
        "vs_uvit_recipe": median_ratio(seconds["uvit_recipe"], seconds[EARLY]),
        "matmul_flops_per_s": ceiling.flops_per_s,
        "copy_bytes_per_s": ceiling.bytes_per_s,
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


def _settings(config: BenchTrainConfig) -> dict[str, FusionUViTConfig]:
    """The paper's four settings of the preset."""
    intermediate = PRESETS[config.preset]
    early = replace(intermediate, num_image_blocks=0, num_text_blocks=0)
    return {
        EARLY: replace(early, conditioning="concat"),
        "concat_intermediate": replace(intermediate, conditioning="concat"),
        "cross_attention_early": early,
        INTERMEDIATE: intermediate,
    }


def _recipe(shape: FusionUViTConfig, config: BenchTrainConfig, device: torch.device) -> TrainConfig:
    precision = config.precision or ("bf16" if device.type == "cuda" else "fp32")
    return TrainConfig(
        run="",
        shards="",
        backbone=shape,
        engine=EngineConfig(
            backend="plain",
            precision=precision,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
            attention=config.attention,
        ),
        global_batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
    )


def _measure_memory(steps: EngineSteps) -> Row:
    """`state_bytes` between steps, and `step_bytes` that a step adds at its peak.

    On a GPU its allocator says so. On the CPU it is counted: the gradients, and what the forward
    pass keeps for the backward pass.
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
    return {
        "state_bytes": state,
        "step_bytes": torch.cuda.max_memory_allocated(engine.device) - before,
    }


def _ceiling(
    probes: Mapping[str, Probe], seconds: Mapping[str, list[float]], device: torch.device
) -> Ceiling:
    return Ceiling(
        flops_per_s=probes["matmul"].best(seconds["matmul"]),
        bytes_per_s=probes["copy"].best(seconds["copy"]),
        nominal_flops_per_s=peak_flops(device),
    )


def _row(
    name: str,
    recipe: TrainConfig,
    seconds: Mapping[str, list[float]],
    config: BenchTrainConfig,
    ceiling: Ceiling,
) -> Row:
    """Times of one step; MFU of the nominal peak where there is one, else of the measured one.

    `planned_bytes`: what `ifvit cost --plan` says that state and step take.
    """
    cost = count_cost(recipe.backbone)
    step = statistics.median(seconds[name]) / config.steps
    # One forward pass, and a backward pass that costs two.
    flops, layer_flops = (3 * count * config.batch_size for count in (cost.flops, cost.layer_flops))
    peak = ceiling.nominal_flops_per_s or ceiling.flops_per_s
    averages = len(recipe.ema_decays)
    floor = {
        "floor_flops_seconds": flops / ceiling.flops_per_s,
        "floor_bytes_seconds": update_bytes(cost.params, 1, 0, averages) / ceiling.bytes_per_s,
    }
    return {
        "setting": name,
        "step_seconds": step,
        "spread": spread(seconds[name]),
        "images_per_s": config.batch_size / step,
        **floor,
        "vs_floor": step / sum(floor.values()),
        "mfu": flops / step / peak,
        "mfu_paper": layer_flops / step / peak,
        "vs_uvit_recipe": median_ratio(seconds["uvit_recipe"], seconds[name]),
        "planned_bytes": _planned_bytes(recipe, cost.params),
    }


def _planned_bytes(recipe: TrainConfig, params: int) -> float:
    shape, engine = recipe.backbone, recipe.engine
    assert isinstance(shape, FusionUViTConfig)  # as the presets are
    activations = activation_bytes(
        shape,
        recipe.micro_batch_size,
        engine.precision,
        checkpointing=engine.activation_checkpointing,
    )
    states = state_bytes(params, 1, 0, len(recipe.ema_decays))
    return states + cast_bytes(params, engine.precision) + activations


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
