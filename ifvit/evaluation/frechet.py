"""Frechet distance between two sets of features (Heusel et al. 2017), for any feature network.

F is the feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ifvit.evaluation.metrics import Estimate, estimate_around

Floats = NDArray[np.float64]
Features = NDArray[np.floating]

FeatureNetwork = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] => features (B, F)."""

_CHUNK = 4096
"""Samples that are held in float64 at a time."""
_NEGLIGIBLE = 1e-12
"""Eigenvalues below this share of the largest are rounding: directions without any sample."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F) of `num_samples` features."""

    num_samples: int
    mean: Floats
    covariance: Floats


class RunningStatistics:
    """Accumulates features batch by batch in float64; holds one (F, F) matrix, no samples."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Floats = np.zeros(1)
        self._scatter: Floats = np.zeros((1, 1))

    def add(self, features: Features) -> None:
        """Add a batch (B, F)."""
        batch = features.astype(np.float64)
        mean = batch.mean(axis=0)
        centred = batch - mean
        self._merge(len(batch), mean, centred.T @ centred)

    def merge(self, other: "RunningStatistics") -> None:
        """Add all that `other` has added."""
        self._merge(other._count, other._mean, other._scatter)

    def _merge(self, count: int, mean: Floats, scatter: Floats) -> None:
        """The pairwise update of Chan et al. 1979 (no cancellation)."""
        total = self._count + count
        if self._count == 0:
            self._mean, self._scatter = mean, scatter.copy()
        else:
            shift = mean - self._mean
            # In place: for the 2048 features of Inception this matrix is 34 MB.
            self._scatter += scatter
            self._scatter += np.outer(shift, shift) * (self._count * count / total)
            self._mean = self._mean + shift * (count / total)
        self._count = total

    def finish(self) -> FeatureStatistics:
        """The statistics of all that was added; at least two samples."""
        assert self._count > 1, "a covariance needs two samples"
        covariance = self._scatter / (self._count - 1)
        return FeatureStatistics(num_samples=self._count, mean=self._mean, covariance=covariance)


def statistics(features: Features) -> FeatureStatistics:
    """Statistics of features (N, F) that fit into memory."""
    running = RunningStatistics()
    running.add(features)
    return running.finish()


def estimate_frechet(
    features: Features, drawn: FeatureStatistics, reference: FeatureStatistics
) -> Estimate:
    """Distance of `drawn` from the reference, and how far other samples would move it.

    `features` (n, F) are all samples behind `drawn`, or a random part of them. The reference
    counts as fixed. The first-order change of the distance by a sample with d = x - m is
    2 (m - m_r).d + d.(1 - A) d, where A = R (R S R)^(-1/2) R and R = S_r^(1/2).
    """
    eigenvalues, rotated = _cross(reference, drawn)
    kept = eigenvalues > _NEGLIGIBLE * eigenvalues.max()
    factor = rotated[:, kept] / eigenvalues[kept] ** 0.25  # A = factor factor^T
    shift = drawn.mean - reference.mean
    influences = np.empty(len(features))
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        centred = features[rows].astype(np.float64) - drawn.mean
        quadratic = np.square(centred).sum(axis=1) - np.square(centred @ factor).sum(axis=1)
        influences[rows] = 2 * centred @ shift + quadratic
    return estimate_around(_distance(reference, drawn, eigenvalues), influences, drawn.num_samples)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), never negative."""
    return _distance(first, second, _cross(first, second)[0])


def _distance(first: FeatureStatistics, second: FeatureStatistics, eigenvalues: Floats) -> float:
    shift = first.mean - second.mean
    trace = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(shift @ shift + trace - 2 * np.sqrt(eigenvalues).sum()))


def _cross(first: FeatureStatistics, second: FeatureStatistics) -> tuple[Floats, Floats]:
    """Eigenvalues (F,) of R S2 R, none negative, and R times its eigenvectors; R = S1^(1/2).

    tr (S1 S2)^(1/2) is the sum of the square roots of these eigenvalues, which stay real where a
    general matrix square root does not.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    eigenvalues, basis = np.linalg.eigh(root @ second.covariance @ root)
    return np.clip(eigenvalues, 0, None), root @ basis
