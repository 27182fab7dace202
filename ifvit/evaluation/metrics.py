"""What one evaluation found, with the protocol without which the numbers mean nothing."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.protocol import Protocol
from ifvit.sampling.config import nest_settings

_NUM_RESAMPLES = 1000
_SEED = 0
_TAIL = 0.025
_QUANTILE = 1.959964
"""Of the standard normal distribution at 97.5 %."""

LOWER_IS_BETTER = frozenset({"frechet_distance", "fid", "kid", "cmmd", "average_error"})
"""Numbers of a MetricsRow or a CountScore that fall as images get better; all others rise."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how far it would move with other samples of the same model.

    `low` and `high` are the ends of its 95 % interval: for a share Wilson's, for everything else
    percentiles of a bootstrap over the samples.
    """

    value: float
    standard_error: float
    num_samples: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One checkpoint under one protocol. None: not measured.

    `frechet_distance` and `cmmd` (x 1000) are over CLIP features, `fid` and `kid` over Inception's.
    `clip_score` is the raw cosine, `clip_score_paper` is 2.5 max(cos, 0) with the prefix.
    """

    weights: str
    weights_sha256: str
    step: int
    ema_decay: float | None
    protocol: Protocol
    frechet_distance: Estimate | None
    clip_score: Estimate
    clip_score_paper: Estimate
    retrieval_at_16: Estimate | None
    fid: Estimate | None = None
    kid: Estimate | None = None
    cmmd: Estimate | None = None
    count_accuracy: Estimate | None = None
    colour_accuracy: Estimate | None = None
    kind_accuracy: Estimate | None = None
    relation_accuracy: Estimate | None = None
    scene_accuracy: Estimate | None = None
    seconds_per_image: float | None = None
    """Of drawing, PNG files included, when images were last drawn."""


def estimates_of(row: MetricsRow) -> dict[str, Estimate]:
    """The measured numbers of a row by field name."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, Estimate)}


def estimate_mean(values: NDArray[np.floating]) -> Estimate:
    """Mean of values (N,), N > 1, with its standard error s / sqrt(N)."""
    return estimate_around(float(values.mean()), values)


def estimate_around(
    value: float, influences: NDArray[np.floating], num_samples: int | None = None
) -> Estimate:
    """A number that other samples would move by the mean of their influences (n,), n > 1.

    `influences` are the first-order changes of `value` by each sample (its influence function, up
    to a constant), of all samples or of a random n out of `num_samples`. Resampling them is the
    bootstrap of `value`, linearised: it costs no new distance, and repeated samples do not bias it.
    """
    total = num_samples or len(influences)
    means = _bootstrap_means(influences - influences.mean()) * math.sqrt(len(influences) / total)
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return Estimate(
        value=value,
        standard_error=float(influences.std(ddof=1)) / math.sqrt(total),
        num_samples=total,
        low=value + float(low),
        high=value + float(high),
    )


def estimate_share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of True among hits (N,), with the binomial standard error and Wilson's interval.

    The error uses (k + 1) / (N + 2) (Laplace), so that 0 % and 100 % of few do not look certain.
    """
    count, share = len(hits), float(hits.mean())
    smoothed = (float(hits.sum()) + 1) / (count + 2)
    weight = _QUANTILE**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Estimate(
        value=share,
        standard_error=math.sqrt(smoothed * (1 - smoothed) / count),
        num_samples=count,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
    )


def _bootstrap_means(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means (_NUM_RESAMPLES,) of values (N,) drawn with replacement, always the same draws."""
    rng = np.random.default_rng(_SEED)
    # About a million draws at a time, so that 30,000 samples need no more memory than 100 do.
    chunk = max(1, 1_000_000 // len(values))
    sizes = [min(chunk, _NUM_RESAMPLES - done) for done in range(0, _NUM_RESAMPLES, chunk)]
    draws = (rng.integers(len(values), size=(size, len(values))) for size in sizes)
    return np.concatenate([values[drawn].mean(axis=1, dtype=np.float64) for drawn in draws])


def write_row(url: str, row: MetricsRow) -> None:
    """Write the row as JSON."""
    storage.write_json(url, asdict(row))


def read_row(url: str) -> MetricsRow:
    """Read what `write_row` wrote. Raises UserError when the file is something else."""
    stored: dict[str, Any] = storage.read_json(url)
    try:
        estimates = {
            key: Estimate(**value)
            for key, value in stored.items()
            if key != "protocol" and isinstance(value, dict)
        }
        protocol = Protocol(**nest_settings(stored["protocol"]))
        return MetricsRow(**{**stored, **estimates, "protocol": protocol})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}: not a row of metrics ({error}); delete it and evaluate again"
        ) from None
