"""Distances between sets of features by a kernel: KID (Binkowski et al. 2018), CMMD.

Both are squared maximum mean discrepancies, mean k(x, x') - 2 mean k(x, y) + mean k(y, y') over
drawn features x and reference features y. The reference counts as fixed: to first order a drawn
sample i moves the distance by 2 (mean_j k(x_i, x_j) - mean_j k(x_i, y_j)). F is the feature width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ifvit.evaluation.frechet import Features
from ifvit.evaluation.metrics import Estimate, estimate_around

KID_SUBSET = 1000
"""Features in a subset."""
KID_SUBSETS = 10
"""Subsets at most; what FeatureSet keeps of Inception's features is this many."""
CMMD_SCALE = 1000.0
_CMMD_BANDWIDTH = 10.0
_CHUNK = 512
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
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distances = torch.addmm(squares_y[None], x[rows], y.T, alpha=-2)
        distances += squares_x[rows, None]
        kernel = distances.mul_(-0.5 / _CMMD_BANDWIDTH**2).expm1_()
        means.append(kernel.mean(dim=1, dtype=torch.float64).cpu().numpy())
        bar.update(len(kernel))
    return np.concatenate(means)
