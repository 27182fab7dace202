"""Metrics of generated images: Frechet distance, KID, CMMD, CLIP Score, retrieval, LPIPS."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ifvit.evaluation.estimates import Estimate, estimate_around, estimate_mean, estimate_share
from ifvit.images import Pixels, to_model_range

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


KID_SUBSET = 1000
"""Features in a subset."""
KID_SUBSETS = 10
"""Subsets at most; what FeatureSet keeps of Inception's features is this many."""
CMMD_SCALE = 1000.0
_CMMD_BANDWIDTH = 10.0
_KERNEL_CHUNK = 512
"""Rows of the CMMD's kernel at a time: 512 x 30,000 float32 are 61 MB."""


def kid(drawn: Features, reference: Features) -> Estimate:
    """Mean over disjoint subsets of the unbiased distance; kernel (x.y / F + 1)^3.

    Features (n, F) and (m, F) in random order. Fewer than two subsets' worth make one subset.
    """
    size = min(KID_SUBSET, len(drawn), len(reference))
    count = min(KID_SUBSETS, len(drawn) // size, len(reference) // size)
    values, influences = [], []
    for start in range(0, count * size, size):
        x, y = drawn[start : start + size], reference[start : start + size]
        within, across = _others_mean(_cubic(x, x)), _cubic(x, y).mean(axis=1)
        values.append(within.mean() - 2 * across.mean() + _others_mean(_cubic(y, y)).mean())
        influences.append(2 * (within - across))
    return estimate_around(float(np.mean(values)), np.concatenate(influences))


def cmmd(drawn: Features, reference: Features, device: str) -> Estimate:
    """1000 times the distance on unit CLIP features (Jayasumana et al. 2024), Gaussian kernel.

    Bandwidth 10 and, as in the published code, with the pairs of a feature and itself, which keeps
    it from being negative. Features (n, E) and (m, E). In blocks: no kernel is ever whole.
    """
    x, y = (torch.from_numpy(features).to(device) for features in (drawn, reference))
    with tqdm(total=2 * len(x) + len(y), unit="row", desc="CMMD", leave=False) as bar:
        within, across, fixed = (_gaussian_means(*pair, bar) for pair in ((x, x), (x, y), (y, y)))
    value = within.mean() - 2 * across.mean() + fixed.mean()
    return estimate_around(CMMD_SCALE * float(value), CMMD_SCALE * 2 * (within - across))


def _cubic(x: Features, y: Features) -> NDArray[np.float64]:
    """(n, F), (m, F) => (n, m)."""
    product = x.astype(np.float64) @ y.astype(np.float64).T
    kernel: NDArray[np.float64] = (product / x.shape[1] + 1) ** 3
    return kernel


def _others_mean(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n) => (n,) means of the rows without the diagonal."""
    means: NDArray[np.float64] = (kernel.sum(axis=1) - np.diag(kernel)) / (len(kernel) - 1)
    return means


def _gaussian_means(x: Tensor, y: Tensor, bar: "tqdm[Any]") -> NDArray[np.float64]:
    """(n, E), (m, E) => (n,) means over y of exp(-|x - y|^2 / 2 s^2) - 1.

    The -1 cancels in the distance and keeps the digits of kernels that are all nearly 1.
    """
    squares_x, squares_y = x.square().sum(dim=1), y.square().sum(dim=1)
    means = []
    for start in range(0, len(x), _KERNEL_CHUNK):
        rows = slice(start, start + _KERNEL_CHUNK)
        distances = torch.addmm(squares_y[None], x[rows], y.T, alpha=-2)
        distances += squares_x[rows, None]
        kernel = distances.mul_(-0.5 / _CMMD_BANDWIDTH**2).expm1_()
        means.append(kernel.mean(dim=1, dtype=torch.float64).cpu().numpy())
        bar.update(len(kernel))
    return np.concatenate(means)


PAPER_SCALE = 2.5


def clip_score(image_features: Features, text_features: Features) -> Estimate:
    """Mean raw cosine of image i and caption i, (N, E) each."""
    return estimate_mean(_cosines(image_features, text_features))


def clip_score_paper(image_features: Features, prefixed_text_features: Features) -> Estimate:
    """Mean of 2.5 max(cos, 0), captions embedded behind the prefix; the scale of the paper."""
    cosines = _cosines(image_features, prefixed_text_features)
    return estimate_mean(PAPER_SCALE * np.maximum(cosines, 0.0))


def _cosines(image_features: Features, text_features: Features) -> NDArray[np.float64]:
    product: NDArray[np.float64] = (image_features.astype(np.float64) * text_features).sum(axis=1)
    return product


NUM_CAPTIONS = 16
_SEED = 0


def retrieval_accuracy(
    image_features: Features, text_features: Features, captions: Sequence[str]
) -> Estimate | None:
    """Share of images (N, E) closer to their caption (N, E) than to 15 other captions.

    The distractors are captions of other samples, all different from each other and from the
    right one, drawn by a fixed seed so that checkpoints face the same choices. Chance is 1 / 16;
    a tie counts as a miss. None when there are fewer than 16 different captions.
    """
    _, distinct, kind = np.unique(np.asarray(captions), return_index=True, return_inverse=True)
    if len(distinct) < NUM_CAPTIONS:
        return None
    rng = np.random.default_rng(_SEED)
    hits = np.empty(len(captions), dtype=np.bool_)
    for sample, image in enumerate(image_features):
        # Numbers below len - 1, those from the right caption on moved up by one, never name it.
        drawn = rng.choice(len(distinct) - 1, NUM_CAPTIONS - 1, replace=False)
        distractors = distinct[drawn + (drawn >= kind[sample])]
        hits[sample] = image @ text_features[sample] > (text_features[distractors] @ image).max()
    return estimate_share(hits)


LayerFeatures = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, 3, H, W) in [-1, 1] => features (B, tokens, channels) of each layer."""


@torch.no_grad()
def perceptual_distances(
    layers_of: LayerFeatures, pairs: Iterable[tuple[Pixels, Pixels]], device: str
) -> NDArray[np.float64]:
    """Distances (N,) in [0, 4] of pairs of batches uint8 (B, H, W, 3), 0 for equal images.

    Features are brought to unit length over channels, their squared differences summed over
    channels and averaged over tokens and layers.
    """
    return np.concatenate([_distances(layers_of, *pair, device) for pair in pairs])


def _distances(
    layers_of: LayerFeatures, first: Pixels, second: Pixels, device: str
) -> NDArray[np.float64]:
    layers = [layers_of(to_model_range(pixels, device)) for pixels in (first, second)]
    per_layer = [
        (functional.normalize(one, dim=2) - functional.normalize(other, dim=2))
        .square()
        .sum(dim=2)
        .mean(dim=1)
        for one, other in zip(*layers, strict=True)
    ]
    distances: NDArray[np.float64] = torch.stack(per_layer).mean(dim=0).double().cpu().numpy()
    return distances
