"""Differences between runs in plain sentences, each with the noise it must be held against."""

import math
from dataclasses import dataclass

from ifvit.analysis.runs import Run
from ifvit.evaluation.metrics import Estimate, MetricsRow

NOISE_ERRORS = 2.0
"""Differences below this many standard errors are called noise."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a field of MetricsRow is shown."""

    field: str
    title: str
    is_percent: bool = True
    lower_is_better: bool = False

    def of(self, row: MetricsRow | None) -> Estimate | None:
        """The measured number, if it was measured."""
        estimate: Estimate | None = getattr(row, self.field) if row else None
        return estimate

    def show(self, value: float) -> str:
        """The number with the digits that make sense for it."""
        return f"{100 * value:.1f} %" if self.is_percent else f"{value:.4f}"


METRICS = (
    Metric(field="retrieval_at_16", title="Retrieval among 16 captions"),
    Metric(field="clip_score", title="CLIP Score (raw cosine)", is_percent=False),
    Metric(field="clip_score_paper", title="CLIP Score (paper's scale)", is_percent=False),
    Metric(
        field="frechet_distance", title="Fréchet distance", is_percent=False, lower_is_better=True
    ),
    Metric(field="count_accuracy", title="Count right"),
    Metric(field="colour_accuracy", title="Colour right"),
    Metric(field="kind_accuracy", title="Kind right"),
    Metric(field="relation_accuracy", title="Relation right"),
    Metric(field="scene_accuracy", title="Everything right"),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison: the sentence, and whether the difference stands out of the noise."""

    metric: str
    sentence: str
    is_clear: bool


def compare(baseline: Run, other: Run) -> list[Verdict]:
    """One verdict per metric that both runs have, `other` against `baseline`."""
    verdicts = []
    for metric in METRICS:
        first, second = metric.of(baseline.last), metric.of(other.last)
        if first and second:
            verdicts.append(_compare(metric, (baseline.name, first), (other.name, second)))
    return verdicts


def protocol_differences(runs: list[Run]) -> list[str]:
    """Names of the protocol's fields in which the last evaluations differ."""
    protocols = [vars(run.last.protocol) for run in runs if run.last]
    names = protocols[0] if protocols else {}
    return [name for name in names if len({repr(protocol[name]) for protocol in protocols}) > 1]


def best_run(metric: Metric, runs: list[Run]) -> Run | None:
    """The run with the best value, if at least two have one."""
    measured = [(estimate.value, run) for run in runs if (estimate := metric.of(run.last))]
    if len(measured) < 2:
        return None
    choose = min if metric.lower_is_better else max
    return choose(measured, key=lambda pair: pair[0])[1]


def _compare(metric: Metric, first: tuple[str, Estimate], second: tuple[str, Estimate]) -> Verdict:
    difference = second[1].value - first[1].value
    error = math.hypot(first[1].standard_error, second[1].standard_error)
    is_clear = abs(difference) > NOISE_ERRORS * error
    is_better = (difference < 0) == metric.lower_is_better
    values = f"{metric.show(second[1].value)} against {metric.show(first[1].value)}"
    size = metric.show(abs(difference)).replace(" %", " points")
    noise = metric.show(NOISE_ERRORS * error).replace(" %", " points")
    if is_clear:
        word = "better" if is_better else "worse"
        text = f"{second[0]} is {word} than {first[0]} by {size} ({values}; noise {noise})."
    else:
        text = (
            f"{second[0]} and {first[0]} differ by {size} ({values}), "
            f"less than the noise of {noise}: no difference shown."
        )
    return Verdict(metric=metric.title, sentence=text, is_clear=is_clear)
