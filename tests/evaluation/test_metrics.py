"""Metrics against independent implementations, and their errors against other samples."""

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
import torch
from made_statistics import frechet_distance, statistics
from scipy.linalg import sqrtm
from torchmetrics.image.kid import KernelInceptionDistance

from ifvit.evaluation import metrics
from ifvit.evaluation.metrics import (
    Estimate,
    FeatureStatistics,
    clip_score_paper,
    cmmd,
    estimate_frechet,
    kid,
    retrieval_accuracy,
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


def test_batches_of_any_size_give_the_statistics_of_the_whole() -> None:
    parts = np.split((FIRST + 1e4).astype(np.float32), [1, 7, 200])
    found = reduce(FeatureStatistics.merge, map(statistics, parts))
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
        sampled, reference = statistics(features), statistics(SECOND)
        without_one = [
            frechet_distance(statistics(np.delete(features, row, axis=0)), reference)
            for row in range(0, len(features), 4)
        ]
        expected = np.std(without_one, ddof=1) * (len(features) - 1) / np.sqrt(len(features))
        part = features[::4]
        found = estimate_frechet(part, sampled, reference).standard_error
        assert found == pytest.approx(expected, rel=0.01)


def test_a_random_part_of_the_samples_gives_nearly_the_same_error() -> None:
    sampled, reference = statistics(FIRST), statistics(SECOND)
    whole, part = (estimate_frechet(rows, sampled, reference) for rows in (FIRST, FIRST[::2]))
    assert whole.value == part.value == frechet_distance(sampled, reference)
    assert part.num_samples == len(FIRST)
    assert part.standard_error == pytest.approx(whole.standard_error, rel=0.2)
    assert part.high - part.low == pytest.approx(whole.high - whole.low, rel=0.2)


def test_errors_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled, reference = statistics(FIRST), statistics(SECOND)
    whole = estimate_frechet(FIRST, sampled, reference)
    monkeypatch.setattr(metrics, "_CHUNK", 64)
    assert estimate_frechet(FIRST, sampled, reference).high == pytest.approx(whole.high)


WIDTH = 16


def normal(count: int, shift: float = 0.0) -> np.ndarray:
    return (RNG.normal(size=(count, WIDTH)) + shift).astype(np.float32)


def on_sphere(count: int, shift: float = 0.0) -> np.ndarray:
    features = normal(count, shift)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


class Given(torch.nn.Module):
    """Takes features for images, so that torchmetrics computes with the same ones."""

    num_features = WIDTH

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_kid_is_that_of_torchmetrics() -> None:
    sampled, real = normal(90, 0.3), normal(90)
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=90)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(sampled), real=False)
    expected, _ = metric.compute()
    assert kid(sampled, real).value == pytest.approx(float(expected), rel=1e-5)


def test_kid_of_subsets_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KID_SUBSET", 40)
    sampled, real = normal(130, 0.3), normal(95)
    found = kid(sampled, real)
    parts = [kid(sampled[start : start + 40], real[start : start + 40]) for start in (0, 40)]
    assert found.value == pytest.approx(np.mean([part.value for part in parts]))
    assert found.num_samples == 80
    assert kid(sampled, real[:30]) == kid(sampled[:30], real[:30])
    monkeypatch.setattr(metrics, "KID_SUBSETS", 1)
    assert kid(sampled, real) == kid(sampled[:40], real[:40])


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    real = normal(300)
    found = [kid(normal(100), real[:100]).value for _ in range(60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(60) + 0.01


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_cmmd_is_the_published_formula(spread: float) -> None:
    """A small spread makes all kernel values nearly 1, where rounding would matter most."""
    x, y = on_sphere(70, 0.5) * spread, normal(50) * spread

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        squares = np.square(a[:, None].astype(np.float64) - b[None]).sum(axis=2)
        return float(np.exp(-squares / (2 * 10**2)).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(x, y, "cpu").value == pytest.approx(expected, rel=1e-4)
    assert cmmd(x, x, "cpu").value == pytest.approx(0, abs=1e-6)


def test_cmmd_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = on_sphere(70, 0.5), on_sphere(50)
    whole = cmmd(x, y, "cpu")
    monkeypatch.setattr(metrics, "_CMMD_CHUNK", 16)
    parts = cmmd(x, y, "cpu")
    assert parts.value == pytest.approx(whole.value, rel=1e-6)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-6)


@pytest.mark.parametrize("measure", [kid, lambda x, y: cmmd(x, y, "cpu")], ids=["kid", "cmmd"])
def test_errors_are_those_of_the_jackknife(measure: Callable[..., Estimate]) -> None:
    sampled, real = 3 * on_sphere(80, 0.5), 3 * on_sphere(80)
    without_one = [measure(np.delete(sampled, row, axis=0), real).value for row in range(80)]
    expected = np.std(without_one, ddof=1) * 79 / np.sqrt(80)
    assert measure(sampled, real).standard_error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("distance", ["kid", "cmmd"])
def test_errors_are_what_other_samples_would_show(distance: str) -> None:
    real = on_sphere(200)
    measure = kid if distance == "kid" else lambda x, y: cmmd(x, y, "cpu")
    found = [measure(on_sphere(150, 0.5), real[:150]) for _ in range(150)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([e.standard_error for e in found]) == pytest.approx(spread, rel=0.25)
    centre = np.mean([estimate.value for estimate in found])
    assert 0.88 <= np.mean([e.low <= centre <= e.high for e in found]) <= 1.0


CAPTIONS = [f"caption {index % 40}" for index in range(200)]
DIRECTIONS = np.linalg.qr(RNG.normal(size=(64, 64)))[0].astype(np.float32)
TEXTS = DIRECTIONS[np.arange(200) % 40]


def test_the_papers_clip_score_clips_and_scales_the_cosine() -> None:
    texts = np.array([[1.0, 0.0], [1.0, 0.0]])
    images = np.array([[0.6, 0.8], [-0.6, 0.8]])
    assert metrics.cosines(images, texts) == pytest.approx([0.6, -0.6])
    assert clip_score_paper(images, texts).value == pytest.approx(2.5 * 0.6 / 2)


def retrieve(images: np.ndarray, texts: np.ndarray, captions: list[str]) -> Estimate:
    found = retrieval_accuracy(images, texts, captions)
    assert found is not None
    assert found == retrieval_accuracy(images, texts, captions)
    return found


def test_retrieval_finds_images_that_equal_their_caption_and_counts_a_tie_as_a_miss() -> None:
    found = retrieve(TEXTS, TEXTS, CAPTIONS)
    assert found.value == 1.0
    assert found.standard_error > 0
    assert retrieve(np.zeros_like(TEXTS), TEXTS, CAPTIONS).value == 0
    # Each image equals caption k + 1: it loses when k + 1 is drawn, else all tie at 0: a miss too.
    assert retrieve(DIRECTIONS[(np.arange(200) + 1) % 40], TEXTS, CAPTIONS).value < 0.2


def test_random_images_are_retrieved_by_chance() -> None:
    images = RNG.normal(size=(2000, 64)).astype(np.float32)
    found = retrieve(images, np.tile(TEXTS, (10, 1)), 10 * CAPTIONS)
    assert found.value == pytest.approx(1 / 16, abs=4 * found.standard_error)


def test_fifteen_other_captions_are_drawn_each_at_most_once() -> None:
    # One of 16 others is better than the right one, so 15 draws leave it out once in 16 times.
    kind = np.arange(1700) % 17
    basis = np.eye(17, dtype=np.float32)
    images = basis[kind] + 2 * basis[(kind + 1) % 17]
    found = retrieve(images, basis[kind], [str(number) for number in kind])
    assert found.value == pytest.approx(1 / 16, abs=4 * found.standard_error)


def test_retrieval_needs_15_captions_besides_the_right_one() -> None:
    assert retrieve(TEXTS[:16], TEXTS[:16], CAPTIONS[:16]).value == 1.0
    assert retrieval_accuracy(TEXTS[:15], TEXTS[:15], CAPTIONS[:15]) is None
