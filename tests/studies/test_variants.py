"""Runs are grouped into the paper's variants."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from made_backbone import SMALL_UNET
from made_runs import write_training

from ifvit.errors import UserError
from ifvit.evaluation.runs import Run, read_runs
from ifvit.models.config import BackboneConfig
from ifvit.models.presets import CLASS_PRESETS, PRESETS, SETTINGS, with_setting
from ifvit.studies.variants import group_runs, title_of


def trained(folder: Path, shapes: Sequence[BackboneConfig]) -> list[Run]:
    for number, each in enumerate(shapes):
        write_training(folder / str(number), each)
    return read_runs([str(folder / str(number)) for number in range(len(shapes))])


def test_every_backbone_has_its_variant_and_seeds_are_grouped(tmp_path: Path) -> None:
    shapes = [with_setting(PRESETS["tiny"], variant) for variant in reversed(SETTINGS)]
    groups, excluded = group_runs(trained(tmp_path, [*shapes, shapes[4]]))
    assert list(groups) == list(SETTINGS)
    assert [run.name for run in groups["cross_attention_intermediate"]] == ["4", "8"]
    assert excluded == []
    assert title_of("cross_attention_image_blocks_only") == "Cross-attention, image blocks only"
    assert title_of("concat_early") == "Concat, early"


def test_two_shapes_of_one_variant_are_refused(tmp_path: Path) -> None:
    shape = with_setting(PRESETS["tiny"], "concat_intermediate")
    runs = trained(tmp_path, [shape, replace(shape, fusion="2*image 3*concat 2*image")])
    with pytest.raises(UserError, match=r"0, .*1: Concat, intermediate has two shapes"):
        group_runs(runs)
    write_training(tmp_path / "flow", shape, prediction="flow")
    flow = read_runs([str(tmp_path / "flow")])
    with pytest.raises(UserError, match="Concat, intermediate has two predictions; report them"):
        group_runs(runs[:1] + flow)


def test_a_run_of_another_kind_or_without_weights_is_left_out_and_named(tmp_path: Path) -> None:
    tiny = PRESETS["tiny"]
    others = [replace(tiny, fusion="7*adaln"), CLASS_PRESETS["class_tiny"], SMALL_UNET]
    runs = trained(tmp_path, [tiny, *others])
    (tmp_path / "empty").mkdir()
    runs += read_runs([str(tmp_path / "empty")])
    groups, excluded = group_runs(runs)
    assert groups == {"cross_attention_intermediate": runs[:1]}
    assert excluded == [
        "1 is left out: 7*adaln is none of the paper's settings",
        "2 is left out: 7*concat is none of the paper's settings",
        "3 is left out: unet is none of the paper's settings",
        "empty is left out: it has no weights",
    ]
    with pytest.raises(UserError, match="1 is left out: 7"):
        group_runs(runs[1:])
