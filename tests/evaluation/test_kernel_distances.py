"""KID and CMMD against other implementations and against what other samples would give."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from ifvit.evaluation import metrics as kernel_distances
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.metrics import cmmd, kid

RNG = np.random.default_rng(0)
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
    drawn, real = normal(90, 0.3), normal(90)
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=90)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(drawn), real=False)
    expected, _ = metric.compute()
    assert kid(drawn, real).value == pytest.approx(float(expected), rel=1e-5)


def test_kid_of_subsets_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_distances, "KID_SUBSET", 40)
    drawn, real = normal(130, 0.3), normal(95)
    found = kid(drawn, real)
    parts = [kid(drawn[start : start + 40], real[start : start + 40]) for start in (0, 40)]
    assert found.value == pytest.approx(np.mean([part.value for part in parts]))
    assert found.num_samples == 80
    assert kid(drawn, real[:30]) == kid(drawn[:30], real[:30])
    monkeypatch.setattr(kernel_distances, "KID_SUBSETS", 1)
    assert kid(drawn, real) == kid(drawn[:40], real[:40])


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    real = normal(300)
    found = [kid(normal(100), real[:100]).value for _ in range(60)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(60) + 0.01


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_cmmd_is_the_published_formula(spread: float) -> None:
    """Of features that lie close together, too, whose kernels are all nearly 1."""
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
    monkeypatch.setattr(kernel_distances, "_CHUNK", 16)
    parts = cmmd(x, y, "cpu")
    assert parts.value == pytest.approx(whole.value, rel=1e-6)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-6)


@pytest.mark.parametrize("measure", [kid, lambda x, y: cmmd(x, y, "cpu")], ids=["kid", "cmmd"])
def test_errors_are_those_of_the_jackknife(measure: Callable[..., Estimate]) -> None:
    drawn, real = 3 * on_sphere(80, 0.5), 3 * on_sphere(80)
    without_one = [measure(np.delete(drawn, row, axis=0), real).value for row in range(80)]
    expected = np.std(without_one, ddof=1) * 79 / np.sqrt(80)
    assert measure(drawn, real).standard_error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("distance", ["kid", "cmmd"])
def test_errors_are_what_other_samples_would_show(distance: str) -> None:
    real = on_sphere(200)
    measure = kid if distance == "kid" else lambda x, y: cmmd(x, y, "cpu")
    found = [measure(on_sphere(150, 0.5), real[:150]) for _ in range(150)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([e.standard_error for e in found]) == pytest.approx(spread, rel=0.25)
    centre = np.mean([estimate.value for estimate in found])
    assert 0.88 <= np.mean([e.low <= centre <= e.high for e in found]) <= 1.0
