"""Statistics of answers agree with the literature, with scipy, and with known truth."""

import math

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from ifvit.rating.agreement import agreement, estimate_columns, order_bias

NAN = np.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def test_alpha_equals_the_published_example() -> None:
    assert agreement(KRIPPENDORFF, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert agreement(KRIPPENDORFF, "interval") == pytest.approx(0.849, abs=5e-4)


@pytest.mark.parametrize(
    "values", [[[1.0, 2.0]], [[1.0, NAN], [NAN, 2.0]], [[3.0, 3.0], [3.0, 3.0]]]
)
def test_alpha_is_undefined_without_pairs_or_variation(values: list[list[float]]) -> None:
    assert agreement(np.array(values), "interval") is None


def sample_ranks(rng: np.random.Generator, number: int, places: int, pull: float) -> np.ndarray:
    """Sample ranks (number, places) of noisy scores that fall by `pull` from place to place."""
    scores = rng.normal(size=(number, places)) - pull * np.arange(places)
    return (-scores).argsort(axis=1).argsort(axis=1) + 1.0


def test_the_test_of_order_bias_is_friedmans() -> None:
    ranks = sample_ranks(np.random.default_rng(1), 150, 3, pull=0.5)
    statistic, p_value = friedmanchisquare(*ranks.T)
    found = order_bias(ranks)
    assert found.chi_square == pytest.approx(statistic)
    assert found.p_value == pytest.approx(p_value)
    assert found.p_value < 0.001
    assert found.mean_ranks == sorted(found.mean_ranks)
    assert sum(found.mean_ranks) == pytest.approx(6)


@pytest.mark.parametrize("places", [2, 4])
def test_order_bias_of_random_orders_is_found_in_five_per_cent(places: int) -> None:
    rng = np.random.default_rng(0)
    p = [order_bias(sample_ranks(rng, 60, places, pull=0)).p_value for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08


def test_standard_errors_contain_the_spread_of_raters_and_of_items() -> None:
    rng = np.random.default_rng(0)
    raters, items = rng.normal(size=30), 2 * rng.normal(size=40)
    values = np.repeat((raters[:, None] + items[None])[..., None], 2, axis=2)
    values[..., 1] = raters[:, None]
    both, raters_only = estimate_columns(values, ["both", "raters"]).values()
    assert both.value == pytest.approx(raters.mean() + items.mean())
    assert both.standard_error == pytest.approx(
        math.hypot(raters.std() / math.sqrt(30), items.std() / math.sqrt(40)), rel=0.1
    )
    assert raters_only.standard_error == pytest.approx(raters.std() / math.sqrt(30), rel=0.1)
    assert both.high - both.low == pytest.approx(3.92 * both.standard_error, rel=0.1)
    assert both.num_samples == 1200


def test_missing_answers_are_left_out() -> None:
    values = np.full((2, 3, 2), NAN)
    values[0, :, 0] = [1, 2, 6]
    found = estimate_columns(values, ["first", "second"])
    assert (found["first"].value, found["first"].num_samples) == (3, 3)
    assert "second" not in found


def test_a_share_of_equal_answers_has_wilsons_interval() -> None:
    always = estimate_columns(np.ones((2, 5, 1)), ["always"], is_share=True)["always"]
    assert (always.value, always.high) == pytest.approx((1, 1))
    assert always.low == pytest.approx(0.5655, abs=1e-4)  # Wilson's for 5 of 5
    assert always.num_samples == 10
