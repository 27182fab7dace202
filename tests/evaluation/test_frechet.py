"""The Frechet distance against scipy's general matrix square root."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ifvit.evaluation import metrics as frechet
from ifvit.evaluation.metrics import (
    FeatureStatistics,
    RunningStatistics,
    estimate_frechet,
    frechet_distance,
    kid,
    statistics,
)

RNG = np.random.default_rng(0)
FIRST = RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12))
SECOND = RNG.normal(size=(300, 12)) @ RNG.normal(size=(12, 12)) + 1.0


def by_scipy(first: FeatureStatistics, second: FeatureStatistics) -> float:
    cross = sqrtm(first.covariance @ second.covariance)
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.covariance + second.covariance - 2 * cross.real))


def test_distance_is_that_of_the_general_square_root() -> None:
    first, second = statistics(FIRST), statistics(SECOND)
    expected = by_scipy(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_distance_and_kid_are_those_of_torch_fidelity() -> None:
    reason = "torch-fidelity, which needs torchvision, is not installed"
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason=reason, exc_type=ImportError)
    kid_metric = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    both = [torch.from_numpy(features) for features in (FIRST[:300], SECOND)]
    expected = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, both), False)
    found = frechet_distance(*(statistics(features.numpy()) for features in both))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    expected = kid_metric.kid_features_to_metric(*both, kid_subsets=1, kid_subset_size=300)
    found = kid(*(features.numpy() for features in both)).value
    assert found == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)


def test_distance_survives_fewer_samples_than_features() -> None:
    few, many = statistics(FIRST[:5]), statistics(SECOND)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    found = estimate_frechet(FIRST[:5], few, many)
    assert found.value == pytest.approx(by_scipy(few, many), rel=1e-5)
    assert 0 < found.standard_error < found.value


def test_equal_features_are_a_point() -> None:
    point, cloud = np.full((4, 12), 2.0), statistics(SECOND)
    expected = np.square(cloud.mean - 2.0).sum() + np.trace(cloud.covariance)
    found = estimate_frechet(point, statistics(point), cloud)
    assert (found.value, found.standard_error) == pytest.approx((expected, 0.0))


def test_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    shifted = statistics(FIRST + np.arange(12))
    assert frechet_distance(statistics(FIRST), shifted) == pytest.approx(506.0, rel=1e-9)


def test_batches_of_any_size_give_the_statistics_of_the_whole() -> None:
    running = RunningStatistics()
    for part in np.split(FIRST + 1e4, [1, 7, 200]):
        running.add(part.astype(np.float32))
    found = running.finish()
    whole = (FIRST + 1e4).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(found.mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(whole.T), rtol=1e-6, atol=1e-6)


def test_error_of_the_distance_is_what_other_samples_would_show() -> None:
    reference, rng = statistics(SECOND), np.random.default_rng(1)
    mixing = rng.normal(size=(12, 12))
    samples = rng.normal(size=(200, 400, 12)) @ mixing
    found = [estimate_frechet(part, statistics(part), reference) for part in samples]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    errors = [estimate.standard_error for estimate in found]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)
    centre = np.mean([estimate.value for estimate in found])
    covered = np.mean([estimate.low <= centre <= estimate.high for estimate in found])
    assert 0.9 <= covered <= 0.99


def test_error_of_the_distance_is_that_of_the_jackknife() -> None:
    for features in (FIRST, 0.02 * FIRST + 3.0):  # by the shape of the cloud, and by its place
        drawn, reference = statistics(features), statistics(SECOND)
        without_one = [
            frechet_distance(statistics(np.delete(features, row, axis=0)), reference)
            for row in range(0, len(features), 4)
        ]
        expected = np.std(without_one, ddof=1) * (len(features) - 1) / np.sqrt(len(features))
        part = features[::4]
        found = estimate_frechet(part, drawn, reference).standard_error
        assert found == pytest.approx(expected, rel=0.01)


def test_a_random_part_of_the_samples_gives_nearly_the_same_error() -> None:
    drawn, reference = statistics(FIRST), statistics(SECOND)
    whole, part = (estimate_frechet(rows, drawn, reference) for rows in (FIRST, FIRST[::2]))
    assert whole.value == part.value == frechet_distance(reference, drawn)
    assert part.num_samples == len(FIRST)
    assert part.standard_error == pytest.approx(whole.standard_error, rel=0.2)
    assert part.high - part.low == pytest.approx(whole.high - whole.low, rel=0.2)


def test_errors_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, reference = statistics(FIRST), statistics(SECOND)
    whole = estimate_frechet(FIRST, drawn, reference)
    monkeypatch.setattr(frechet, "_CHUNK", 64)
    assert estimate_frechet(FIRST, drawn, reference).high == pytest.approx(whole.high)
