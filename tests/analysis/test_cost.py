import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifvit.config import read_config
from ifvit.models.config import CLASS_PRESETS, PRESETS, CostConfig
from ifvit.models.cost import cost, cost_rows, count_cost
from ifvit.models.layers import Attention
from ifvit.models.weights import build_backbone

ROWS = [row for row in cost_rows() if row.conditioning != "classes"]


def config_of(row):
    return dataclasses.replace(
        PRESETS[row.preset],
        conditioning=row.conditioning,
        num_image_blocks=row.num_image_blocks,
        num_text_blocks=row.num_text_blocks,
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (("concat", 0, 0), (44_692_644, 29.49, 32.46)),
        (("concat", 4, 1), (47_843_492, 25.77, 28.01)),
        (("cross_attention", 0, 0), (44_692_644, 23.76, 26.04)),
        (("cross_attention", 4, 1), (47_843_492, 23.59, 25.57)),
    ],
)
def test_the_papers_table_comes_out(setting, expected):
    (row,) = [
        row
        for row in ROWS
        if row.preset == "small"
        and (row.conditioning, row.num_image_blocks, row.num_text_blocks) == setting
    ]
    assert (row.params, round(row.gflops_paper, 2), round(row.gflops, 2)) == expected


def test_every_preset_has_all_conditionings_and_all_ablations():
    assert len(ROWS) == len(PRESETS) * 3 * 4
    assert len({dataclasses.astuple(config_of(row)) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.preset}-{row.conditioning}")
def test_counted_parameters_are_those_of_the_module(row):
    with torch.device("meta"):
        backbone = build_backbone(config_of(row))
    assert row.params == sum(parameter.numel() for parameter in backbone.parameters())


def measured_flops(backbone):
    shape = backbone.config
    size = (1, shape.latent_channels, shape.latent_size, shape.latent_size)
    context = torch.zeros(1, shape.context_length, shape.context_width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(size, device="meta"), torch.zeros(1, device="meta"), context)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.preset in ("tiny", "small")], ids=lambda row: row.preset
)
def test_counted_operations_are_those_that_run(row):
    counted = count_cost(config_of(row))
    with torch.device("meta"):
        backbone = build_backbone(config_of(row))
    backbone.set_attention("math")
    assert measured_flops(backbone) == counted.flops

    for module in backbone.modules():
        if isinstance(module, Attention):
            module.attend = lambda query, key, value: query
    assert measured_flops(backbone) == counted.layer_flops


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PRESETS["tiny"], conditioning="concat", modulation=True),
        dataclasses.replace(PRESETS["tiny"], modulation=True),
        dataclasses.replace(CLASS_PRESETS["token_tiny"], modulation=True),
        dataclasses.replace(CLASS_PRESETS["token_tiny"], conditioning="adaln", long_skip=True),
        dataclasses.replace(PRESETS["tiny"], mlp_ratio=2, latent_channels=3),
        dataclasses.replace(
            CLASS_PRESETS["token_tiny"], num_classes=None, context_length=5, context_width=12
        ),
    ],
)
def test_what_no_preset_has_is_counted(config):
    counted = count_cost(config)
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert counted.params == sum(parameter.numel() for parameter in backbone.parameters())
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        size = config.latent_size
        latents, timesteps = torch.zeros(1, config.latent_channels, size, size), torch.zeros(1)
        condition = (
            torch.zeros(1, dtype=torch.int64)
            if config.context_shape is None
            else torch.zeros(1, *config.context_shape)
        )
        backbone.set_attention("math")
        backbone(latents, timesteps, condition)
    assert counter.get_total_flops() == counted.flops


def test_the_json_flag_needs_no_value():
    assert read_config(CostConfig, ["--json"], prog="ifvit cost") == CostConfig(json=True)
    assert read_config(CostConfig, ["--json", "false"], prog="ifvit cost") == CostConfig()


def test_json_is_all_there_is_on_standard_output(capsys):
    cost(CostConfig(json=True))
    rows = json.loads(capsys.readouterr().out)
    assert rows == [dataclasses.asdict(row) for row in cost_rows()]
    assert list(rows[0]) == [
        "preset",
        "conditioning",
        "num_image_blocks",
        "num_text_blocks",
        "params",
        "gflops_paper",
        "gflops",
    ]


def test_the_table_has_a_line_for_every_row(capsys):
    cost(CostConfig())
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.strip()]
    assert sum(name in PRESETS for name in named) == len(ROWS)
    assert [name for name in named if name in CLASS_PRESETS] == list(CLASS_PRESETS)
    (line,) = [line for line in lines if line.split()[:4] == ["small", "concat", "0", "0"]]
    assert line.split()[4:] == ["44,692,644", "29.49", "32.46"]
