"""`ifvit bench train`: contenders do the same work, and the rows are consistent."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.analysis.plan import activation_bytes
from ifvit.bench.config import BenchTrainConfig
from ifvit.bench.measurement import median_ratio, spread
from ifvit.bench.training_speed import EngineSteps, UViTRecipeSteps, bench_train
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.presets import CLASS_PRESETS, PRESETS
from ifvit.training.config import EngineConfig, TrainConfig

CPU = torch.device("cpu")
VARIANTS = [
    "concat_early",
    "concat_intermediate",
    "cross_attention_early",
    "cross_attention_intermediate",
]


def recipe() -> TrainConfig:
    """The smallest backbone with two samples per step."""
    return TrainConfig(
        run="bench",
        shards="bench",
        backbone=PRESETS["tiny"],
        engine=EngineConfig(backend="plain", attention="math"),
        global_batch_size=2,
        micro_batch_size=2,
    )


def test_contenders_multiply_the_same_matrices() -> None:
    steps = (EngineSteps(recipe()), UViTRecipeSteps(recipe(), CPU))
    flops = []
    for contender in steps:
        for module in contender.backbone.modules():
            if hasattr(module, "attend"):
                module.attend = lambda query, key, value, visible: query + 0 * (key + value).mean()
        with FlopCounterMode(display=False) as counter:
            contender(1)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    # The backward pass costs a little less than two forward passes: inputs need no gradient.
    assert 2.9 * 2 < flops[0] / count_cost(PRESETS["tiny"]).layer_flops < 3 * 2


def test_steps_of_the_engine_continue_one_run() -> None:
    steps = EngineSteps(recipe())
    steps(2)
    steps(1)
    assert steps.engine.scalars().num_updates == 3


def test_rows_and_ratios_come_out_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    config = BenchTrainConfig(backbone=PRESETS["tiny"], batch_size=2, rounds=2, json=True)
    bench_train(config)
    result = json.loads(capsys.readouterr().out)
    assert [row["setting"] for row in result["rows"]] == VARIANTS
    assert min(result["intermediate_vs_early"], result["vs_uvit_recipe"]) > 0
    for row in result["rows"]:
        assert row["step_seconds"] == pytest.approx(2 / row["images_per_s"])
    row = result["rows"][-1]
    params = count_cost(PRESETS["tiny"]).params
    activations = activation_bytes(PRESETS["tiny"], 2, "fp32", checkpointing=False)
    assert (row["params"], row["fusion"]) == (params, PRESETS["tiny"].fusion)
    # Parameters, gradients, two moments and one EMA copy in fp32, and the activations.
    assert row["planned_bytes"] == 20 * params + activations


def test_any_maps_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    maps = ["3*image", "dual_stream image adaln", "concat_early"]
    backbone = dataclasses.replace(PRESETS["tiny"], fusion="3*concat")
    bench_train(BenchTrainConfig(backbone=backbone, maps=maps, batch_size=1, rounds=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("GB")[-1].split("-  ")[-1] for line in lines[1:4]] == [
        "3*image",
        "dual_stream image adaln, 1 text block",
        "3*concat",
    ]
    assert lines[1].split()[2] == "1.000"
    assert not any(line.startswith("vs_uvit_recipe") for line in lines)


def test_classes_are_conditions_too(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = CLASS_PRESETS["class_tiny"]
    assert isinstance(backbone, FusionTransformerConfig)
    bench_train(BenchTrainConfig(backbone=backbone, batch_size=1, rounds=1))
    assert "vs_uvit_recipe" in capsys.readouterr().out


def test_ratios_are_taken_within_rounds() -> None:
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_every_block_is_compiled_in_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a higher limit torch would run the last variants, the paper's, uncompiled."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda code, **options: original(code, dynamic=False, backend="eager")
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        bench_train(
            BenchTrainConfig(
                backbone=PRESETS["tiny"], batch_size=2, rounds=1, precision="bf16", compile=True
            )
        )
