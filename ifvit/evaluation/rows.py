"""Rows of metrics: what one evaluation measured, its protocol, and where rows lie."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError
from ifvit.sampling.config import flatten_settings, nest_settings

_LABELS = {"name", "features", "inception"}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was drawn and how it was measured, stored with every number.

    Names are labels; all else decides the numbers. Hashes are SHA-256.
    """

    name: str
    num_samples: int
    prompts_sha256: str
    """Of image id and drawn caption of every sample, in order."""
    caption_rule: str
    """Which of an image's captions is drawn: `first` or `random` (of seed and position)."""
    score_caption: str
    """Which one the image is scored against: the `same`, or the `first` of the image."""
    sampling: dict[str, Any]
    """`SamplingConfig.settings`."""
    image_size: int
    resize: str
    """How real images became square."""
    features: str
    """CLIP of all numbers but FID and KID."""
    features_sha256: str
    paper_prefix: str
    inception: str | None
    """Inception of FID and KID; None: neither was measured."""
    inception_sha256: str | None
    num_reference_images: int | None
    reference_sha256: str | None
    """Of the real images' files, their order and their resize; None: no distance was measured."""

    @property
    def facts(self) -> dict[str, Any]:
        """All of it by name, the settings of sampling among the rest."""
        return flatten_settings(vars(self))

    @property
    def guidance_scale(self) -> float:
        """Of sampling."""
        scale: float = self.sampling["guidance_scale"]
        return scale


def differences(first: Protocol, second: Protocol) -> list[str]:
    """What keeps numbers of the two from being compared, in words; empty when nothing does."""
    one, other = first.facts, second.facts
    pairs = {name: (one.get(name), other.get(name)) for name in one | other}
    return [
        f"{describe_field(name)} {describe_value(name, a)} against {describe_value(name, b)}"
        for name, (a, b) in pairs.items()
        if a != b and name not in _LABELS
    ]


def describe_field(name: str) -> str:
    """`guidance_scale` => `guidance scale`, `prompts_sha256` => `prompts hash`."""
    return name.replace("_", " ").replace("sha256", "hash")


def describe_value(name: str, value: object) -> str:
    """The value as text, hashes shortened to 12 digits."""
    if value is None:
        return "none"
    return str(value)[:12] if name.endswith("sha256") else str(value)


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


FOLDER = "evaluation"
"""Of a run, where its rows are."""


def row_url(folder: str, protocol: str, guidance_scale: float, step: int) -> str:
    """`RUN/evaluation`, `scenes`, 1.5, 500 => `RUN/evaluation/scenes/w1.5/step_00000500.json`."""
    return storage.join(folder, protocol, f"w{guidance_scale:g}", f"step_{step:08d}.json")


def samples_url(row: str) -> str:
    """The folder of the samples that the row at URL `row` measures."""
    return row.removesuffix(".json")


def read_rows(folder: str) -> dict[str, MetricsRow]:
    """All rows below `folder` by URL, sorted by protocol name, guidance scale and step.

    Raises UserError for a file that should be a row and is none.
    """
    urls = [
        storage.join(folder, protocol, scale, name)
        for protocol in storage.list_names(folder)
        for scale in storage.list_names(storage.join(folder, protocol))
        if re.fullmatch(r"w[\d.e+-]+", scale)
        for name in storage.list_names(storage.join(folder, protocol, scale))
        if re.fullmatch(r"step_\d+\.json", name)
    ]
    rows = {url: read_row(url) for url in urls}
    return dict(sorted(rows.items(), key=lambda item: (*_series(item[1]), item[1].step)))


def main_series(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows of the protocol name and guidance scale that most rows have, in their order.

    Of several, the first by name, then the smallest scale.
    """
    counts = Counter(map(_series, rows))
    main = min(counts, key=lambda series: (-counts[series], series), default=None)
    return [row for row in rows if _series(row) == main]


def _series(row: MetricsRow) -> tuple[str, float]:
    return row.protocol.name, row.protocol.guidance_scale
