"""Runs are grouped into the paper's variants."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import backbone_of, write_training

from ifvit.errors import UserError
from ifvit.evaluation.runs import Run, read_runs
from ifvit.models.config import CLASS_PRESETS, PRESETS, BackboneConfig
from ifvit.studies.variants import VARIANTS, group_runs


def trained(folder: Path, shapes: Sequence[BackboneConfig]) -> list[Run]:
    for number, each in enumerate(shapes):
        write_training(folder / str(number), each)
    return read_runs([str(folder / str(number)) for number in range(len(shapes))])


def test_every_backbone_has_its_variant_and_seeds_are_grouped(tmp_path: Path) -> None:
    shapes = [backbone_of(variant) for variant in reversed(VARIANTS)]
    groups = group_runs(trained(tmp_path, [*shapes, shapes[4]]))
    assert list(groups) == list(VARIANTS)
    assert [run.name for run in groups[VARIANTS[3]]] == ["4", "8"]
    assert [variant.slug for variant in groups][:2] == ["concat_early", "concat_intermediate"]
    assert VARIANTS[4].title == "Cross-attention, image blocks only"


def test_two_shapes_of_one_variant_are_refused(tmp_path: Path) -> None:
    shape = backbone_of(VARIANTS[1])
    runs = trained(tmp_path, [shape, dataclasses.replace(shape, num_image_blocks=2)])
    with pytest.raises(UserError, match=r"0, .*1: Concat, intermediate has two shapes"):
        group_runs(runs)


@pytest.mark.parametrize(
    "backbone",
    [
        dataclasses.replace(PRESETS["tiny"], conditioning="adaln"),
        dataclasses.replace(PRESETS["tiny"], modulation=True),
        CLASS_PRESETS["class_tiny"],
    ],
    ids=["adaln", "modulated", "token_transformer"],
)
def test_a_run_of_another_kind_or_without_weights_is_refused(
    backbone: BackboneConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the run is not one of the paper's variants; leave"):
        group_runs(trained(tmp_path, [backbone]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty/weights: no backbone"):
        group_runs(read_runs([str(tmp_path / "empty")]))
