"""`ifvit cost --plan`: formulas agree with numbers worked out by hand and with the model."""

import dataclasses
import json
import re

import pytest
import torch

from ifvit.analysis.config import HardwareConfig, PlanConfig
from ifvit.analysis.plan import (
    RESERVE,
    PlanRow,
    activation_bytes,
    cast_bytes,
    collective_seconds,
    network_bytes,
    plan,
    plan_row,
    plan_rows,
    sample_bytes,
    stall_seconds,
    state_bytes,
    update_bytes,
)
from ifvit.bench.measurement import kept_bytes
from ifvit.models.config import PRESETS, FusionTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.weights import build_backbone

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


def concat(**fields: object) -> FusionTransformerConfig:
    """Return a backbone with 17 image and time tokens, 3 text tokens, and 3 fused blocks."""
    shape = dataclasses.replace(
        PRESETS["tiny"],
        width=64,
        depth=2,
        num_heads=1,
        conditioning="concat",
        num_image_blocks=0,
        num_text_blocks=0,
        context_length=3,
        context_width=8,
    )
    return dataclasses.replace(shape, **fields)


def test_activations_are_those_counted_by_hand() -> None:
    # 36 bytes a token and channel in a block, 4 in the skip; then the head and the context.
    whole = 64 * (3 * 20 * 36 + 20 * 4) + 17 * 6 * 64 + 3 * (2 * 8 + 4 * 64)
    assert activation_bytes(concat(), 1, "bf16", checkpointing=False) == whole
    assert activation_bytes(concat(), 5, "bf16", checkpointing=False) == 5 * whole
    # The inputs of three blocks, and one block.
    again = 64 * (3 * 20 * 4 + 20 * (36 + 4)) + 17 * 6 * 64 + 3 * (2 * 8 + 4 * 64)
    assert activation_bytes(concat(), 1, "bf16", checkpointing=True) == again


def test_checkpointing_keeps_keys_and_values_of_text_for_every_block() -> None:
    # The inputs of three blocks of 17 tokens; keys, values and normed text of 3; and one block,
    # with keys and values of all 20.
    kept = 3 * 17 * 4 + 3 * (3 * 3 * 2) + 17 * (36 + 4) + (2 * 20 + 3) * 2
    shape = concat(conditioning="cross_attention")
    expected = 64 * kept + 17 * 6 * 64 + 3 * (2 * 8 + 4 * 64)
    assert activation_bytes(shape, 1, "bf16", checkpointing=True) == expected


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
@pytest.mark.parametrize("outer", [0, 1])
def test_activations_are_those_that_the_model_keeps(conditioning: str, outer: int) -> None:
    shape = dataclasses.replace(
        PRESETS["tiny"], conditioning=conditioning, num_image_blocks=outer, num_text_blocks=outer
    )
    backbone = build_backbone(shape)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    contexts = torch.randn(2, *shape.context_shape)
    kept = kept_bytes(
        lambda: backbone(latents, timesteps, contexts).square().mean(), backbone.parameters()
    )
    predicted = activation_bytes(shape, 2, "fp32", checkpointing=False)
    assert predicted == pytest.approx(kept, rel=0.01)


def test_bytes_and_seconds_agree_with_numbers_worked_out_by_hand() -> None:
    in_node, copies = 8e9 * 7 / 8 / 450e9, 16e9 / 8 / 50e9
    assert (cast_bytes(BILLION, "bf16"), cast_bytes(BILLION, "fp32")) == (2e9, 0)
    assert [network_bytes(8e9, gpus, HARDWARE) for gpus in (8, 16)] == [0, 0.5e9]
    seconds = [collective_seconds(8e9, gpus, HARDWARE) for gpus in (1, 8, 16)]
    assert seconds == pytest.approx([0, in_node, in_node + 0.01])
    updated = [update_bytes(BILLION, 8, stage, num_ema=1) for stage in (0, 2, 3)]
    assert updated == [40e9, 32e9 / 8 + 8e9, 40e9 / 8]
    stalls = [stall_seconds(BILLION, 8, stage, 1, HARDWARE) for stage in (0, 3)]
    assert stalls == pytest.approx([copies, copies + 2 * in_node])
    assert sample_bytes(PRESETS["small"]) == 2 * (8 * 32 * 32 + 77 * 768)


def test_one_gpu_takes_the_sum_of_its_parts() -> None:
    shape = PRESETS["small"]
    config = PlanConfig(presets=("small",), gpus=(1,), batch_per_gpu=8)
    row = plan_row("small", shape, 1, config)
    cost = count_cost(shape)
    assert row.memory_by_stage[0] == (
        22 * cost.params + activation_bytes(shape, 8, "bf16", checkpointing=True)
    )
    compute = 4 * 8 * cost.flops / (989e12 * 0.5)  # one forward pass again, for the checkpoints
    step = compute + 40 * cost.params / 4.8e12
    assert (row.zero_stage, row.fits, row.network_bytes) == (0, True, 0)
    assert row.step_seconds == pytest.approx((step, step))
    assert row.mfu[0] == pytest.approx(3 * 8 * cost.flops / step / 989e12)
    assert row.save_seconds == pytest.approx((16 + 8) * cost.params / 2e9)
    assert row.loader_bytes_per_s == pytest.approx(8 * sample_bytes(shape) / step)


@pytest.mark.parametrize(("memory", "stage", "passes"), [(141e9, 0, 2), (1e9, 3, 3)])
def test_two_nodes_communicate_over_the_network(memory: float, stage: int, passes: int) -> None:
    shape = PRESETS["small"]
    hardware = HardwareConfig(memory_bytes=memory)
    config = PlanConfig(batch_per_gpu=8, activation_checkpointing=False, hardware=hardware)
    row = plan_row("small", shape, 16, config)
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
    assert row.mfu == pytest.approx([3 * 8 * cost.flops / s / 989e12 for s in (best, worst)])
    assert row.checkpoint_bytes == 16 * cost.params
    assert row.save_seconds == pytest.approx((16 / 2 + 8) * cost.params / 2e9)
    assert row.loader_bytes_per_s == pytest.approx(8 * 8 * sample_bytes(shape) / best)


def test_the_lowest_stage_that_fits_is_taken() -> None:
    def stage(gigabytes: float) -> tuple[int, bool]:
        config = PlanConfig(hardware=HardwareConfig(memory_bytes=gigabytes * 1e9))
        row = next(row for row in plan_rows(config) if row.name == "8b")
        return row.zero_stage, row.fits

    assert [stage(g) for g in (240, 141, 110, 60, 20)] == [
        (0, True),
        (1, True),
        (2, True),
        (3, True),
        (3, False),
    ]


def test_a_fraction_of_the_memory_is_left_free() -> None:
    def row(memory: float) -> PlanRow:
        hardware = HardwareConfig(memory_bytes=memory)
        return plan_row("small", PRESETS["small"], 8, PlanConfig(hardware=hardware))

    needed = row(1e12).memory_by_stage[0] / (1 - RESERVE)
    assert [row(share * needed).zero_stage == 0 for share in (1.001, 0.999)] == [True, False]


def test_presets_have_the_size_of_their_names() -> None:
    params = {row.name: row.params for row in plan_rows(PlanConfig(gpus=(64,)))}
    assert params == pytest.approx({"1b": 1e9, "8b": 8e9}, rel=0.05)


@pytest.mark.parametrize(("name", "width", "depth"), [("small", 512, 12), ("large", 1024, 20)])
def test_width_and_depth_plan_another_backbone(name: str, width: int, depth: int) -> None:
    (row,) = plan_rows(PlanConfig(width=width, depth=depth, gpus=(8,)))
    cost = count_cost(PRESETS[name])
    assert (row.name, row.params) == (f"{width}x{depth}", cost.params)
    assert row.flops_per_step == 3 * 8 * 32 * cost.flops


def test_json_and_table_hold_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    config = PlanConfig(gpus=(8, 64))
    plan(dataclasses.replace(config, json=True))
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["gpus"]) for row in rows] == [
        (name, gpus) for name in ("1b", "8b") for gpus in (8, 64)
    ]
    plan(config)
    table = capsys.readouterr().out
    starts = [line.split()[:1] for line in table.splitlines()]
    assert starts.count(["8"]) == starts.count(["64"]) == 2
    shares = [(int(low), int(high)) for low, high in re.findall(r"(\d+)%-(\d+)%", table)]
    assert shares == [tuple(round(100 * share) for share in row["mfu"][::-1]) for row in rows]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 512}, "both width and depth"),
        ({"gpus": (12,)}, "gpus: 12 must be a multiple of 8"),
        ({"gpus": ()}, "gpus is .*; it must be one number or more"),
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PlanConfig(), **fields)
    with pytest.raises(ValueError, match=r"efficiency is 0\.0; it must be above 0"):
        HardwareConfig(efficiency=0.0)
