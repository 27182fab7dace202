"""What may be said of numbers that several raters gave for several items.

Shapes: R raters, I items, C columns (models, pairs of models); NaN where there is no answer.
"""

from dataclasses import dataclass, replace
from typing import Literal

import krippendorff
import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from ifvit.evaluation.estimates import Estimate, estimate_share

Floats = NDArray[np.float64]

_NUM_RESAMPLES = 1000
_CHUNK = 100
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class OrderBias:
    """Whether the place on the page decided the rank; `mean_ranks` go from first place to last."""

    mean_ranks: list[float]
    chi_square: float
    p_value: float
    num_answers: int


def estimate_columns(values: Floats, is_share: bool = False) -> list[Estimate | None]:
    """Mean of each column of (R, I, C) over all its answers; None for a column without one.

    Errors and 95 % intervals by resampling raters and items, both with replacement ("pigeonhole
    bootstrap", Owen 2007, arXiv 0712.1111): the next study has other raters and other prompts.
    Where all answers are alike, a share has Wilson's interval over the items instead.
    """
    present = ~np.isnan(values)
    counts = present.sum(axis=(0, 1))
    resampled = _resample(np.where(present, values, 0.0), present.astype(np.float64))
    estimates: list[Estimate | None] = []
    for column, count in enumerate(counts):
        answers = values[..., column][present[..., column]]
        if count == 0:
            estimates.append(None)
        elif is_share and answers.min() == answers.max():
            num_items = present[..., column].any(axis=0).sum()
            alike = estimate_share(np.full(num_items, answers[0] == 1))
            estimates.append(replace(alike, num_samples=len(answers)))
        else:
            estimates.append(_estimate(answers, resampled[:, column]))
    return estimates


def order_bias(ranks: Floats) -> OrderBias:
    """Test ranks (N, places) of N answers, by place on the page, for a preference of places.

    Friedman's test. With the order drawn anew for every answer, and no such preference, each row
    is a random permutation, whatever the raters think of the models.
    """
    number, places = ranks.shape
    sums = ranks.sum(axis=0)
    expected = number * (places + 1) / 2
    statistic = 12 * ((sums - expected) ** 2).sum() / (number * places * (places + 1))
    return OrderBias(
        mean_ranks=(sums / number).tolist(),
        chi_square=float(statistic),
        p_value=float(chdtrc(places - 1, statistic)),
        num_answers=number,
    )


def agreement(values: Floats, level: Literal["ordinal", "interval"]) -> float | None:
    """Krippendorff's alpha of (raters, units): 1 is perfect, 0 is chance.

    None where it is not defined: no unit has two raters, or all of them say the same.
    """
    paired = values[:, (~np.isnan(values)).sum(axis=0) > 1]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(paired, level_of_measurement=level))


def _resample(filled: Floats, present: Floats) -> Floats:
    """Means (_NUM_RESAMPLES, C) of resamples; NaN where one caught no answer of a column."""
    num_raters, num_items, num_columns = filled.shape
    rng = np.random.default_rng(_SEED)
    chunks = []
    for _ in range(_NUM_RESAMPLES // _CHUNK):
        raters = _weights(rng, num_raters)
        items = _weights(rng, num_items)
        total, weight = (
            np.einsum("bi,bic->bc", items, summed.reshape(_CHUNK, num_items, num_columns))
            for summed in (raters @ part.reshape(num_raters, -1) for part in (filled, present))
        )
        with np.errstate(invalid="ignore"):
            chunks.append(total / weight)
    return np.concatenate(chunks)


def _weights(rng: np.random.Generator, number: int) -> Floats:
    """How often each of `number` is drawn in `number` draws, (_CHUNK, number)."""
    return rng.multinomial(number, np.full(number, 1 / number), size=_CHUNK).astype(np.float64)


def _estimate(answers: Floats, resampled: Floats) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(
        value=float(answers.mean()),
        standard_error=float(np.nanstd(resampled, ddof=1)),
        num_samples=len(answers),
        low=float(low),
        high=float(high),
    )
