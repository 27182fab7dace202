"""The paired rule: intervals cover, Holm controls the family, pairing gains what it should."""

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from ifvit.studies.statistics import (
    ALPHA,
    PairedDifference,
    decide,
    error_over_captions,
    holm,
    more_seeds,
    pair_by_seed,
)

# Differences in hours of sleep under two drugs, ten patients: Student 1908, R's data set `sleep`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def pair(first: list[float], second: list[float], **more: float) -> PairedDifference:
    found = pair_by_seed(dict(enumerate(first)), dict(enumerate(second)), **more)
    assert found is not None
    return found


def made(mean: float, deviation: float, count: int) -> PairedDifference:
    """Return differences with this mean and this standard deviation exactly."""
    values = np.arange(count, dtype=float)
    values = (values - values.mean()) / values.std(ddof=1) * deviation + mean
    return pair([0.0] * count, values.tolist())


def test_the_paired_t_test_agrees_with_r() -> None:
    # t.test(extra ~ group, data = sleep, paired = TRUE): t = 4.0621, df = 9, p-value = 0.002833,
    # mean difference 1.58, 95 % interval 0.7001142 to 2.4598858.
    found = pair(SLEEP_1, SLEEP_2)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert found.seed_error is not None
    assert found.mean / found.seed_error == pytest.approx(4.0621, abs=5e-5)
    assert (found.first, found.second) == pytest.approx((0.75, 2.33))


def test_only_shared_seeds_count_in_any_order() -> None:
    first, second = {3: 1.0, 1: 2.0, 2: 4.0, 9: 99.0}, {2: 5.0, 3: 1.5, 1: 4.0, 7: -99.0}
    found = pair_by_seed(first, second)
    assert found == pair_by_seed(dict(reversed(list(first.items()))), dict(sorted(second.items())))
    assert found is not None
    assert (found.seeds, found.values) == ((1, 2, 3), (2.0, 1.0, 0.5))
    assert pair_by_seed({1: 1.0}, {2: 1.0}) is None


def test_swapped_arms_change_only_the_sign() -> None:
    one, other = pair(SLEEP_1, SLEEP_2), pair(SLEEP_2, SLEEP_1)
    assert other.values == tuple(-value for value in one.values)
    assert one.low is not None
    assert one.high is not None
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), rel=1e-12)
    for name in ("p_value", "seed_error", "correlation", "variance_ratio"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)
    outcomes = [decide(d.mean, 0.01, lower_is_better=True) for d in (one, other)]
    assert outcomes == ["worse", "better"]


def test_one_seed_has_an_interval_over_captions_and_no_p_value() -> None:
    found = pair([0.4], [0.6], caption_error=0.05)
    assert (found.seed_error, found.p_value, found.correlation) == (None, None, None)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.0979982, 0.2 + 0.0979982))
    assert decide(found.mean, found.p_value, lower_is_better=False) == "open"
    assert pair([0.4], [0.6]).low is None


def test_differences_that_agree_exactly_decide_nothing() -> None:
    found = pair([0.1, 0.2], [0.2, 0.3])
    assert found.values[0] != found.values[1], "they agree up to rounding"
    assert found.p_value is None
    assert more_seeds(found, 1) is None
    assert pair([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]).p_value is None


def test_the_interval_covers_the_true_difference_in_95_percent_of_studies() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shared = draw.normal(0, 2.0, 5)  # noise of a seed that both arms see
        first, second = shared + draw.normal(0, 1, 5), shared + draw.normal(0.7, 1, 5)
        found = pair(first.tolist(), second.tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_holm_agrees_with_published_examples() -> None:
    # Five evenly spaced values and the result of R's p.adjust by the method "holm".
    found = holm([0.01, 0.02, 0.03, 0.04, 0.05])
    assert found == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    # Four hypotheses whose steps are written out in Wikipedia's article on the method: at 0.05,
    # the first and the last are rejected.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([None, 0.03]) == [None, 0.03]
    assert holm([]) == []


def test_holm_is_wrong_in_five_percent_of_studies_without_differences() -> None:
    draw = np.random.default_rng(1)
    first = draw.normal(size=(2000, 1, 8))  # all six comparisons of a study share the first arm
    studies = ttest_rel(first + draw.normal(size=(2000, 6, 8)), first, axis=2).pvalue.tolist()
    adjusted = [[p for p in holm(family) if p is not None] for family in studies]
    assert np.mean([min(family) < ALPHA for family in adjusted]) < ALPHA + 0.015
    assert np.mean([min(family) < ALPHA for family in studies]) > 3 * ALPHA, "the test can fail"


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_pairing_gains_one_minus_the_correlation(rho: float) -> None:
    covariance = [[1.0, rho], [rho, 1.0]]
    first, second = np.random.default_rng(2).multivariate_normal([0, 3], covariance, 20_000).T
    found = pair(first.tolist(), second.tolist())
    assert found.correlation == pytest.approx(rho, abs=0.02)
    assert found.variance_ratio == pytest.approx(1 - rho, abs=0.03)


def test_the_gain_of_pairing_needs_three_seeds_that_vary() -> None:
    assert pair([1.0, 2.0], [1.5, 3.0]).variance_ratio is None
    assert pair([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]).variance_ratio is None
    constant = pair([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    assert (constant.correlation, constant.variance_ratio) == (None, pytest.approx(1.0))


def test_the_error_over_captions_is_that_of_paired_captions() -> None:
    draw = np.random.default_rng(3)
    caption, noise = draw.normal(0, 5, 400), draw.normal(0, 1, (2, 4, 400))
    first, second = caption + noise[0], caption + 0.5 + noise[1]
    found = error_over_captions(first, second)
    # The difficulty of a caption cancels; the noise of 2 arms is averaged over 4 seeds.
    assert found == pytest.approx(math.sqrt(2 / 4 / 400), rel=0.1)
    assert error_over_captions(second, first) == pytest.approx(found, rel=1e-12)
    assert error_over_captions(first[::-1], second[::-1]) == pytest.approx(found, rel=1e-12)
    assert error_over_captions(first[:, :1], second[:, :1]) is None


@pytest.mark.parametrize(
    ("effect", "total"),
    # Pairs for 80 % power at a two-sided 0.05, by effect size: G*Power and R's pwr.t.test.
    [(0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10)],
)
def test_more_seeds_agree_with_published_sample_sizes(effect: float, total: int) -> None:
    assert more_seeds(made(effect, 1.0, 2), 1) == total - 2
    assert more_seeds(made(-effect, 1.0, 5), 1) == total - 5


@pytest.mark.parametrize(("gap", "normal"), [(1.0, 27), (2.0, 7), (3.0, 3)])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_more_seeds_agree_with_the_noise_of_fid(gap: float, normal: int, rho: float) -> None:
    # A coefficient of variation of 1.3 % (arXiv 2606.20536): seeds per arm by the normal
    # approximation; Student's t needs about two more. Pairing multiplies them by 1 - rho.
    found = more_seeds(made(gap, 1.3 * math.sqrt(2 * (1 - rho)), 2), 1)
    assert found is not None
    assert found + 2 == pytest.approx(normal * (1 - rho) + 2.5, abs=1)


def test_more_comparisons_need_more_seeds_and_hopeless_ones_have_none() -> None:
    alone, among_ten = (more_seeds(made(0.5, 1.0, 4), count) for count in (1, 10))
    assert alone is not None
    assert among_ten is not None
    assert alone < among_ten
    assert more_seeds(made(0.01, 1.0, 4), 1) is None
    assert more_seeds(made(0.0, 1.0, 4), 1) is None


def test_more_seeds_decide_a_comparison_in_80_percent_of_studies() -> None:
    needed = more_seeds(made(1.0, 1.0, 3), 2)
    assert needed is not None
    values = np.random.default_rng(4).normal(1.0, 1.0, (2000, 3 + needed))
    t = values.mean(axis=1) / values.std(axis=1, ddof=1) * math.sqrt(3 + needed)
    share = (t > student.ppf(1 - ALPHA / 2 / 2, 2 + needed)).mean()
    assert 0.78 < share < 0.9
