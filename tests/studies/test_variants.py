"""Runs find their setting, and differences between settings the noise they are held against."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made_runs import write_training
from scipy.stats import norm
from scipy.stats import t as student

from ifvit.errors import UserError
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.runs import Run, read_runs
from ifvit.models.config import CLASS_PRESETS, PRESETS, BackboneConfig, FusionUViTConfig
from ifvit.studies.comparisons import mean_over_seeds, noise_between
from ifvit.studies.variants import VARIANTS, group_runs


def shape(conditioning: str, num_image_blocks: int, num_text_blocks: int) -> FusionUViTConfig:
    changes = {"num_image_blocks": num_image_blocks, "num_text_blocks": num_text_blocks}
    return dataclasses.replace(PRESETS["tiny"], conditioning=conditioning, **changes)


def trained(folder: Path, shapes: Sequence[BackboneConfig]) -> list[Run]:
    for number, each in enumerate(shapes):
        write_training(folder / str(number), each)
    return read_runs([str(folder / str(number)) for number in range(len(shapes))])


def estimates(*values: float, error: float = 0.1) -> list[Estimate]:
    return [
        Estimate(value=v, standard_error=error, num_samples=50, low=v - error, high=v + error)
        for v in values
    ]


def test_every_backbone_has_its_setting_and_seeds_stand_together(tmp_path: Path) -> None:
    shapes = [
        shape(conditioning, image, text)
        for conditioning in ("cross_attention", "concat")
        for image in (1, 0)
        for text in (2, 0)
    ]
    groups = group_runs(trained(tmp_path, [*shapes, shapes[0]]))
    assert list(groups) == list(VARIANTS)
    assert [run.name for run in groups[VARIANTS[3]]] == ["0", "8"]
    assert [setting.slug for setting in groups][:2] == ["concat_early", "concat_intermediate"]
    assert VARIANTS[4].title == "Cross-attention, image blocks only"


def test_two_shapes_of_one_setting_are_refused(tmp_path: Path) -> None:
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
def test_a_backbone_that_the_paper_has_not_is_refused(
    backbone: BackboneConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the run is not one of the paper's variants; leave"):
        group_runs(trained(tmp_path, [backbone]))


def test_the_error_of_several_runs_is_that_over_seeds() -> None:
    several, one = mean_over_seeds(estimates(1.0, 2.0, 3.0)), mean_over_seeds(estimates(2.0))
    assert several.value == one.value == 2.0
    assert several.error == pytest.approx(1 / math.sqrt(3))
    assert one.seed_error is None
    assert (one.error, several.sample_error) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (3, 8), (20, 4), (40, 60)])
def test_noise_over_seeds_is_welchs_interval(sizes: tuple[int, int]) -> None:
    draw = np.random.default_rng(sizes)
    first, second = (draw.normal(0, scale, n) for scale, n in zip((1.0, 2.5), sizes, strict=True))
    shares = [values.var(ddof=1) / len(values) for values in (first, second)]
    parts = [share**2 / (size - 1) for share, size in zip(shares, sizes, strict=True)]
    freedom = math.floor(sum(shares) ** 2 / sum(parts))
    expected = student.ppf(0.975, freedom) * math.sqrt(sum(shares))
    means = (mean_over_seeds(estimates(*values)) for values in (first, second))
    assert noise_between(*means) == pytest.approx(expected, rel=1e-9)


def test_noise_of_a_single_run_is_that_over_samples() -> None:
    single, several = mean_over_seeds(estimates(1.0)), mean_over_seeds(estimates(1.0, 9.0))
    assert noise_between(single, several) == pytest.approx(norm.ppf(0.975) * 0.1 * math.sqrt(2))


def test_seeds_that_happen_to_agree_do_not_make_a_difference_certain() -> None:
    first, second = (mean_over_seeds(estimates(value, value)) for value in (0.1, 0.2))
    assert noise_between(first, second) == pytest.approx(norm.ppf(0.975) * 0.1 * math.sqrt(2))
    several = mean_over_seeds(estimates(1.0, 2.0))
    assert noise_between(first, several) == pytest.approx(student.ppf(0.975, 1) * 0.5)


def test_an_estimate_over_seeds_has_students_interval() -> None:
    values = (1.0, 2.0, 4.0)
    found = mean_over_seeds(estimates(*values)).as_estimate()
    low, high = student.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))
