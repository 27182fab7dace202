"""`ifvit cost --plan`: formulas agree with numbers worked out by hand, memory with real passes."""

import dataclasses
import json
import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ifvit.analysis.config import HardwareConfig, PlanConfig
from ifvit.analysis.plan import (
    RESERVE,
    PeakMemory,
    PlanRow,
    activation_bytes,
    collective_seconds,
    network_bytes,
    plan,
    plan_rows,
    sample_bytes,
    state_bytes,
    update_bytes,
)
from ifvit.config import read_config
from ifvit.models.backbone import Backbone
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.presets import CLASS_PRESETS, PRESETS
from ifvit.models.weights import build_backbone
from ifvit.training.optimizers import iterate

BILLION = 10**9
HARDWARE = HardwareConfig()


@pytest.mark.parametrize(
    ("gpus", "stage", "expected"),
    [
        (1, 0, 20e9),  # parameters, gradients, two moments, EMA weights: 4 bytes each
        (64, 0, 24e9),  # the buckets of DDP
        (4, 1, 3 * 4e9 + 3 * 1e9 + 2e9),  # moments and the second copy in quarters, the buffer
        (4, 2, 2 * 4e9 + 4 * 1e9 + 2e9),  # gradients too
        (4, 3, 6 * 1e9 + 2e9 + 4e9),  # all in quarters except the gathered parameters
    ],
)
def test_state_has_the_bytes_that_the_engine_keeps(gpus: int, stage: int, expected: float) -> None:
    assert state_bytes(BILLION, gpus, stage, num_ema=1) == expected


def test_stage_3_halves_partitioned_state_with_twice_the_gpus() -> None:
    few, many, most = (state_bytes(BILLION, n, 3, num_ema=2) for n in (64, 128, 10**9))
    assert few - many == pytest.approx((4 * 7 * BILLION / 64) / 2)
    assert most == pytest.approx(6e9, rel=1e-6)


TINY = PRESETS["tiny"]
MAPS = {
    **{entry: f"image 5*{entry} image" for entry in ("image", "concat", "cross_attention")},
    **{entry: f"7*{entry}" for entry in ("separate_cross_attention", "dual_stream", "adaln")},
    "mixed": "2*concat image cross_attention dual_stream image separate_cross_attention",
}


def build(name: str) -> tuple[FusionTransformerConfig, Backbone]:
    """Build a backbone with this map; the mixed one has the options of today."""
    options = {"mlp": "swiglu", "norm": "rms_norm", "qk_norm": True, "rotary": True}
    options |= {"num_registers": 3, "modulation": "adaln_zero"}
    config = dataclasses.replace(
        TINY,
        fusion=MAPS[name],
        num_text_blocks=0 if name == "image" else 1,
        **(options if name == "mixed" else {}),
    )
    backbone = build_backbone(config)
    for parameter in backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return config, backbone


def loss(backbone: Backbone, batch: int = 2, *, autocast: bool = False) -> Tensor:
    """Run the forward pass."""
    latents, contexts = torch.randn(batch, 4, 8, 8), torch.randn(batch, 16, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = backbone(latents, torch.zeros(batch), contexts)
    return torch.nn.functional.mse_loss(predicted.float(), latents)


@pytest.mark.parametrize("name", MAPS)
def test_planned_activations_are_those_that_real_passes_keep(name: str) -> None:
    config, backbone = build(name)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss(backbone, batch=16)
    for parameter in backbone.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    planned = activation_bytes(config, 16, "fp32", checkpointing=False)
    # The peak has, beside what is kept, tensors of the last layers and gradients of the loss.
    assert result.requires_grad
    assert 1.0 <= planned / sum(kept.values()) < 1.07


@pytest.mark.parametrize("name", ["cross_attention", "mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_the_peak_of_real_passes(name: str, checkpointing: bool) -> None:
    config, backbone = build(name)
    for part in backbone.parts() if checkpointing else ():
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    with PeakMemory() as memory:
        loss(backbone).backward()
    planned = activation_bytes(config, 2, "fp32", checkpointing=checkpointing)
    assert planned == pytest.approx(memory.peak, rel=0.02)


def test_half_precision_counts_the_casts_of_the_weights() -> None:
    config, backbone = build("cross_attention")
    with PeakMemory() as memory:
        loss(backbone, autocast=True).backward()
    planned = [activation_bytes(config, n, "bf16", checkpointing=False) for n in (2, 4, 6)]
    assert planned[2] - planned[1] == pytest.approx(planned[1] - planned[0], rel=0.02)
    weights = planned[0] - (planned[2] - planned[0]) / 2  # what does not grow with the batch
    assert weights == pytest.approx(2 * count_cost(config).params, rel=0.1)
    # The norms, which autocast leaves in 16 bits on CPUs, are planned in 32 bits as on GPUs.
    assert 1.0 <= planned[0] / memory.peak < 1.15


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    source = torch.zeros(1000)
    with PeakMemory() as memory:
        source.view(10, 100).add_(1)  # a view of what existed before
        first = source + 1
        second = first.view(10, 100).t()
        assert memory.held == 4000
        del first
        assert memory.held == 4000
        del second
    assert (memory.held, memory.peak) == (0, 4000)


def test_bytes_and_seconds_agree_with_numbers_worked_out_by_hand() -> None:
    in_node = 8e9 * 7 / 8 / 450e9
    assert [network_bytes(8e9, gpus, HARDWARE) for gpus in (8, 16)] == [0, 0.5e9]
    seconds = [collective_seconds(8e9, gpus, HARDWARE) for gpus in (1, 8, 16)]
    assert seconds == pytest.approx([0, in_node, in_node + 0.01])
    updated = [update_bytes(BILLION, 8, stage, num_ema=1) for stage in (0, 2, 3)]
    assert updated == [40e9, 32e9 / 8 + 8e9, 40e9 / 8]
    assert sample_bytes(PRESETS["small"]) == 2 * (8 * 32 * 32 + 77 * 768)
    class_config = CLASS_PRESETS["class_small"]
    assert isinstance(class_config, FusionTransformerConfig)
    assert sample_bytes(class_config) == 2 * 8 * 32 * 32 + 8


def test_one_gpu_takes_the_sum_of_its_parts() -> None:
    shape = PRESETS["small"]
    (row,) = plan_rows(PlanConfig(backbone=shape, gpus=(1,), batch_per_gpu=8))
    cost = count_cost(shape)
    assert row.memory_by_stage[0] == (
        20 * cost.params + activation_bytes(shape, 8, "bf16", checkpointing=True)
    )
    compute = 4 * 8 * cost.flops / (989e12 * 0.5)  # one forward pass again, for the checkpoints
    step = compute + 40 * cost.params / 4.8e12
    assert (row.zero_stage, row.fits, row.network_bytes) == (0, True, 0)
    assert row.step_seconds == pytest.approx((step, step))
    assert row.save_seconds == pytest.approx((16 + 8) * cost.params / 2e9)
    assert row.loader_bytes_per_s == pytest.approx(8 * sample_bytes(shape) / step)


def test_muon_keeps_one_tensor_for_each_matrix_and_computes_in_every_update() -> None:
    config = PlanConfig(backbone=TINY, gpus=(8,))
    (adamw,), (muon,) = plan_rows(config), plan_rows(dataclasses.replace(config, optimizer="muon"))
    matrices = build_backbone(TINY).block_matrices().values()
    num_bytes = 4 * sum(matrix.numel() for matrix in matrices)
    assert muon.memory_by_stage == (adamw.memory_by_stage[0] - num_bytes,)
    assert (muon.zero_stage, muon.checkpoint_bytes) == (0, adamw.checkpoint_bytes - num_bytes)
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices:
            iterate(matrix[None] if matrix.shape[0] < matrix.shape[1] else matrix.T[None])
    seconds = counter.get_total_flops() / (989e12 * 0.5) - 2 * num_bytes / 4.8e12
    assert muon.update_seconds == pytest.approx(adamw.update_seconds + seconds)


@pytest.mark.parametrize(("memory", "stage", "passes"), [(141e9, 0, 2), (1e9, 3, 3)])
def test_two_nodes_communicate_over_the_network(memory: float, stage: int, passes: int) -> None:
    shape = PRESETS["small"]
    hardware = HardwareConfig(memory_bytes=memory)
    config = PlanConfig(
        backbone=shape,
        gpus=(16,),
        batch_per_gpu=8,
        activation_checkpointing=False,
        hardware=hardware,
    )
    (row,) = plan_rows(config)
    cost = count_cost(shape)
    compute = 3 * 8 * cost.flops / (989e12 * 0.5)
    wires = 7 / 8 / 450e9 + 1 / 8 / 2 / 50e9
    communication = passes * 4 * cost.params * wires
    update = 40 * cost.params / (16 if stage else 1) / 4.8e12
    best, worst = max(compute, communication) + update, compute + communication + update
    assert row.zero_stage == stage
    assert row.flops_per_step == 16 * 3 * 8 * cost.flops
    assert row.network_bytes == pytest.approx(passes * 4 * cost.params / 8 / 2)
    assert row.step_seconds == pytest.approx((best, worst))
    assert row.checkpoint_bytes == 16 * cost.params
    assert row.save_seconds == pytest.approx((16 / 2 + 8) * cost.params / 2e9)
    assert row.loader_bytes_per_s == pytest.approx(8 * 8 * sample_bytes(shape) / best)


def row_with(memory: float, gpus: int) -> PlanRow:
    """Plan the tiny preset on GPUs with this memory."""
    hardware = HardwareConfig(memory_bytes=memory)
    (row,) = plan_rows(PlanConfig(backbone=TINY, gpus=(gpus,), hardware=hardware))
    return row


def test_the_lowest_stage_that_fits_is_taken() -> None:
    # The buffer of partitioned gradients is larger than this backbone's state.
    full, *stages = row_with(1e12, 64).memory_by_stage
    assert full < min(stages)
    assert (row_with(full / 0.91, 64).zero_stage, row_with(full / 0.91, 64).fits) == (0, True)
    assert (row_with(1e6, 64).zero_stage, row_with(1e6, 64).fits) == (3, False)


def test_a_fraction_of_the_memory_is_left_free() -> None:
    needed = row_with(1e12, 8).memory_by_stage[0] / (1 - RESERVE)
    assert [row_with(share * needed, 8).zero_stage == 0 for share in (1.001, 0.999)] == [
        True,
        False,
    ]


def test_a_preset_with_another_map_is_planned() -> None:
    flags = ["--backbone", "tiny", "--backbone.fusion", "9*dual_stream", "--gpus", "[8]"]
    (row,) = plan_rows(read_config(PlanConfig, flags, prog="ifvit cost --plan"))
    config = dataclasses.replace(TINY, fusion="9*dual_stream")
    cost = count_cost(config)
    assert (row.name, row.params) == ("9*dual_stream", cost.params)
    assert row.flops_per_step == 3 * 8 * 32 * cost.flops


def test_json_and_table_hold_every_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.analysis.plan.PRESETS", {"1b": TINY, "3b": TINY})
    config = PlanConfig(gpus=(8, 64))  # both large presets
    plan(dataclasses.replace(config, json=True))
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["gpus"]) for row in rows] == [
        (name, gpus) for name in ("1b", "3b") for gpus in (8, 64)
    ]
    plan(config)
    table = capsys.readouterr().out
    starts = [line.split()[:1] for line in table.splitlines()]
    assert starts.count(["8"]) == starts.count(["64"]) == 2
    steps = [(float(low), float(high)) for low, high in re.findall(r"([\d.]+)-([\d.]+) s", table)]
    assert steps == [tuple(round(seconds, 2) for seconds in row["step_seconds"]) for row in rows]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": (12,)}, "gpus: 12 must be a multiple of 8"),
        ({"gpus": ()}, "gpus is .*; it must be one number or more"),
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PlanConfig(), **fields)
    with pytest.raises(ValueError, match=r"efficiency is 0\.0; it must be above 0"):
        HardwareConfig(efficiency=0.0)
