"""The verb `cost --plan`: what training a backbone on many GPUs takes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ifvit.analysis import plan_formulas as formulas
from ifvit.analysis.plan_config import PlanConfig
from ifvit.models.config import FusionUViTConfig
from ifvit.models.flops import count_cost
from ifvit.models.presets import PRESETS

RESERVE = 0.08
"""Share of a GPU's memory left to CUDA, NCCL and fragments."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One backbone on `gpus` GPUs; pairs are the best and the worst case.

    Best: communication goes on wholly behind the computing. Worst: none of it does.
    """

    name: str
    gpus: int
    params: int
    flops_per_step: float
    """Of all GPUs: three forward passes with attention; what is computed again does not count."""
    memory_by_stage: tuple[float, ...]
    """Bytes of a GPU under ZeRO stage 0, 1, 2, 3."""
    zero_stage: int
    """The lowest stage that fits, 3 if none does; all below is for this one."""
    fits: bool
    network_bytes: float
    """Through the network adapter of a GPU, one way, in a step."""
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    step_seconds: tuple[float, float]
    mfu: tuple[float, float]
    checkpoint_bytes: float
    """Of all GPUs: parameters, moments and averages."""
    stall_seconds: float
    """For which a checkpoint keeps the steps waiting."""
    save_seconds: float
    """Until it and the exported weights are in the store, beside training."""
    loader_bytes_per_s: float
    """That each node reads in the best case."""


def plan(config: PlanConfig) -> None:
    """Write the table, or with `config.json` a list of objects, to standard output."""
    rows = list(plan_rows(config))
    text = json.dumps([asdict(row) for row in rows]) if config.json else _format_table(rows)
    sys.stdout.write(text + "\n")


def plan_rows(config: PlanConfig) -> Iterator[PlanRow]:
    """Every backbone on every number of GPUs."""
    for name, shape in _shapes(config).items():
        for gpus in config.gpus:
            yield plan_row(name, shape, gpus, config)


def plan_row(name: str, shape: FusionUViTConfig, gpus: int, config: PlanConfig) -> PlanRow:
    """One backbone on `gpus` GPUs."""
    cost, hardware, averages = count_cost(shape), config.hardware, config.num_averages
    params = cost.params
    besides_state = formulas.cast_bytes(params, config.precision) + formulas.activation_bytes(
        shape,
        config.batch_per_gpu,
        config.precision,
        checkpointing=config.activation_checkpointing,
    )
    memory = tuple(
        formulas.state_bytes(params, gpus, stage, averages) + besides_state for stage in range(4)
    )
    available = (1 - RESERVE) * hardware.memory_bytes
    stage = next((stage for stage in range(4) if memory[stage] <= available), 3)

    whole, passes = formulas.VALUE * params, formulas.num_collectives(stage)
    flops = 3 * cost.flops * config.batch_per_gpu
    again = 4 / 3 if config.activation_checkpointing else 1
    compute = again * flops / (hardware.flops_per_s * hardware.efficiency)
    communication = passes * formulas.collective_seconds(whole, gpus, hardware)
    update = formulas.update_bytes(params, gpus, stage, averages) / hardware.bytes_per_s
    best, worst = max(compute, communication) + update, compute + communication + update

    checkpoint, exported = whole * (3 + averages), whole * (1 + averages)
    nodes = max(1, gpus // hardware.gpus_per_node)
    samples_per_node = config.batch_per_gpu * gpus / nodes
    return PlanRow(
        name=name,
        gpus=gpus,
        params=params,
        flops_per_step=flops * gpus,
        memory_by_stage=memory,
        zero_stage=stage,
        fits=memory[stage] <= available,
        network_bytes=passes * formulas.network_bytes(whole, gpus, hardware),
        compute_seconds=compute,
        communication_seconds=communication,
        update_seconds=update,
        step_seconds=(best, worst),
        mfu=(flops / best / hardware.flops_per_s, flops / worst / hardware.flops_per_s),
        checkpoint_bytes=checkpoint,
        stall_seconds=formulas.stall_seconds(params, gpus, stage, averages, hardware),
        # Every node writes its share of a checkpoint, one process all of the exported weights.
        save_seconds=(checkpoint / nodes + exported) / hardware.store_bytes_per_s,
        loader_bytes_per_s=formulas.sample_bytes(shape) * samples_per_node / best,
    )


def _shapes(config: PlanConfig) -> dict[str, FusionUViTConfig]:
    if config.width is not None and config.depth is not None:
        return {f"{config.width}x{config.depth}": _shape(config.width, config.depth)}
    sizes = {"1b": _shape(1536, 32), "8b": _shape(3072, 64)}
    return {name: sizes.get(name) or PRESETS[name] for name in config.presets}


def _shape(width: int, depth: int) -> FusionUViTConfig:
    """As the presets have it: a third of the depth a side without text, 64 channels a head."""
    return replace(
        PRESETS["small"],
        width=width,
        depth=depth,
        num_heads=width // 64,
        num_image_blocks=round(depth / 3),
    )


def _format_table(rows: list[PlanRow]) -> str:
    lines = []
    for number, row in enumerate(rows):
        if not number or row.name != rows[number - 1].name:
            lines += [
                "",
                f"{row.name}: {row.params / 1e9:.2f}B parameters, checkpoints of "
                f"{row.checkpoint_bytes / 1e9:.0f} GB",
                f"{'GPUs':>5}{'GB a GPU by ZeRO stage 0/1/2/3':>32}{'stage':>7}{'network':>10}"
                f"{'compute':>10}{'traffic':>9}{'step':>14}{'MFU':>13}{'stall':>8}{'save':>7}"
                f"{'loader':>11}",
            ]
        memory = "/".join(f"{size / 1e9:.0f}" for size in row.memory_by_stage)
        stage = f"{row.zero_stage}{'' if row.fits else '!'}"
        step = "-".join(f"{seconds:.2f}" for seconds in row.step_seconds)
        mfu = "-".join(f"{share:.0%}" for share in reversed(row.mfu))
        lines.append(
            f"{row.gpus:5}{memory:>32}{stage:>7}{row.network_bytes / 1e9:7.1f} GB"
            f"{row.compute_seconds:8.2f} s{row.communication_seconds:7.2f} s{step:>12} s{mfu:>13}"
            f"{row.stall_seconds:6.1f} s{row.save_seconds:5.0f} s"
            f"{row.loader_bytes_per_s / 1e6:7.0f} MB/s"
        )
    lines += [
        "",
        "stage: the lowest that fits (!: not even 3 does). network: a GPU's adapter in a step, one",
        "way. step, MFU: with communication behind the computing, and without. loader: a node.",
    ]
    return "\n".join(lines[1:])
