"""Means over seeds, and the noise that decides whether two means differ."""

import math

import numpy as np
import pytest
from made_runs import estimate
from scipy.stats import norm
from scipy.stats import t as student

from ifvit.evaluation.metrics import Estimate
from ifvit.studies.comparisons import (
    FRECHET,
    RETRIEVAL,
    compare,
    find_best,
    mean_over_seeds,
    noise_between,
)


def made(*values: float) -> list[Estimate]:
    return [estimate(value, 0.1) for value in values]


def test_the_error_of_several_runs_is_that_over_seeds() -> None:
    several, one = mean_over_seeds(made(1.0, 2.0, 3.0)), mean_over_seeds(made(2.0))
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
    means = (mean_over_seeds(made(*values)) for values in (first, second))
    assert noise_between(*means) == pytest.approx(expected, rel=1e-9)


def test_noise_of_a_single_run_is_that_over_samples() -> None:
    single, several = mean_over_seeds(made(1.0)), mean_over_seeds(made(1.0, 9.0))
    assert noise_between(single, several) == pytest.approx(norm.ppf(0.975) * 0.1 * math.sqrt(2))


def test_seeds_that_happen_to_agree_do_not_make_a_difference_certain() -> None:
    first, second = (mean_over_seeds(made(value, value)) for value in (0.1, 0.2))
    assert noise_between(first, second) == pytest.approx(norm.ppf(0.975) * 0.1 * math.sqrt(2))
    several = mean_over_seeds(made(1.0, 2.0))
    assert noise_between(first, several) == pytest.approx(student.ppf(0.975, 1) * 0.5)


def test_an_estimate_over_seeds_has_students_interval() -> None:
    values = (1.0, 2.0, 4.0)
    found = mean_over_seeds(made(*values))
    low, high = student.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_difference_within_the_noise_is_called_the_same() -> None:
    first, close, far = (mean_over_seeds([estimate(value)]) for value in (0.60, 0.63, 0.40))
    within, beyond = compare(RETRIEVAL, first, close), compare(RETRIEVAL, first, far)
    assert (within.outcome, beyond.outcome) == ("same", "worse")
    assert "difference of 3.0 points is smaller than the noise of 5.5 points" in within.sentence
    assert "worse by 20.0 points" in beyond.sentence
    assert compare(FRECHET, first, far).outcome == "better", "a smaller distance is better"


def test_the_best_is_better_than_all_others_beyond_the_noise() -> None:
    means = {value: mean_over_seeds([estimate(value)]) for value in (0.60, 0.63, 0.40)}
    assert find_best(RETRIEVAL, means) is None
    assert find_best(FRECHET, means) == 0.40
    assert find_best(RETRIEVAL, {value: means[value] for value in (0.40, 0.63)}) == 0.63
    assert find_best(RETRIEVAL, {0.60: means[0.60]}) is None
