"""The verb `cost --plan`: memory, time and traffic of training a backbone on many GPUs.

`bench train` compares the planned memory with what it measures.
"""

import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ifvit.analysis.config import HardwareConfig, PlanConfig
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.presets import PRESETS
from ifvit.models.weights import describe_backbone

VALUE = 4
"""Bytes of a parameter, gradient, moment or EMA weight; the engine keeps all of them in fp32."""
BUCKET_VALUES = 500_000_000
"""Number of gradients that DeepSpeed collects before it reduces them (its default)."""
LIVE_VALUES = 1_000_000_000
"""Largest number of parameters that ZeRO stage 3 keeps gathered (DeepSpeed's default)."""
RESERVE = 0.08
"""Fraction of a GPU's memory left to CUDA, NCCL and fragmentation."""

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The plan for one backbone on `gpus` GPUs.

    Pairs hold the best case, in which communication overlaps with computation, and the worst case,
    in which it does not.
    """

    name: str
    """Name of the preset, or the fusion map."""
    gpus: int
    params: int
    flops_per_step: float
    """Model FLOPs of all GPUs: three forward passes with attention, without recomputation."""
    memory_by_stage: tuple[float, ...]
    """Bytes per GPU under ZeRO stage 0, 1, 2, 3; with Muon under stage 0 alone."""
    zero_stage: int
    """The lowest stage that fits, or the last if none fits; the fields below assume this stage."""
    fits: bool
    network_bytes: float
    """Bytes per step through the network adapter of a GPU, one way."""
    compute_seconds: float
    communication_seconds: float
    update_seconds: float
    step_seconds: tuple[float, float]
    checkpoint_bytes: float
    """Bytes of parameters, moments and EMA weights of all GPUs together."""
    save_seconds: float
    """Time until checkpoint and exported weights are stored, while training continues."""
    loader_bytes_per_s: float
    """Bytes that each node reads per second in the best case."""


def plan(config: PlanConfig) -> None:
    """Write the table, or with `config.json` a list of objects, to standard output."""
    rows = list(plan_rows(config))
    text = json.dumps([asdict(row) for row in rows]) if config.json else _format_table(rows)
    sys.stdout.write(text + "\n")


def plan_rows(config: PlanConfig) -> Iterator[PlanRow]:
    """Yield a row per backbone and number of GPUs."""
    presets = {name: PRESETS[name] for name in ("1b", "3b")}
    chosen = config.backbone
    for name, backbone in ({chosen.fusion: chosen} if chosen else presets).items():
        activations = activation_bytes(
            backbone,
            config.batch_per_gpu,
            config.precision,
            checkpointing=config.activation_checkpointing,
        )
        for gpus in config.gpus:
            yield _plan_row(name, backbone, gpus, activations, config)


def _plan_row(
    name: str, backbone: FusionTransformerConfig, gpus: int, activations: int, config: PlanConfig
) -> PlanRow:
    cost, hardware, num_ema = count_cost(backbone), config.hardware, config.num_ema
    params, batch = cost.params, config.batch_per_gpu
    shapes = _muon_shapes(backbone) if config.optimizer == "muon" else []
    saved = VALUE * sum(rows * columns for rows, columns in shapes)  # one tensor, not two
    memory = tuple(
        state_bytes(params, gpus, stage, num_ema) - saved + activations
        for stage in range(1 if shapes else 4)
    )
    available = (1 - RESERVE) * hardware.memory_bytes
    fitting = [stage for stage, size in enumerate(memory) if size <= available]
    stage = fitting[0] if fitting else len(memory) - 1

    # Every stage scatters the gradients once; stages 0 to 2 gather once, stage 3 gathers twice.
    size, num_collectives = VALUE * params, 3 if stage == 3 else 2
    flops = 3 * cost.flops * batch
    recomputed = 4 / 3 if config.activation_checkpointing else 1
    compute = recomputed * flops / (hardware.flops_per_s * hardware.efficiency)
    communication = num_collectives * collective_seconds(size, gpus, hardware)
    update = (update_bytes(params, gpus, stage, num_ema) - 2 * saved) / hardware.bytes_per_s
    update += sum(muon_flops(*shape) for shape in shapes) / (
        hardware.flops_per_s * hardware.efficiency
    )
    best, worst = max(compute, communication) + update, compute + communication + update

    checkpoint, exported = size * (3 + num_ema) - saved, size * (1 + num_ema)
    nodes = max(1, gpus // hardware.gpus_per_node)
    return PlanRow(
        name=name,
        gpus=gpus,
        params=params,
        flops_per_step=flops * gpus,
        memory_by_stage=memory,
        zero_stage=stage,
        fits=memory[stage] <= available,
        network_bytes=num_collectives * network_bytes(size, gpus, hardware),
        compute_seconds=compute,
        communication_seconds=communication,
        update_seconds=update,
        step_seconds=(best, worst),
        checkpoint_bytes=checkpoint,
        # Each node writes its part of a checkpoint; one process writes all exported weights.
        save_seconds=(checkpoint / nodes + exported) / hardware.store_bytes_per_s,
        loader_bytes_per_s=sample_bytes(backbone) * (batch * gpus / nodes) / best,
    )


def _muon_shapes(config: FusionTransformerConfig) -> list[tuple[int, int]]:
    """Return the shorter and the longer side of each matrix that Muon updates."""
    matrices = describe_backbone(config).block_matrices().values()
    return [(min(matrix.shape), max(matrix.shape)) for matrix in matrices]


def muon_flops(rows: int, columns: int) -> int:
    """Return the operations of five Newton-Schulz iterations; every GPU runs them on all."""
    return 5 * (4 * rows**2 * columns + 2 * rows**3)


def state_bytes(params: int, gpus: int, stage: int, num_ema: int) -> float:
    """Return the bytes of parameters, gradients, two moments, EMA weights and buffers per GPU."""
    full = VALUE * params
    if stage == 0:
        return full * (4 + num_ema + (gpus > 1))  # DDP's buckets are a second set of gradients
    # DeepSpeed keeps a second copy of the parameters that a process updates.
    partitioned = {1: 3, 2: 4, 3: 5 + num_ema}[stage]
    replicated = 5 + num_ema - partitioned
    gathered = VALUE * min(params, LIVE_VALUES) if stage == 3 else 0
    return full * (replicated + partitioned / gpus) + VALUE * BUCKET_VALUES + gathered


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, untyped
    """Within this context, counts the bytes of the storages that operations create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        """Bytes of the storages that still exist."""
        self.peak = 0
        """Largest value of `held`."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count its new storages until they are freed."""
        before = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and _address(output) not in before | self._known:
                storage = output.untyped_storage()
                self._known.add(_address(output))
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, _address(output), storage.nbytes())
        self.peak = max(self.peak, self.held)
        return outputs

    def _free(self, address: int, num_bytes: int) -> None:
        self._known.remove(address)
        self.held -= num_bytes


def _address(tensor: Tensor) -> int:
    """Return what identifies the storage of a tensor, also of one without memory."""
    return int(tensor.untyped_storage()._cdata)


def activation_bytes(
    config: FusionTransformerConfig, batch: int, precision: Precision, *, checkpointing: bool
) -> int:
    """Return the bytes that a forward and backward pass need at their peak, beside the state.

    They include the parameters that autocast casts to 16 bits. The passes run on tensors without
    memory, with fused attention, and norms in float32 as under autocast on CUDA.
    """
    with FakeTensorMode():
        backbone = FusionTransformer(config)
        for parameter in backbone.parameters():
            parameter.grad = torch.empty_like(parameter)
        if precision != "fp32":
            for module in backbone.modules():
                if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                    module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        if checkpointing:
            for part in backbone.parts():
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
        size = config.latent_size
        latents = torch.empty(batch, config.latent_channels, size, size)
        condition = (
            torch.empty(batch, dtype=torch.int64)
            if config.context_shape is None
            else torch.empty(batch, *config.context_shape)
        )
        with PeakMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                predicted = backbone(latents, torch.empty(batch), condition)
            loss: Any = nn.functional.mse_loss(predicted.float(), latents)
            loss.backward()
    return int(memory.peak)


def update_bytes(params: int, gpus: int, stage: int, num_ema: int) -> float:
    """Return the bytes that AdamW and the EMA update read and write per GPU."""
    adamw = 2 * VALUE * params * 4 / (gpus if stage else 1)
    return adamw + 2 * VALUE * params * num_ema / (gpus if stage == 3 else 1)


def network_bytes(size: float, gpus: int, hardware: HardwareConfig) -> float:
    """Return the bytes through a GPU's network adapter, one way, to gather `size` bytes once.

    NVLink combines the GPUs of a node first, so each adapter carries the partition of one GPU.
    """
    in_node = min(gpus, hardware.gpus_per_node)
    nodes = gpus / in_node
    return size / in_node * (nodes - 1) / nodes


def collective_seconds(size: float, gpus: int, hardware: HardwareConfig) -> float:
    """Return the time to gather or scatter `size` bytes once; latency is ignored."""
    in_node = min(gpus, hardware.gpus_per_node)
    by_node = size * (in_node - 1) / in_node / hardware.node_bytes_per_s
    return by_node + network_bytes(size, gpus, hardware) / hardware.network_bytes_per_s


def sample_bytes(config: FusionTransformerConfig) -> int:
    """Return the bytes of a sample in the shards: float16 moments, and one context or class."""
    moments = 2 * config.latent_channels * config.latent_size**2
    length, width = config.context_shape or (1, 4)
    return 2 * (moments + length * width)


def _format_table(rows: list[PlanRow]) -> str:
    lines: list[str] = []
    for index, row in enumerate(rows):
        if index == 0 or row.name != rows[index - 1].name:
            lines += [
                "",
                f"{row.name}: {row.params / 1e9:.2f}B parameters, checkpoints of "
                f"{row.checkpoint_bytes / 1e9:.0f} GB",
                f"{'GPUs':>5}{'GB a GPU by ZeRO stage 0/1/2/3':>32}{'stage':>7}{'network':>10}"
                f"{'compute':>10}{'traffic':>9}{'step':>14}{'save':>7}"
                f"{'loader':>11}",
            ]
        memory = "/".join(f"{size / 1e9:.0f}" for size in row.memory_by_stage)
        stage = f"{row.zero_stage}{'' if row.fits else '!'}"
        step = "-".join(f"{seconds:.2f}" for seconds in row.step_seconds)
        lines.append(
            f"{row.gpus:5}{memory:>32}{stage:>7}{row.network_bytes / 1e9:7.1f} GB"
            f"{row.compute_seconds:8.2f} s{row.communication_seconds:7.2f} s{step:>12} s"
            f"{row.save_seconds:5.0f} s"
            f"{row.loader_bytes_per_s / 1e6:7.0f} MB/s"
        )
    lines += [
        "",
        "stage: the lowest that fits (!: stage 3 does not fit either). network: per GPU and step,",
        "one way. step: communication overlapped, and not. loader: per node.",
    ]
    return "\n".join(lines[1:])
