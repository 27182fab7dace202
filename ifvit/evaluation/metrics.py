"""Metrics of generated images from features, and the uncertainty of any metric.

Fréchet distance, KID, CMMD, CLIP Score and retrieval. Importing this module does not import torch.
Shapes: N, n, m images, F features, E CLIP features, B batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ifvit.records import NonNegativeFloat, PositiveInt, record

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Features = NDArray[np.floating]

_CHUNK = 4096
"""Samples held in float64 at a time."""
_NEGLIGIBLE = 1e-12
"""Eigenvalues below this share of the largest are rounding errors: no sample varies there."""

KID_SUBSET = 1000
"""Features in a subset."""
KID_SUBSETS = 10
"""Subsets at most."""
_CMMD_SCALE = 1000.0
_CMMD_BANDWIDTH = 10.0
_CMMD_CHUNK = 512
"""Rows of the CMMD kernel at a time: 512 x 30,000 float32 are 61 MB."""

_PAPER_SCALE = 2.5
NUM_CAPTIONS = 16
"""Captions that compete for an image in retrieval, the right one included."""
_RETRIEVAL_SEED = 0

_NUM_RESAMPLES = 1000
_RESAMPLING_SEED = 0

LOWER_IS_BETTER = frozenset(
    {"frechet_distance", "fid", "kid", "cmmd", "held_out_loss", "average_error", "empty_share"}
)
"""Metrics that fall as images get better; all others rise."""


@record
class Estimate:
    """A number, and how much it would vary with other samples of the same model.

    `low` and `high` bound its 95 % interval: Wilson's interval for a share of samples, percentiles
    of a bootstrap over the samples for everything else.
    """

    value: float
    standard_error: NonNegativeFloat
    num_samples: PositiveInt
    low: float
    high: float


def estimate_mean(values: NDArray[np.floating]) -> Estimate:
    """Mean of values (N,), N > 1, with its standard error s / sqrt(N)."""
    return estimate_around(float(values.mean()), values)


def estimate_around(
    value: float, influences: NDArray[np.floating], num_samples: int | None = None
) -> Estimate:
    """Uncertainty of a number from the influence of each sample on it.

    `influences` (n,), n > 1, are the first-order changes of `value` by each sample (its influence
    function, up to a constant). They belong to all samples or to a random n of `num_samples`.
    The interval comes from the bootstrap of `value`, linearised: resampling the influences needs
    no new distance, and repeated samples do not bias the result.
    """
    total = num_samples or len(influences)
    means = _bootstrap_means(influences - influences.mean()) * math.sqrt(len(influences) / total)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(
        value=value,
        standard_error=float(influences.std(ddof=1)) / math.sqrt(total),
        num_samples=total,
        low=value + float(low),
        high=value + float(high),
    )


def estimate_share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of True among hits (N,), with the binomial standard error and Wilson's interval.

    The standard error uses (k + 1) / (N + 2) (Laplace), so that 0 % or 100 % of a few samples does
    not look certain.
    """
    from scipy.stats import binomtest  # takes 0.7 s, which readers of rows save

    count, num_hits = len(hits), int(hits.sum())
    smoothed = (num_hits + 1) / (count + 2)
    interval = binomtest(num_hits, count).proportion_ci(method="wilson")
    return Estimate(
        value=float(hits.mean()),
        standard_error=math.sqrt(smoothed * (1 - smoothed) / count),
        num_samples=count,
        low=float(interval.low),
        high=float(interval.high),
    )


def _bootstrap_means(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means (1000,) of N draws with replacement from values (N,), always by the same seed."""
    rng = np.random.default_rng(_RESAMPLING_SEED)
    # About a million draws at a time, so that 30,000 samples need no more memory than 100.
    chunk = max(1, 1_000_000 // len(values))
    sizes = [min(chunk, _NUM_RESAMPLES - done) for done in range(0, _NUM_RESAMPLES, chunk)]
    draws = (rng.integers(len(values), size=(size, len(values))) for size in sizes)
    return np.concatenate([values[drawn].mean(axis=1, dtype=np.float64) for drawn in draws])


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean m (F,) and scatter, the sum of (x - m)(x - m)^T, (F, F) of `num_samples` features x."""

    num_samples: int
    mean: Floats
    scatter: Floats

    @classmethod
    def of(cls, features: Features) -> "FeatureStatistics":
        """Statistics of a batch (B, F)."""
        batch = features.astype(np.float64)
        mean = batch.mean(axis=0)
        centred = batch - mean
        return cls(num_samples=len(batch), mean=mean, scatter=centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The pairwise update of Chan et al. 1979, which avoids cancellation."""
        total = self.num_samples + other.num_samples
        shift = other.mean - self.mean
        scatter = np.outer(shift, shift) * (self.num_samples * other.num_samples / total)
        # In place: for the 2048 features of Inception this matrix is 34 MB.
        scatter += self.scatter
        scatter += other.scatter
        mean = self.mean + shift * (other.num_samples / total)
        return FeatureStatistics(num_samples=total, mean=mean, scatter=scatter)

    @property
    def covariance(self) -> Floats:
        """Unbiased covariance (F, F) of two samples or more."""
        return self.scatter / (self.num_samples - 1)


def estimate_frechet(
    features: Features, sampled: FeatureStatistics, reference: FeatureStatistics
) -> Estimate:
    """Fréchet distance between samples and a fixed reference (Heusel et al. 2017, eq. 6).

    |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)), never negative, with its uncertainty.
    `features` (n, F) are all samples behind `sampled`, or a random part of them. A sample with
    d = x - m changes the distance, to first order, by 2 (m - m_r).d + d.(1 - A) d, where
    A = R (R S R)^(-1/2) R and R = S_r^(1/2).
    """
    eigenvalues, rotated = _decompose_product(reference, sampled)
    kept = eigenvalues > _NEGLIGIBLE * eigenvalues.max()
    factor = rotated[:, kept] / eigenvalues[kept] ** 0.25  # A = factor factor^T
    shift = sampled.mean - reference.mean
    influences = np.empty(len(features))
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        centred = features[rows].astype(np.float64) - sampled.mean
        quadratic = np.square(centred).sum(axis=1) - np.square(centred @ factor).sum(axis=1)
        influences[rows] = 2 * centred @ shift + quadratic
    trace = np.trace(sampled.covariance) + np.trace(reference.covariance)
    distance = float(shift @ shift + trace - 2 * np.sqrt(eigenvalues).sum())
    return estimate_around(max(0.0, distance), influences, sampled.num_samples)


def _decompose_product(
    first: FeatureStatistics, second: FeatureStatistics
) -> tuple[Floats, Floats]:
    """Eigenvalues (F,) of R S2 R, none negative, and R times its eigenvectors; R = S1^(1/2).

    The sum of the square roots of the eigenvalues is tr (S1 S2)^(1/2). R S2 R is symmetric, so its
    eigenvalues are real; rounding can make those of the product S1 S2 complex.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    eigenvalues, basis = np.linalg.eigh(root @ second.covariance @ root)
    return np.clip(eigenvalues, 0, None), root @ basis


def kid(sampled: Features, reference: Features) -> Estimate:
    """Kernel Inception distance (Binkowski et al. 2018): unbiased, kernel (x.y / F + 1)^3.

    Features (n, F) and (m, F) in random order. The result is the mean over up to 10 disjoint
    subsets of 1000 features. With fewer than 1000 features, one smaller subset is used.
    """
    size = min(KID_SUBSET, len(sampled), len(reference))
    count = min(KID_SUBSETS, len(sampled) // size, len(reference) // size)
    values, influences = [], []
    for start in range(0, count * size, size):
        x, y = sampled[start : start + size], reference[start : start + size]
        within, across = _mean_of_others(_cubic(x, x)), _cubic(x, y).mean(axis=1)
        values.append(within.mean() - 2 * across.mean() + _mean_of_others(_cubic(y, y)).mean())
        influences.append(2 * (within - across))
    return estimate_around(float(np.mean(values)), np.concatenate(influences))


def _cubic(x: Features, y: Features) -> Floats:
    """Kernel (n, m) of features (n, F) and (m, F)."""
    product = x.astype(np.float64) @ y.astype(np.float64).T
    kernel: Floats = (product / x.shape[1] + 1) ** 3
    return kernel


def _mean_of_others(kernel: Floats) -> Floats:
    """Means (n,) of the rows of a kernel (n, n) without its diagonal."""
    means: Floats = (kernel.sum(axis=1) - np.diag(kernel)) / (len(kernel) - 1)
    return means


def cmmd(sampled: Features, reference: Features, device: str) -> Estimate:
    """CMMD (Jayasumana et al. 2024): 1000 times the MMD of unit CLIP features, Gaussian kernel.

    Features (n, E) and (m, E), bandwidth 10. As in the published code, the pairs of a feature with
    itself count, so the result is never negative. The kernel is computed block by block.
    """
    import torch

    x, y = (torch.from_numpy(features).to(device) for features in (sampled, reference))
    within, across, fixed = _gaussian_means(x, x), _gaussian_means(x, y), _gaussian_means(y, y)
    value = within.mean() - 2 * across.mean() + fixed.mean()
    return estimate_around(_CMMD_SCALE * float(value), _CMMD_SCALE * 2 * (within - across))


def _gaussian_means(x: "Tensor", y: "Tensor") -> Floats:
    """Means (n,) over y of exp(-|x - y|^2 / 2 s^2) - 1, for x (n, E) and y (m, E).

    The -1 cancels in the distance. It keeps the digits of kernel values that are all nearly 1.
    """
    import torch

    squares_x, squares_y = x.square().sum(dim=1), y.square().sum(dim=1)
    means = []
    for start in range(0, len(x), _CMMD_CHUNK):
        rows = slice(start, start + _CMMD_CHUNK)
        distances = torch.addmm(squares_y[None], x[rows], y.T, alpha=-2)
        distances += squares_x[rows, None]
        kernel = distances.mul_(-0.5 / _CMMD_BANDWIDTH**2).expm1_()
        means.append(kernel.mean(dim=1, dtype=torch.float64).cpu().numpy())
    return np.concatenate(means)


def clip_score_paper(image_features: Features, prefixed_text_features: Features) -> Estimate:
    """Mean of 2.5 max(cos, 0) (Hessel et al. 2021), captions embedded after the paper's prefix."""
    values = cosines(image_features, prefixed_text_features)
    return estimate_mean(_PAPER_SCALE * np.maximum(values, 0.0))


def cosines(image_features: Features, text_features: Features) -> Floats:
    """Raw cosines (N,) of image i and caption i, unit features (N, E) each."""
    product: Floats = (image_features.astype(np.float64) * text_features).sum(axis=1)
    return product


def retrieval_accuracy(
    image_features: Features, text_features: Features, captions: Sequence[str]
) -> Estimate | None:
    """Share of images (N, E) closer to their own caption (N, E) than to 15 other captions.

    The 15 are captions of other samples, all different from each other and from the right one,
    chosen by a fixed seed, so that all checkpoints face the same choices. Chance is 1 / 16; a tie
    counts as a miss. The result is None if there are fewer than 16 different captions.
    """
    _, distinct, kind = np.unique(np.asarray(captions), return_index=True, return_inverse=True)
    if len(distinct) < NUM_CAPTIONS:
        return None
    rng = np.random.default_rng(_RETRIEVAL_SEED)
    hits = np.empty(len(captions), dtype=np.bool_)
    for sample, image in enumerate(image_features):
        # Skip the number of the right caption: chosen numbers from it on move up by one.
        chosen = rng.choice(len(distinct) - 1, NUM_CAPTIONS - 1, replace=False)
        distractors = distinct[chosen + (chosen >= kind[sample])]
        hits[sample] = image @ text_features[sample] > (text_features[distractors] @ image).max()
    return estimate_share(hits)
