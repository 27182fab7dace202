"""What one evaluation found, with the protocol without which the numbers mean nothing."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError

LOWER_IS_BETTER = frozenset({"frechet_distance"})
"""Numbers of a MetricsRow that fall as images get better; all others rise."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over samples and how far it would move with other samples of the same model."""

    value: float
    standard_error: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was drawn and how it was measured; rows with different ones do not compare."""

    num_samples: int
    caption_rule: str
    solver: str
    num_steps: int
    guidance_scale: float
    guidance_low: float = 0.0
    guidance_high: float = 999.0
    seed: int
    image_size: int
    resize: str
    prompts_sha256: str
    features: str
    features_sha256: str
    paper_prefix: str
    num_reference_images: int | None
    reference_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One checkpoint under one protocol. None: not measured.

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
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(value=float(values.mean()), standard_error=spread, num_samples=len(values))


def estimate_share(hits: NDArray[np.bool_]) -> Estimate:
    """Share of True among hits (N,), with the binomial standard error.

    The error uses (k + 1) / (N + 2) (Laplace), so that 0 % and 100 % of few do not look certain.
    """
    smoothed = (float(hits.sum()) + 1) / (len(hits) + 2)
    spread = math.sqrt(smoothed * (1 - smoothed) / len(hits))
    return Estimate(value=float(hits.mean()), standard_error=spread, num_samples=len(hits))


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
        return MetricsRow(**{**stored, **estimates, "protocol": Protocol(**stored["protocol"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url}: not a row of metrics ({error}); evaluate again") from None
