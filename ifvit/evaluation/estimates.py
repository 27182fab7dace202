"""Numbers with their uncertainty: the mean and the share of samples, with 95 % intervals."""

import math

import numpy as np
from numpy.typing import NDArray

from ifvit.records import NonNegativeFloat, PositiveInt, record

_NUM_RESAMPLES = 1000
_RESAMPLING_SEED = 0

LOWER_IS_BETTER = frozenset({"frechet_distance", "fid", "kid", "cmmd", "average_error"})
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
