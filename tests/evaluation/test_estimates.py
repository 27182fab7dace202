"""Standard errors and intervals against their formulas, and against published values."""

import numpy as np
import pytest

from ifvit.evaluation.metrics import estimate_around, estimate_mean, estimate_share


def test_standard_errors_are_those_of_a_mean_and_of_a_share() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert estimate_mean(values).standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    hits = np.arange(98) < 49
    assert estimate_share(hits).standard_error == pytest.approx(np.sqrt(0.25 / 98))
    assert estimate_share(np.ones(10, bool)).standard_error > 0.05


def test_the_interval_of_a_mean_comes_from_the_bootstrap() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    found = estimate_mean(values)
    assert found == estimate_mean(values)
    assert found.high - found.value == pytest.approx(1.96 * found.standard_error, rel=0.15)
    assert found.value - found.low == pytest.approx(1.96 * found.standard_error, rel=0.15)
    part = estimate_around(5.0, values, 1600)
    assert (part.value, part.num_samples) == (5.0, 1600)
    assert part.high - part.low == pytest.approx((found.high - found.low) / 2, rel=0.01)


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Newcombe 1998, Table I: 81 of 263 and 0 of 20.
    for count, total, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        found = estimate_share(np.arange(total) < count)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=1e-4),
            pytest.approx(high, abs=1e-4),
        )


def test_the_interval_of_a_share_stays_between_0_and_1() -> None:
    for count in range(1, 60):
        assert estimate_share(np.zeros(count, np.bool_)).low >= 0
        assert estimate_share(np.ones(count, np.bool_)).high <= 1
