"""Metrics, their means over seeds, and comparisons of two means as sentences.

`report` compares runs, `report paper` compares variants of one or more seeds. For both,
`noise_between` decides which differences are called a difference.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from scipy import stats

from ifvit.evaluation.metrics import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import MetricsRow, differences
from ifvit.evaluation.runs import Run

Outcome = Literal["better", "worse", "same"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity, how it is shown, and the field of MetricsRow or CountScore that holds it."""

    field: str
    title: str
    digits: int | None = None
    """Decimal places; None: the value is a share and is shown in percent."""

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values are better."""
        return self.field in LOWER_IS_BETTER | {"mparams", "gflops"}

    @property
    def heading(self) -> str:
        """The title with an arrow that points to better values."""
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"

    def of(self, row: MetricsRow | None) -> Estimate | None:
        """Return the estimate in the row; None if it was not measured."""
        estimate: Estimate | None = getattr(row, self.field) if row else None
        return estimate

    def show(self, value: float) -> str:
        """Return the value in percent, or with `digits` decimal places."""
        return f"{100 * value:.1f} %" if self.digits is None else f"{value:.{self.digits}f}"


FID = Metric(field="fid", title="FID", digits=2)
FRECHET = Metric(field="frechet_distance", title="Fréchet distance on CLIP features", digits=4)
CLIP_SCORE = Metric(field="clip_score", title="CLIP Score (raw cosine)", digits=4)
PAPER_CLIP_SCORE = Metric(field="clip_score_paper", title="CLIP Score (paper's scale)", digits=4)
RETRIEVAL = Metric(field="retrieval_at_16", title="Retrieval among 16 captions")
HELD_OUT_LOSS = Metric(field="held_out_loss", title="Held-out loss", digits=4)
COUNT = Metric(field="count_accuracy", title="Count right")
RELATION = Metric(field="relation_accuracy", title="Relation right")

METRICS = (
    FID,
    Metric(field="kid", title="KID", digits=4),
    RETRIEVAL,
    CLIP_SCORE,
    PAPER_CLIP_SCORE,
    FRECHET,
    Metric(field="cmmd", title="CMMD", digits=3),
    HELD_OUT_LOSS,
    COUNT,
    Metric(field="colour_accuracy", title="Colour right"),
    Metric(field="kind_accuracy", title="Kind right"),
    RELATION,
    Metric(field="scene_accuracy", title="Everything right"),
    Metric(field="empty_share", title="Empty pictures"),
)


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """The mean of a metric over k runs that differ only in their seed, with its 95 % interval.

    `seed_error` is the standard error s / sqrt(k) over the runs, None for one run. `sample_error`
    is the mean over the runs of the standard error over samples. All runs generate images for the
    same captions, so `seed_error` contains the noise of training but not that of other captions.
    """

    values: tuple[float, ...]
    seed_error: float | None
    sample_error: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """The standard error over seeds if there are several, else over samples."""
        return self.sample_error if self.seed_error is None else self.seed_error


def mean_over_seeds(estimates: Sequence[Estimate]) -> SeedMean:
    """Return the mean of one or more estimates, one per run.

    Its interval is that of the only estimate, or Student's interval over the runs.
    """
    values, k = [estimate.value for estimate in estimates], len(estimates)
    seed_error = float(np.std(values, ddof=1)) / math.sqrt(k) if k > 1 else None
    low, high = estimates[0].low, estimates[0].high
    if seed_error is not None:
        mean, half = sum(values) / k, _quantile(k - 1) * seed_error
        low, high = mean - half, mean + half
    return SeedMean(
        values=tuple(values),
        seed_error=seed_error,
        sample_error=sum(estimate.standard_error for estimate in estimates) / k,
        low=low,
        high=high,
    )


def noise_between(first: SeedMean, second: SeedMean) -> float:
    """Return half the 95 % interval of the difference of two means.

    A difference of at most this size is called noise. The interval is Welch's interval over seeds,
    with the degrees of freedom rounded down. If either mean has one run, or if the runs of both
    means agree exactly, it is the normal interval over samples, which leaves out the noise of
    other training seeds.
    """
    errors = first.seed_error, second.seed_error
    if None in errors or not any(errors):
        return _quantile(0) * math.hypot(first.sample_error, second.sample_error)
    variances = [(error or 0.0) ** 2 for error in errors]
    freedoms = [len(mean.values) - 1 for mean in (first, second)]
    parts = sum(v**2 / freedom for v, freedom in zip(variances, freedoms, strict=True))
    freedom = math.floor(sum(variances) ** 2 / parts + 1e-9)
    return _quantile(freedom) * math.sqrt(sum(variances))


def _quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; of the normal distribution if freedom is 0."""
    return float(stats.t.ppf(0.975, freedom) if freedom else stats.norm.ppf(0.975))


class Comparison(NamedTuple):
    """One metric of two means; `outcome` is `same` when the difference is within the noise."""

    metric: str
    outcome: Outcome
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Comparisons under one title, and sentences about numbers that have no noise."""

    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Sentences that name the metrics that are better, worse, or within the noise."""
        count = len(self.comparisons)
        if count > 2 and all(c.outcome == "same" for c in self.comparisons):
            return f"No difference beyond the noise in any of the {count} metrics."
        phrases = {
            "better": "Clearly better in",
            "worse": "Clearly worse in",
            "same": "No difference beyond the noise in",
        }
        named = {
            outcome: ", ".join(c.metric for c in self.comparisons if c.outcome == outcome)
            for outcome in phrases
        }
        return " ".join(f"{phrases[key]} {names}." for key, names in named.items() if names)


def compare(
    metric: Metric, first: SeedMean, second: SeedMean, *, noise: float | None = None
) -> Comparison:
    """Compare the second mean with the first; without `noise`, it is that between the means."""
    difference = second.value - first.value
    noise = noise_between(first, second) if noise is None else noise
    values = f"{metric.show(second.value)} against {metric.show(first.value)}"
    size = metric.show(abs(difference)).replace(" %", " points")
    margin = metric.show(noise).replace(" %", " points")
    outcome: Outcome = "better" if (difference < 0) == metric.lower_is_better else "worse"
    found = f"{outcome} by {size}, the noise is {margin}."
    if abs(difference) <= noise:
        outcome = "same"
        found = f"the difference of {size} is smaller than the noise of {margin}."
    return Comparison(metric.title, outcome, f"{values}: {found}")


def find_best(metric: Metric, means: Mapping[Key, SeedMean]) -> Key | None:
    """Return the key whose mean is better than every other by more than the noise, else None."""
    if len(means) < 2:
        return None
    choose = min if metric.lower_is_better else max
    best = choose(means, key=lambda key: means[key].value)
    first = means[best]
    is_clear = all(
        abs(first.value - mean.value) > noise_between(first, mean)
        for key, mean in means.items()
        if key != best
    )
    return best if is_clear else None


def compare_runs(baseline: Run, other: Run) -> Findings | None:
    """Compare the last evaluations of two runs, metric by metric.

    The held-out loss is compared sample by sample, because both runs saw the same noisy latents.
    Returns None if the protocols differ or if no metric was measured for both runs.
    """
    if mismatches([baseline, other]):
        return None
    comparisons = [
        compare(
            metric,
            mean_over_seeds([first]),
            mean_over_seeds([second]),
            noise=_paired_noise(baseline, other) if metric is HELD_OUT_LOSS else None,
        )
        for metric in METRICS
        if compares(metric, baseline.last, other.last)
        and (first := metric.of(baseline.last))
        and (second := metric.of(other.last))
    ]
    title = f"{other.name} against {baseline.name}"
    return Findings(title=title, comparisons=comparisons) if comparisons else None


def _paired_noise(first: Run, second: Run) -> float | None:
    """Half the 95 % interval of the mean difference in held-out loss over the samples of two runs.

    None if the losses of single samples are not known.
    """
    losses = [[sample.held_out_loss for sample in run.samples] for run in (first, second)]
    if len(losses[0]) != len(losses[1]) or len(losses[0]) < 2 or None in losses[0] + losses[1]:
        return None
    gains = np.subtract(*np.array(losses, dtype=np.float64))
    return _quantile(0) * float(gains.std(ddof=1)) / math.sqrt(len(gains))


def compares(metric: Metric, first: MetricsRow | None, second: MetricsRow | None) -> bool:
    """Whether the metric means the same in both rows: losses of different targets do not."""
    targets = {row.target for row in (first, second) if row and metric.of(row)}
    return metric is not HELD_OUT_LOSS or len(targets) < 2


def mismatches(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return run name => how the run's protocol differs from that of the first evaluated run.

    Each difference is in words, the run's own value first. Runs without a difference are left out.
    """
    protocols = {run.name: row.protocol for run in runs if (row := run.last)}
    baseline = next(iter(protocols.values()), None)
    return {
        name: found
        for name, protocol in protocols.items()
        if baseline and (found := differences(protocol, baseline))
    }
