"""Frechet distance between two sets of features (Heusel et al. 2017), for any feature network.

F is the feature width.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifvit.evaluation.metrics import Estimate
from ifvit.images import Pixels, to_model_range

Floats = NDArray[np.float64]
Features = NDArray[np.floating]

FeatureNetwork = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] => features (B, F)."""

_NUM_RESAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F) of `num_samples` features."""

    num_samples: int
    mean: Floats
    covariance: Floats

    @property
    def sha256(self) -> str:
        """Hash of count, mean and covariance, rounded so that the last bits do not matter."""
        digest = hashlib.sha256(str(self.num_samples).encode())
        for array in (self.mean, self.covariance):
            digest.update(np.round(array, 6).astype(np.float32).tobytes())
        return digest.hexdigest()


class RunningStatistics:
    """Accumulates features batch by batch in float64; holds one (F, F) matrix, no samples."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Floats = np.zeros(1)
        self._scatter: Floats = np.zeros((1, 1))

    def add(self, features: Features) -> None:
        """Merge a batch (B, F) by the pairwise update of Chan et al. 1979 (no cancellation)."""
        batch = features.astype(np.float64)
        total = self._count + len(batch)
        centred = batch - batch.mean(axis=0)
        shift = batch.mean(axis=0) - self._mean
        between = np.outer(shift, shift) * (self._count * len(batch) / total)
        self._scatter = self._scatter + centred.T @ centred + between
        self._mean = self._mean + shift * (len(batch) / total)
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


@torch.no_grad()
def extract(network: FeatureNetwork, batches: Iterable[Pixels], device: str) -> Iterator[Features]:
    """Features float32 (B, F) of each batch uint8 (B, H, W, 3)."""
    for pixels in batches:
        yield network(to_model_range(pixels).to(device)).float().cpu().numpy()


def estimate_frechet(features: Features, reference: FeatureStatistics) -> Estimate:
    """Distance of features (N, F) from the reference, its error by 20 bootstrap resamples of N."""
    rng = np.random.default_rng(0)
    resampled = [
        frechet_distance(
            reference, statistics(features[rng.integers(len(features), size=len(features))])
        )
        for _ in range(_NUM_RESAMPLES)
    ]
    return Estimate(
        value=frechet_distance(reference, statistics(features)),
        standard_error=float(np.std(resampled, ddof=1)),
        num_samples=len(features),
    )


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), never negative.

    tr (S1 S2)^(1/2) is the sum of square roots of the eigenvalues of the symmetric
    S1^(1/2) S2 S1^(1/2), which stays real where a general matrix square root does not.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ second.covariance @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    shift = first.mean - second.mean
    trace = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(shift @ shift + trace - 2 * cross))
