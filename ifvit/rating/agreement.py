"""Statistics of several raters' answers: intervals, order bias and agreement. `results` calls it.

Shapes: R raters, I items, C columns (models or pairs of models); NaN marks a missing answer.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import krippendorff
import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from ifvit.evaluation.metrics import Estimate, estimate_share

Floats = NDArray[np.float64]
_Name = TypeVar("_Name", bound=Hashable)
_NUM_RESAMPLES = 1000
_CHUNK = 100
"""Number of resamples that are computed at once; it bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class OrderBias:
    """Friedman's test of whether the place of an image on the page changes its rank."""

    mean_ranks: list[float]
    """Mean rank of the images at each place, first place first."""
    chi_square: float
    p_value: float
    num_answers: int


def estimate_columns(
    values: Floats, names: Sequence[_Name], is_share: bool = False
) -> dict[_Name, Estimate]:
    """Estimate the mean of each column of (R, I, C) that has answers => estimates by column name.

    Standard errors and 95 % intervals come from resampling both raters and items with replacement
    ("pigeonhole bootstrap", Owen 2007, arXiv 0712.1111), because another study would have other
    raters and other prompts. A share of which all answers are equal gets Wilson's interval over
    the items, because its bootstrap interval has no width.
    """
    present = ~np.isnan(values)
    means = _resample_means(np.where(present, values, 0.0), present.astype(np.float64))
    estimates = {}
    for column, name in enumerate(names):
        answers = values[..., column][present[..., column]]
        if len(answers) == 0:
            continue
        if is_share and answers.min() == answers.max():
            num_items = present[..., column].any(axis=0).sum()
            wilson = estimate_share(np.full(num_items, answers[0] == 1))
            estimates[name] = replace(wilson, num_samples=len(answers))
            continue
        low, high = np.nanpercentile(means[:, column], [2.5, 97.5])
        estimates[name] = Estimate(
            value=float(answers.mean()),
            standard_error=float(np.nanstd(means[:, column], ddof=1)),
            num_samples=len(answers),
            low=float(low),
            high=float(high),
        )
    return estimates


def _resample_means(filled: Floats, present: Floats) -> Floats:
    """Return column means (_NUM_RESAMPLES, C) of resamples; NaN for a resample without answers."""
    num_raters, num_items, _ = filled.shape
    rng = np.random.default_rng(0)
    chunks = []
    for _ in range(_NUM_RESAMPLES // _CHUNK):
        # (B, R) and (B, I): how often each resample contains each rater and each item.
        raters, items = (
            rng.multinomial(n, np.full(n, 1 / n), size=_CHUNK).astype(np.float64)
            for n in (num_raters, num_items)
        )
        total, number = (
            np.einsum("bi,bic->bc", items, np.tensordot(raters, part, axes=1))
            for part in (filled, present)
        )
        with np.errstate(invalid="ignore"):
            chunks.append(total / number)
    return np.concatenate(chunks)


def order_bias(ranks: Floats) -> OrderBias:
    """Test the ranks (N, places) of N answers, one column per place on the page.

    The order on the page is random for every answer. If the place has no effect, each row is thus
    a random permutation, whatever the raters think of the models.
    """
    # scipy.stats.friedmanchisquare computes the same statistic, but needs at least three places.
    number, places = ranks.shape
    sums = ranks.sum(axis=0)
    deviations = ((sums - number * (places + 1) / 2) ** 2).sum()
    statistic = float(12 * deviations / (number * places * (places + 1)))
    return OrderBias(
        mean_ranks=(sums / number).tolist(),
        chi_square=statistic,
        p_value=float(chdtrc(places - 1, statistic)),
        num_answers=number,
    )


def agreement(values: Floats, level: Literal["ordinal", "interval"]) -> float | None:
    """Return Krippendorff's alpha of (raters, units): 1 is perfect agreement, 0 is chance.

    Alpha is undefined, and None is returned, if no unit has two raters or all answers are equal.
    """
    paired = values[:, (~np.isnan(values)).sum(axis=0) > 1]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(paired, level_of_measurement=level))
