"""Runs are grouped into the paper's variants."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import write_training

from ifvit.errors import UserError
from ifvit.evaluation.runs import Run, read_runs
from ifvit.models.config import CLASS_PRESETS, PRESETS, BackboneConfig, FusionUViTConfig
from ifvit.studies.variants import VARIANTS, group_runs


def shape(conditioning: str, num_image_blocks: int, num_text_blocks: int) -> FusionUViTConfig:
    changes = {"num_image_blocks": num_image_blocks, "num_text_blocks": num_text_blocks}
    return dataclasses.replace(PRESETS["tiny"], conditioning=conditioning, **changes)


def trained(folder: Path, shapes: Sequence[BackboneConfig]) -> list[Run]:
    for number, each in enumerate(shapes):
        write_training(folder / str(number), each)
    return read_runs([str(folder / str(number)) for number in range(len(shapes))])


def test_every_backbone_has_its_variant_and_seeds_are_grouped(tmp_path: Path) -> None:
    shapes = [
        shape(conditioning, image, text)
        for conditioning in ("cross_attention", "concat")
        for image in (1, 0)
        for text in (2, 0)
    ]
    groups = group_runs(trained(tmp_path, [*shapes, shapes[0]]))
    assert list(groups) == list(VARIANTS)
    assert [run.name for run in groups[VARIANTS[3]]] == ["0", "8"]
    assert [variant.slug for variant in groups][:2] == ["concat_early", "concat_intermediate"]
    assert VARIANTS[4].title == "Cross-attention, image blocks only"


def test_two_shapes_of_one_variant_are_refused(tmp_path: Path) -> None:
    runs = trained(tmp_path, [shape("concat", 1, 1), shape("concat", 2, 1)])
    with pytest.raises(UserError, match=r"0, .*1: Concat, intermediate in two shapes"):
        group_runs(runs)


def test_a_run_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty/weights: no backbone"):
        group_runs(read_runs([str(tmp_path / "empty")]))


@pytest.mark.parametrize(
    "backbone",
    [
        dataclasses.replace(PRESETS["tiny"], conditioning="adaln"),
        dataclasses.replace(PRESETS["tiny"], modulation=True),
        CLASS_PRESETS["token_tiny"],
    ],
    ids=["adaln", "modulated", "token_transformer"],
)
def test_a_backbone_of_another_kind_is_refused(backbone: BackboneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run is not one of the paper's variants; leave"):
        group_runs(trained(tmp_path, [backbone]))
