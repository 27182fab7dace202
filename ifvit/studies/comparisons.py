"""Differences between runs in plain sentences, each with the noise it must be held against."""

import math
from dataclasses import dataclass
from typing import Literal

from ifvit.evaluation.estimates import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import MetricsRow, differences
from ifvit.evaluation.runs import Run

Outcome = Literal["better", "worse", "same"]

NOISE_ERRORS = 2.0
"""Differences below this many standard errors are called noise."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a field of MetricsRow is shown."""

    field: str
    title: str
    is_percent: bool = True
    digits: int = 4
    """Behind the point, where it is no percentage."""

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values are better ones."""
        return self.field in LOWER_IS_BETTER

    def of(self, row: MetricsRow | None) -> Estimate | None:
        """The measured number, if it was measured."""
        estimate: Estimate | None = getattr(row, self.field) if row else None
        return estimate

    def show(self, value: float) -> str:
        """The number with the digits that make sense for it."""
        return f"{100 * value:.1f} %" if self.is_percent else f"{value:.{self.digits}f}"


FID = Metric(field="fid", title="FID", is_percent=False, digits=2)
FRECHET = Metric(
    field="frechet_distance", title="Fréchet distance on CLIP features", is_percent=False
)
CLIP_SCORE = Metric(field="clip_score", title="CLIP Score (raw cosine)", is_percent=False)
PAPER_CLIP_SCORE = Metric(
    field="clip_score_paper", title="CLIP Score (paper's scale)", is_percent=False
)
RETRIEVAL = Metric(field="retrieval_at_16", title="Retrieval among 16 captions")
COUNT = Metric(field="count_accuracy", title="Count right")
RELATION = Metric(field="relation_accuracy", title="Relation right")

METRICS = (
    FID,
    Metric(field="kid", title="KID", is_percent=False),
    RETRIEVAL,
    CLIP_SCORE,
    PAPER_CLIP_SCORE,
    FRECHET,
    Metric(field="cmmd", title="CMMD", is_percent=False, digits=3),
    COUNT,
    Metric(field="colour_accuracy", title="Colour right"),
    Metric(field="kind_accuracy", title="Kind right"),
    RELATION,
    Metric(field="scene_accuracy", title="Everything right"),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One metric of two runs; `outcome` is `same` when the difference is within the noise."""

    metric: str
    outcome: Outcome
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All verdicts about `other` against `baseline`."""

    baseline: str
    other: str
    verdicts: list[Verdict]

    @property
    def summary(self) -> str:
        """One sentence that says which metrics tell the runs apart, and which do not."""
        phrases = {
            "better": "clearly better in",
            "worse": "clearly worse in",
            "same": "no difference beyond the noise in",
        }
        named = {
            outcome: ", ".join(v.metric for v in self.verdicts if v.outcome == outcome)
            for outcome in phrases
        }
        found = "; ".join(f"{phrases[key]} {names}" for key, names in named.items() if names)
        return f"{self.other} against {self.baseline}: {found}."


def compare(baseline: Run, other: Run) -> Comparison | None:
    """One verdict per metric that both runs have.

    None when there is no such metric, or when their protocols differ.
    """
    if mismatches([baseline, other]):
        return None
    verdicts = []
    for metric in METRICS:
        first, second = metric.of(baseline.last), metric.of(other.last)
        if first and second:
            verdicts.append(judge(metric, first.value, second.value, _noise(first, second)))
    if not verdicts:
        return None
    return Comparison(baseline=baseline.name, other=other.name, verdicts=verdicts)


def mismatches(runs: list[Run]) -> dict[str, list[str]]:
    """Why runs, by name, do not compare with the first one that has been evaluated.

    Each in words, the run's own value first; runs that compare are not in it.
    """
    protocols = {run.name: row.protocol for run in runs if (row := run.last)}
    baseline = next(iter(protocols.values()), None)
    return {
        name: found
        for name, protocol in protocols.items()
        if baseline and (found := differences(protocol, baseline))
    }


def best_run(metric: Metric, runs: list[Run]) -> Run | None:
    """The run that is better than every other one by more than the noise, if there is one.

    Among those that compare with the first.
    """
    compared = [run for run in runs if run.name not in mismatches(runs)]
    measured = [(run, estimate) for run in compared if (estimate := metric.of(run.last))]
    measured.sort(key=lambda pair: pair[1].value, reverse=not metric.lower_is_better)
    if len(measured) < 2:
        return None
    (best, highest), others = measured[0], measured[1:]
    return best if all(_is_clear(highest, estimate) for _, estimate in others) else None


def judge(metric: Metric, first: float, second: float, noise: float) -> Verdict:
    """The second value against the first, where a difference of `noise` or less means nothing."""
    difference = second - first
    values = f"{metric.show(second)} against {metric.show(first)}"
    size = metric.show(abs(difference)).replace(" %", " points")
    margin = metric.show(noise).replace(" %", " points")
    if abs(difference) <= noise:
        text = f"{values}: the difference of {size} is smaller than the noise of {margin}."
        return Verdict(metric=metric.title, outcome="same", sentence=text)
    outcome: Outcome = "better" if (difference < 0) == metric.lower_is_better else "worse"
    text = f"{values}: {outcome} by {size}, the noise is {margin}."
    return Verdict(metric=metric.title, outcome=outcome, sentence=text)


def _noise(first: Estimate, second: Estimate) -> float:
    return NOISE_ERRORS * math.hypot(first.standard_error, second.standard_error)


def _is_clear(first: Estimate, second: Estimate) -> bool:
    return abs(first.value - second.value) > _noise(first, second)
