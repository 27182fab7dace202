"""`ifvit bench train`: contenders do the same work, and the rows are consistent."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.bench.config import BenchTrainConfig
from ifvit.bench.measurement import kept_bytes, median_ratio, spread
from ifvit.bench.training_speed import BareSteps, EngineSteps, UViTRecipeSteps, bench_train
from ifvit.models.config import PRESETS
from ifvit.models.cost import count_cost
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
    steps = (EngineSteps(recipe()), BareSteps(recipe(), CPU), UViTRecipeSteps(recipe(), CPU))
    flops = []
    for contender in steps:
        for module in contender.backbone.modules():
            if hasattr(module, "attend"):
                module.attend = lambda query, key, value: query + 0 * (key + value).mean()
        with FlopCounterMode(display=False) as counter:
            contender(1)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == flops[2]
    # The backward pass costs a little less than two forward passes: inputs need no gradient.
    assert 2.9 * 2 < flops[0] / count_cost(PRESETS["tiny"]).layer_flops < 3 * 2


def test_steps_of_the_engine_continue_one_run() -> None:
    steps = EngineSteps(recipe())
    steps(2)
    steps(1)
    assert steps.engine.scalars().num_updates == 3


def test_tensors_kept_for_the_backward_pass_are_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(8, 4)
    x = torch.zeros(5, 8)
    kept = kept_bytes(lambda: layer(x).exp().sum() + layer(x).exp().sum(), [*layer.parameters()])
    assert kept == 4 * (5 * 8 + 2 * 5 * 4)  # the input once, the results of both exponentials


def test_rows_and_ratios_come_out_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    bench_train(BenchTrainConfig(preset="tiny", batch_size=2, rounds=2, json=True))
    result = json.loads(capsys.readouterr().out)
    rows = {row["setting"]: row for row in result["rows"]}
    assert list(rows) == VARIANTS
    for name in ("intermediate_vs_early", "vs_uvit_recipe", "matmul_flops_per_s"):
        assert result[name] > 0
    assert result["engine_overhead"] > -1
    for row in rows.values():
        assert row["step_seconds"] == pytest.approx(
            row["vs_floor"] * (row["floor_flops_seconds"] + row["floor_bytes_seconds"])
        )
        assert 0 < row["mfu_paper"] < row["mfu"]
        assert row["planned_bytes"] == pytest.approx(
            row["state_bytes"] + row["step_bytes"], rel=0.01
        )
    # Parameters, two moments and one EMA copy in fp32.
    intermediate = rows["cross_attention_intermediate"]
    assert intermediate["state_bytes"] == 16 * count_cost(PRESETS["tiny"]).params


def test_the_table_has_a_line_for_each_variant(capsys: pytest.CaptureFixture[str]) -> None:
    bench_train(BenchTrainConfig(preset="tiny", batch_size=1, rounds=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == VARIANTS


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
            BenchTrainConfig(preset="tiny", batch_size=2, rounds=1, precision="bf16", compile=True)
        )
