"""Metrics as the pages show them, and their means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ifvit.evaluation.metrics import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.object_count import CountScore
from ifvit.evaluation.rows import MetricsRow


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

    def of(self, row: MetricsRow | CountScore | None) -> Estimate | None:
        """Return the estimate in the row; None if it was not measured."""
        estimate: Estimate | None = getattr(row, self.field) if row else None
        return estimate

    def show(self, value: float) -> str:
        """Return the value in percent, or with `digits` decimal places."""
        return f"{100 * value:.1f} %" if self.digits is None else f"{value:.{self.digits}f}"

    def show_change(self, value: float) -> str:
        """Return a difference with its sign; one of shares in percentage points."""
        return (
            f"{100 * value:+z.1f} points" if self.digits is None else f"{value:+z.{self.digits}f}"
        )


FID = Metric(field="fid", title="FID", digits=2)
FRECHET = Metric(field="frechet_distance", title="Fréchet distance on CLIP features", digits=4)
PAPER_CLIP_SCORE = Metric(field="clip_score_paper", title="CLIP Score (paper's scale)", digits=4)
RETRIEVAL = Metric(field="retrieval_at_16", title="Retrieval among 16 captions")
HELD_OUT_LOSS = Metric(field="held_out_loss", title="Held-out loss", digits=4)
COUNT = Metric(field="count_accuracy", title="Count right")
RELATION = Metric(field="relation_accuracy", title="Relation right")

METRICS = (
    FID,
    Metric(field="kid", title="KID", digits=4),
    RETRIEVAL,
    Metric(field="clip_score", title="CLIP Score (raw cosine)", digits=4),
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
"""Metrics of MetricsRow."""

COUNT_ERROR = Metric(field="average_error", title="Average error", digits=3)
MATCH_RATIO = Metric(field="match_ratio", title="Match ratio")
MAIN_METRICS = (
    PAPER_CLIP_SCORE,
    RETRIEVAL,
    HELD_OUT_LOSS,
    COUNT,
    RELATION,
    COUNT_ERROR,
    MATCH_RATIO,
)
"""What arms are compared in, beside FID or the Fréchet distance and the metrics of claims."""
METRIC_OF = {metric.field: metric for metric in (*METRICS, COUNT_ERROR, MATCH_RATIO)}
"""Field of MetricsRow or CountScore => metric: all that claims may name."""


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """The mean of a metric over k runs that differ only in their seed, with its 95 % interval.

    `seed_error` is the standard error s / sqrt(k) over the runs, None for one run. `sample_error`
    is the mean over the runs of the standard error over samples. All runs generate images for the
    same captions, so `seed_error` contains the noise of training but not that of other captions.
    The interval says how well the mean is known. Whether two arms differ is another question, which
    `compare` answers, because their seeds are paired.
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
        mean, half = sum(values) / k, float(stats.t.ppf(0.975, k - 1)) * seed_error
        low, high = mean - half, mean + half
    return SeedMean(
        values=tuple(values),
        seed_error=seed_error,
        sample_error=sum(estimate.standard_error for estimate in estimates) / k,
        low=low,
        high=high,
    )
