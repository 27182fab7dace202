"""The verb `cost --plan`: what training a backbone on many GPUs takes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ifvit.analysis import plan as formulas
from ifvit.analysis.config import HardwareConfig, PlanConfig
from ifvit.models.config import PRESETS, FusionUViTConfig
from ifvit.models.cost import count_cost

VALUE = 4
"""Bytes of a parameter, gradient, moment or average: the engine keeps them all in fp32."""
BUCKET_VALUES = 500_000_000
"""Gradients that DeepSpeed collects before it reduces them (its default)."""
LIVE_VALUES = 1_000_000_000
"""Parameters that its stage 3 keeps gathered at most (its default)."""

Precision = Literal["fp32", "bf16", "fp16"]


def state_bytes(params: int, gpus: int, stage: int, averages: int) -> float:
    """Parameters, gradients, two moments, averages, and what DDP or DeepSpeed's stages add."""
    whole = VALUE * params
    if stage == 0:
        return whole * (4 + averages + (gpus > 1))  # DDP's buckets are another set of gradients
    # DeepSpeed has a second copy of the parameters that a process updates.
    partitioned = {1: 3, 2: 4, 3: 5 + averages}[stage]
    kept = 5 + averages - partitioned
    gathered = VALUE * min(params, LIVE_VALUES) if stage == 3 else 0
    return whole * (kept + partitioned / gpus) + VALUE * BUCKET_VALUES + gathered


def cast_bytes(params: int, precision: Precision) -> int:
    """The parameters once more in 16 bits, which autocast keeps until the forward pass ends."""
    return 0 if precision == "fp32" else 2 * params


def activation_bytes(
    shape: FusionUViTConfig, batch: int, precision: Precision, *, checkpointing: bool
) -> int:
    """What the forward pass keeps for the backward pass, with an attention kernel that is fused.

    With checkpointing: the input of every block, and all that one of them keeps.
    """
    width, value = shape.width, 4 if precision == "fp32" else 2
    image, text = 1 + shape.num_image_tokens, shape.context_length
    crosses = shape.conditioning == "cross_attention"
    fused = image if crosses else image + text
    num_fused_skips = shape.num_fused_blocks // 2
    # Residual stream before either norm in fp32; both norms' results, queries, keys and values,
    # the result of attention, and the hidden layer before and after GELU.
    per_token = 8 + (6 + 2 * shape.mlp_ratio) * value
    # Keys and values of image and text side by side, and the normed text that they come from.
    per_fused = (2 * (image + text) + text) * value if crosses else 0
    inputs = 4 * (
        2 * shape.num_image_blocks * image
        + shape.num_fused_blocks * fused
        + shape.num_text_blocks * text
    )
    if checkpointing:
        keys_values = 3 * text * value if crosses else 0
        one = fused * per_token + per_fused + 2 * fused * value
        kept = inputs + shape.num_fused_blocks * keys_values + one
    else:
        skips = 2 * value * (num_fused_skips * fused + shape.num_image_blocks * image)
        kept = inputs // 4 * per_token + shape.num_fused_blocks * per_fused + skips
    ends = image * (4 + value) * width + text * (value * shape.context_width + 4 * width)
    return batch * (kept * width + ends)


def update_bytes(params: int, gpus: int, stage: int, averages: int) -> float:
    """Read and written by the update: parameters, gradients and moments; averages."""
    adamw = 2 * VALUE * params * 4 / (gpus if stage else 1)
    return adamw + 2 * VALUE * params * averages / (gpus if stage == 3 else 1)


def num_collectives(stage: int) -> int:
    """Passes over all values: gradients summed and results spread; stage 3 gathers twice."""
    return 3 if stage == 3 else 2


def network_bytes(whole: float, gpus: int, hardware: HardwareConfig) -> float:
    """Through a GPU's adapter, one way, when `whole` bytes are gathered or scattered once.

    Within a node first or last, so that every adapter carries its GPU's share alone.
    """
    in_node = min(gpus, hardware.gpus_per_node)
    nodes = gpus / in_node
    return whole / in_node * (nodes - 1) / nodes


def collective_seconds(whole: float, gpus: int, hardware: HardwareConfig) -> float:
    """One gathering or scattering of `whole` bytes, by bandwidths alone."""
    in_node = min(gpus, hardware.gpus_per_node)
    by_node = whole * (in_node - 1) / in_node / hardware.node_bytes_per_s
    return by_node + network_bytes(whole, gpus, hardware) / hardware.network_bytes_per_s


def stall_seconds(
    params: int, gpus: int, stage: int, averages: int, hardware: HardwareConfig
) -> float:
    """For which a checkpoint stops the steps: what is partitioned is gathered, each GPU's share of
    all is copied to its host."""
    whole = VALUE * params
    gathered = {0: 0, 1: 2, 2: 2, 3: 3 + averages}[stage] * whole
    copied = whole * (3 + averages) / gpus
    return collective_seconds(gathered, gpus, hardware) + copied / hardware.host_bytes_per_s


def sample_bytes(shape: FusionUViTConfig) -> int:
    """Of a sample in the shards, float16: moments, and the context of one caption."""
    moments = 2 * shape.latent_channels * shape.latent_size**2
    return 2 * (moments + shape.context_length * shape.context_width)


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
