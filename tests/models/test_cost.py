"""`ifvit cost`: counts equal formulas, the paper's table and a plain run; rows and drawing."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.models import cost as cost_module
from ifvit.models.config import CostConfig, FusionTransformerConfig
from ifvit.models.cost import Cost, CostRow, cost, cost_rows, count_cost
from ifvit.models.presets import CLASS_PRESETS, PRESETS
from ifvit.models.weights import describe_backbone

TINY, CLASS_TINY = PRESETS["tiny"], CLASS_PRESETS["class_tiny"]
assert isinstance(CLASS_TINY, FusionTransformerConfig)
ENTRIES = ("image", "concat", "cross_attention", "separate_cross_attention", "dual_stream", "adaln")
# Parameters, operations of layers, operations of attention. Those of transformers come from
# formulas that counted multiply-accumulates block by block.
COUNTS = {
    "tiny": (TINY, 960_932, 35_002_368, 1_397_376),
    "small": (PRESETS["small"], 47_843_492, 23_594_041_344, 1_973_270_528),
    "mid": (PRESETS["mid"], 137_857_700, 69_162_663_936, 3_893_099_520),
    "large": (PRESETS["large"], 299_196_580, 150_935_994_368, 6_272_946_176),
    "huge": (PRESETS["huge"], 516_589_220, 263_585_562_624, 9_856_645_632),
    "class_small": (CLASS_PRESETS["class_small"], 38_472_868, 19_487_031_296, 1_635_876_864),
    "class_large": (CLASS_PRESETS["class_large"], 303_560_868, 155_843_854_336, 6_543_507_456),
    "unet_tiny": (CLASS_PRESETS["unet_tiny"], 1_006_692, 40_779_776, 270_336),
    "unet_base": (CLASS_PRESETS["unet_base"], 86_227_076, 32_182_255_616, 500_318_208),
    "modulated concat": (
        dataclasses.replace(TINY, fusion="image 5*concat image", modulation="adaln_zero"),
        *(1_451_300, 51_904_512, 2_411_136),
    ),
    "modulated cross-attention": (
        dataclasses.replace(TINY, modulation="adaln_zero"),
        *(1_451_300, 35_979_264, 1_397_376),
    ),
    "adaln": (
        dataclasses.replace(TINY, fusion="image 5*adaln image", modulation="adaln_zero"),
        *(1_451_300, 33_030_144, 875_136),
    ),
    "narrow MLP, three channels": (
        dataclasses.replace(TINY, mlp_ratio=2, latent_channels=3),
        *(663_648, 25_016_448, 1_397_376),
    ),
    "modulated class token": (
        dataclasses.replace(CLASS_TINY, width=104, num_heads=4, modulation="adaln_zero"),
        *(1_504_732, 33_979_008, 943_488),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_those_of_formulas(name: str) -> None:
    config, *expected = COUNTS[name]
    counted = count_cost(config)
    assert [counted.params, counted.layer_flops, counted.attention_flops] == expected


def sample_map(seed: int) -> FusionTransformerConfig:
    """Sample a fusion map of 1 to 9 blocks with random options."""
    draw = random.Random(seed)
    entries = [draw.choice(ENTRIES) for _ in range(draw.randint(1, 9))]
    return dataclasses.replace(
        TINY,
        fusion=" ".join(entries),
        num_text_blocks=draw.randint(0, 2) if set(entries) != {"image"} else 0,
        long_skip=draw.random() < 0.7,
        mlp=draw.choice(["gelu", "swiglu"]),
        norm=draw.choice(["layer_norm", "rms_norm"]),
        qk_norm=draw.random() < 0.5,
        rotary=draw.random() < 0.5,
        num_registers=draw.choice([0, 3]),
        modulation=draw.choice(["none", "adaln_zero", "shared"]),
    )


def test_blocks_that_were_counted_before_add_what_a_plain_run_counts() -> None:
    cost_module._BLOCKS.clear()
    for seed in range(20):
        config = sample_map(seed)
        backbone = describe_backbone(config)
        backbone.set_attention("math")
        latents, context = torch.empty(1, 4, 8, 8), torch.empty(1, 16, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(latents.to("meta"), torch.empty(1, device="meta"), context.to("meta"))
        flops = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
        assert count_cost(config) == Cost(
            params=sum(parameter.numel() for parameter in backbone.parameters()),
            layer_flops=counter.get_total_flops() - flops,
            attention_flops=flops,
        ), config


def test_attention_operations_are_two_products_of_queries_and_keys_in_every_block() -> None:
    # 3 blocks of 1 + 16 + 16 tokens; 2 FLOPs per multiply-accumulate, 2 products.
    config = dataclasses.replace(TINY, fusion="3*concat", num_text_blocks=0)
    assert count_cost(config).attention_flops == 3 * 2 * 2 * (1 + 16 + 16) ** 2 * TINY.width


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> list[CostRow]:
    """The rows of the paper's size, of a preset with options, and of a class preset."""
    presets = {"small": PRESETS["small"], "1b": PRESETS["1b"]}
    monkeypatch.setattr(cost_module, "PRESETS", presets)
    monkeypatch.setattr(cost_module, "CLASS_PRESETS", {"class_tiny": CLASS_TINY})
    return list(cost_rows(CostConfig()))


def test_the_papers_table_comes_out(small_rows: list[CostRow]) -> None:
    table = {
        row.setting: (row.params, round(row.gflops_paper, 2), round(row.gflops, 2))
        for row in small_rows[:8]
    }
    assert table["concat_early"] == (44_692_644, 29.49, 32.46)
    assert table["concat_intermediate"] == (47_843_492, 25.77, 28.01)
    assert table["cross_attention_early"] == (44_692_644, 23.76, 26.04)
    assert table["cross_attention_intermediate"] == (47_843_492, 23.59, 25.57)
    # The halves of the ablation, then presets with their own map.
    assert len(table) == 8
    own, class_row = small_rows[8:]
    assert (own.preset, own.setting, own.fusion) == ("1b", None, PRESETS["1b"].fusion)
    assert (class_row.preset, class_row.fusion) == ("class_tiny", "7*concat")


def test_json_is_all_that_is_written_to_standard_output(
    small_rows: list[CostRow], capsys: pytest.CaptureFixture[str]
) -> None:
    cost(CostConfig(json=True))
    rows = json.loads(capsys.readouterr().out)
    assert rows == [dataclasses.asdict(row) for row in small_rows]
    assert list(rows[0]) == [
        "preset",
        "setting",
        "fusion",
        "num_text_blocks",
        "params",
        "gflops_paper",
        "gflops",
    ]


def test_the_table_has_a_line_for_every_row(
    small_rows: list[CostRow], capsys: pytest.CaptureFixture[str]
) -> None:
    cost(CostConfig())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert ["small", "44,692,644", "29.488", "32.458", "13*concat"] in lines
    assert len([words for words in lines if words[0] in ("small", "1b", "class_tiny")]) == 10


def test_own_maps_are_counted_at_the_size_of_the_backbone() -> None:
    flags = ["--backbone", "small", "--backbone.num_text_blocks", "2"]
    maps = ["--maps", "13*image", "3*concat 10*image", "concat_early"]
    rows = list(cost_rows(read_config(CostConfig, [*flags, *maps], prog="ifvit cost")))
    # A map without text has no text branch, and a setting has its own.
    assert [row.num_text_blocks for row in rows] == [0, 2, 0]
    assert [row.fusion for row in rows] == ["13*image", "3*concat 10*image", "13*concat"]
    (row,) = cost_rows(read_config(CostConfig, flags, prog="ifvit cost"))
    assert (row.preset, row.fusion, row.num_text_blocks) == (None, PRESETS["small"].fusion, 2)


def test_too_few_blocks_for_image_blocks_on_both_sides_are_refused() -> None:
    shape = dataclasses.replace(PRESETS["tiny"], fusion="2*concat")
    with pytest.raises(UserError, match=r"concat_intermediate: .* give 3 blocks or more"):
        list(cost_rows(CostConfig(backbone=shape, maps=["concat_early", "concat_intermediate"])))


def test_a_misspelt_entry_is_named() -> None:
    with pytest.raises(UserError, match=r"3\*concta is not an entry"):
        list(cost_rows(CostConfig(maps=["3*concta"])))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone.width", "8"], "give --backbone NAME before its fields"),
        (["--backbone", "small", "--backbone.breadth", "8"], r"arguments: --backbone\.breadth=8"),
        (["--backbone.breadth", "8"], "give --backbone NAME before its fields"),
        (["--backbone", "small", "--backbone.norm", "rms"], r"backbone\.norm is rms; .*'rms_norm'"),
        (["--backbone", "small", "--backbone.width", "9"], "width 9 must be even"),
    ],
)
def test_a_wrong_field_of_the_backbone_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(CostConfig, flags, prog="ifvit cost")


def test_the_drawing_is_a_reproducible_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("first.png", "second.png", "own.png")]
    for file in files[:2]:
        cost(CostConfig(draw=file, json=True))
    rows = json.loads(capsys.readouterr().out.split("\n]\n")[0] + "]")
    assert len({row["fusion"] for row in rows}) == len(rows) == 6
    maps = ["dual_stream 2*image adaln", "2*separate_cross_attention"]
    cost(CostConfig(maps=maps, draw=files[2]))
    contents = [Path(file).read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
    with pytest.raises(UserError, match=r"draw: fusion.svg; name a \.png file"):
        cost(CostConfig(draw="fusion.svg"))


def test_the_json_flag_needs_no_value() -> None:
    assert read_config(CostConfig, ["--json"], prog="ifvit cost") == CostConfig(json=True)
    assert read_config(CostConfig, ["--json", "false"], prog="ifvit cost") == CostConfig()
