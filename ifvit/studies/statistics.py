"""The statistics of a comparison of two arms: one rule decides what is called a difference.

Two arms of one seed see the same data, captions, noise and timesteps, so their values are paired.
`pair_by_seed` returns the `PairedDifference` of two arms. Many comparisons that are shown together
are one family: `holm` adjusts their p-values. Then `decide` calls the second arm `better` or
`worse` if its adjusted p-value is below `ALPHA`, and leaves the comparison `open` otherwise.
`more_seeds` says how many more seeds would decide an open comparison.

`error_over_captions` is the noise of the captions, which all seeds share. It is shown beside the
noise of training, and nothing is decided by it: one seed per arm cannot tell the noise of training
from a difference of the recipes.

Shapes: S seeds that both arms have, C captions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Outcome = Literal["better", "worse", "open"]

ALPHA = 0.05
"""Largest share of families without any true difference in which one is called a difference."""
POWER = 0.8
"""Wanted probability that `more_seeds` more seeds decide the comparison."""
MAX_MORE_SEEDS = 1000
_MIN_SEEDS_OF_GAIN = 3
"""Two points always have correlation 1 or -1."""
_ROUNDING = 1e-9
"""Numbers that differ by at most this share of their size are equal."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Second arm minus first arm over S shared seeds, S > 0."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """Differences (S,) in the order of `seeds`, which is ascending."""
    first: float
    """Mean of the first arm over the shared seeds."""
    second: float
    """Mean of the second arm over the shared seeds."""
    seed_error: float | None
    """Standard error of the mean difference over seeds, s / sqrt(S); None for one seed."""
    caption_error: float | None
    """Standard error of the mean difference over captions, training held fixed; None: unknown."""
    low: float | None
    """95 % interval over seeds (Student's, S - 1 degrees of freedom); for one seed over captions;
    None if the error is unknown. It is not adjusted for other comparisons."""
    high: float | None
    p_value: float | None
    """Two-sided p-value of the paired t-test; None for one seed, or if no difference varies."""
    correlation: float | None
    """Pearson's correlation of both arms over seeds; None below three seeds."""
    variance_ratio: float | None
    """Var(second - first) / (Var(first) + Var(second)): the variance of the paired difference as a
    share of the variance without pairing. None below three seeds; 1 - correlation if both arms vary
    equally."""

    @property
    def mean(self) -> float:
        """The mean difference."""
        return math.fsum(self.values) / len(self.values)


def pair_by_seed(
    first: Mapping[int, float], second: Mapping[int, float], caption_error: float | None = None
) -> PairedDifference | None:
    """Return the difference of two arms, each {seed: value}, over the seeds that both have.

    None if they share no seed. If the differences of all seeds agree up to rounding, the t-test
    does not apply (it would be certain), so `p_value` is None.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    a, b = (np.array([arm[seed] for seed in seeds]) for arm in (first, second))
    gains, count = b - a, len(seeds)
    mean, error, p_value = float(gains.mean()), None, None
    half = None if caption_error is None else caption_error * float(stats.norm.ppf(0.975))
    if count > 1:
        error = float(stats.sem(gains))
        half = error * float(stats.t.ppf(0.975, count - 1))
        if _varies(gains, np.abs([a, b]).max()):
            p_value = float(stats.ttest_rel(b, a).pvalue)
    correlation, ratio = _pairing_gain(a, b)
    return PairedDifference(
        seeds=tuple(seeds),
        values=tuple(gains.tolist()),
        first=float(a.mean()),
        second=float(b.mean()),
        seed_error=error,
        caption_error=caption_error,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        p_value=p_value,
        correlation=correlation,
        variance_ratio=ratio,
    )


def _pairing_gain(first: Floats, second: Floats) -> tuple[float | None, float | None]:
    """Correlation and variance ratio of values (S,); None for each that is not defined."""
    varying = [_varies(arm, np.abs(arm).max()) for arm in (first, second)]
    if len(first) < _MIN_SEEDS_OF_GAIN or not any(varying):
        return None, None
    ratio = float((second - first).var(ddof=1) / (first.var(ddof=1) + second.var(ddof=1)))
    return float(stats.pearsonr(first, second).statistic) if all(varying) else None, ratio


def _varies(values: Floats, size: float) -> bool:
    """Whether values (S,) computed from numbers of this size differ by more than rounding."""
    return bool(np.ptp(values) > _ROUNDING * size)


def error_over_captions(first: Floats, second: Floats) -> float | None:
    """Standard error over captions of the mean difference of two arms with values (S, C) each.

    Every caption counts with its mean over the seeds, because the seeds share the captions. None
    for one caption.
    """
    gains = (second - first).mean(axis=0)
    return float(stats.sem(gains)) if len(gains) > 1 else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of a family (Holm 1979): the i-th smallest of m is multiplied by m - i.

    i counts from 0. Adjusted values are at most 1 and rise with the p-values. None stays None and
    does not count. Calling those below alpha a difference is wrong about any of them in at most
    alpha of all families.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = largest
    return adjusted


def decide(difference: float, adjusted_p: float | None, *, lower_is_better: bool) -> Outcome:
    """Return the outcome for the second arm: the one rule of what the project calls a difference.

    `adjusted_p` is the p-value after `holm` over all comparisons that are shown together.
    """
    if adjusted_p is None or adjusted_p >= ALPHA:
        return "open"
    return "better" if (difference < 0) == lower_is_better else "worse"


def more_seeds(difference: PairedDifference, num_open: int) -> int | None:
    """Return how many more seeds would decide an open comparison with 80 % power.

    The true mean and deviation of the differences are taken to be the observed ones, so the answer
    is a plan, not a promise. The level is ALPHA / `num_open`, where `num_open` are the comparisons
    of the family that are still open, this one included: Holm tests the smallest p-value of those
    at this level, so no other comparison has to be decided first. The power is that of the
    two-sided paired t-test (noncentral t distribution) to find the difference in its observed
    direction. None if the p-value is unknown, or for more than MAX_MORE_SEEDS.
    """
    if difference.p_value is None:
        return None
    effect = abs(difference.mean) / float(np.std(difference.values, ddof=1))
    more = np.arange(1, MAX_MORE_SEEDS + 1)
    count = len(difference.values) + more
    threshold = stats.t.isf(ALPHA / num_open / 2, count - 1)
    power = stats.nct.sf(threshold, count - 1, effect * np.sqrt(count))
    enough = more[power >= POWER]
    return int(enough[0]) if enough.size else None
