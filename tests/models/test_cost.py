import dataclasses
import json

import pytest

from ifvit.config import read_config
from ifvit.models import cost
from ifvit.models.config import CLASS_PRESETS, PRESETS, CostConfig
from ifvit.models.cost import CostRow, cost_rows, count_cost
from ifvit.models.weights import build_backbone

TINY, TOKEN_TINY = PRESETS["tiny"], CLASS_PRESETS["class_tiny"]
# Parameters, operations of layers, operations of attention. Those of transformers come from
# formulas that counted multiply-accumulates block by block.
COUNTS = {
    "tiny": (TINY, 960_932, 35_002_368, 1_397_376),
    "small": (PRESETS["small"], 47_843_492, 23_594_041_344, 1_973_270_528),
    "mid": (PRESETS["mid"], 137_857_700, 69_162_663_936, 3_893_099_520),
    "large": (PRESETS["large"], 299_196_580, 150_935_994_368, 6_272_946_176),
    "huge": (PRESETS["huge"], 516_589_220, 263_585_562_624, 9_856_645_632),
    "class_tiny": (TOKEN_TINY, 1_016_452, 33_005_568, 943_488),
    "class_small": (CLASS_PRESETS["class_small"], 40_572_580, 19_491_225_600, 1_635_876_864),
    "class_base": (CLASS_PRESETS["class_base"], 90_743_204, 43_848_597_504, 2_453_815_296),
    "class_large": (CLASS_PRESETS["class_large"], 311_954_596, 155_860_631_552, 6_543_507_456),
    "unet_tiny": (CLASS_PRESETS["unet_tiny"], 1_006_692, 40_779_776, 270_336),
    "unet_base": (CLASS_PRESETS["unet_base"], 91_916_804, 35_247_685_632, 542_343_168),
    "modulated concat": (
        dataclasses.replace(TINY, conditioning="concat", modulation=True),
        *(1_451_300, 51_904_512, 2_411_136),
    ),
    "modulated cross-attention": (
        dataclasses.replace(TINY, modulation=True),
        *(1_451_300, 35_979_264, 1_397_376),
    ),
    "adaln": (
        dataclasses.replace(TINY, conditioning="adaln"),
        *(1_451_300, 33_030_144, 875_136),
    ),
    "narrow MLP, three channels": (
        dataclasses.replace(TINY, mlp_ratio=2, latent_channels=3),
        *(663_648, 25_016_448, 1_397_376),
    ),
    "modulated tokens": (
        dataclasses.replace(TOKEN_TINY, modulation=True),
        *(1_504_732, 33_979_008, 943_488),
    ),
    "adaln with long skips": (
        dataclasses.replace(TOKEN_TINY, conditioning="adaln", long_skip=True),
        *(1_569_836, 34_368_384, 841_568),
    ),
    "caption tokens": (
        dataclasses.replace(TOKEN_TINY, num_classes=None, context_length=5, context_width=12),
        *(1_010_316, 40_286_400, 1_409_408),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_those_of_formulas(name):
    config, *expected = COUNTS[name]
    counted = count_cost(config)
    assert [counted.params, counted.layer_flops, counted.attention_flops] == expected


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention", "adaln"])
def test_parameters_are_those_of_the_network(conditioning):
    # Only the middle block is fused; there are several image-only and text blocks.
    config = dataclasses.replace(
        TINY, depth=6, num_image_blocks=3, num_text_blocks=2, conditioning=conditioning
    )
    parameters = build_backbone(config).parameters()
    assert count_cost(config).params == sum(parameter.numel() for parameter in parameters)


def test_attention_operations_are_two_products_of_queries_and_keys_in_every_block():
    # depth 2: 3 blocks of 1 + 16 + 16 tokens; 2 FLOPs per multiply-accumulate, 2 products.
    config = dataclasses.replace(
        TINY, depth=2, conditioning="concat", num_image_blocks=0, num_text_blocks=0
    )
    assert count_cost(config).attention_flops == 3 * 2 * 2 * (1 + 16 + 16) ** 2 * TINY.width


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> list[CostRow]:
    """The rows of the paper's size and of one class-conditional preset."""
    monkeypatch.setattr(cost, "PRESETS", {"small": PRESETS["small"]})
    monkeypatch.setattr(cost, "CLASS_PRESETS", {"class_tiny": TOKEN_TINY})
    return list(cost_rows())


def test_the_papers_table_comes_out(small_rows):
    table = {
        (row.conditioning, row.num_image_blocks, row.num_text_blocks): (
            row.params,
            round(row.gflops_paper, 2),
            round(row.gflops, 2),
        )
        for row in small_rows
    }
    assert table["concat", 0, 0] == (44_692_644, 29.49, 32.46)
    assert table["concat", 4, 1] == (47_843_492, 25.77, 28.01)
    assert table["cross_attention", 0, 0] == (44_692_644, 23.76, 26.04)
    assert table["cross_attention", 4, 1] == (47_843_492, 23.59, 25.57)
    # All conditionings with all ablations, and the class-conditional preset.
    assert len(table) == len(small_rows) == 3 * 4 + 1


def test_json_is_all_that_is_written_to_standard_output(small_rows, capsys):
    cost.cost(CostConfig(json=True))
    rows = json.loads(capsys.readouterr().out)
    assert rows == [dataclasses.asdict(row) for row in small_rows]
    assert list(rows[0]) == [
        "preset",
        "conditioning",
        "num_image_blocks",
        "num_text_blocks",
        "params",
        "gflops_paper",
        "gflops",
    ]


def test_the_table_has_a_line_for_every_row(small_rows, capsys):
    cost.cost(CostConfig())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert ["small", "concat", "0", "0", "44,692,644", "29.49", "32.46"] in lines
    named = [words[0] for words in lines if words[0] in ("small", "class_tiny")]
    assert named == ["small"] * 12 + ["class_tiny"]


def test_the_json_flag_needs_no_value():
    assert read_config(CostConfig, ["--json"], prog="ifvit cost") == CostConfig(json=True)
    assert read_config(CostConfig, ["--json", "false"], prog="ifvit cost") == CostConfig()
