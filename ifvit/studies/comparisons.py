"""Comparisons of arms and claims about them, by the rule of `studies.statistics`.

An arm is {seed: Evaluation}; all evaluations have one protocol (see `arms.select`). `compare`
answers questions about arms; all questions of one call are one family, because they are shown
together. `evaluate_claims` tests statements about arms.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import MetricsRow
from ifvit.sampling.samples import SampleRow
from ifvit.studies.config import Claim
from ifvit.studies.quantities import (
    COUNT_ERROR,
    HELD_OUT_LOSS,
    MATCH_RATIO,
    METRIC_OF,
    Metric,
)
from ifvit.studies.statistics import (
    MAX_MORE_SEEDS,
    Outcome,
    PairedDifference,
    decide,
    error_over_captions,
    holm,
    more_seeds,
    pair_by_seed,
)

Verdict = Literal["confirmed", "refuted", "open", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on one run: its row, the samples behind the row, and object counts."""

    row: MetricsRow | None
    samples: Sequence[SampleRow] = ()
    counts: ObjectCountRow | None = None

    def estimate(self, metric: Metric) -> Estimate | None:
        """The metric of the row or of all counted images; None if it was not measured."""
        if metric not in (COUNT_ERROR, MATCH_RATIO):
            return metric.of(self.row)
        return metric.of(self.counts.score()) if self.counts else None

    def by_caption(self, metric: Metric) -> dict[str, float]:
        """File of a sample => its value; empty if the values of single samples are not known."""
        if metric in (COUNT_ERROR, MATCH_RATIO):
            images = self.counts.images if self.counts else ()
            errors = {image.file: abs(image.counted - image.asked) for image in images}
            is_error = metric is COUNT_ERROR
            return {file: float(error if is_error else not error) for file, error in errors.items()}
        values = {sample.file: _value_of(sample, metric.field) for sample in self.samples}
        return {file: value for file, value in values.items() if value is not None}

    def target(self, metric: Metric) -> str | None:
        """What the metric is an error of; numbers with other targets are other quantities."""
        return self.row.target if self.row and metric is HELD_OUT_LOSS else None


def _value_of(sample: SampleRow, field: str) -> float | None:
    """The value of which the metric is the mean; None if it is no mean over samples."""
    if field in ("clip_score", "held_out_loss"):
        value: float | None = getattr(sample, field)
        return value
    scores = sample.scores or {}
    if field == "scene_accuracy" and scores:  # a scene of one group has no relation
        return float(all(is_right is not False for is_right in scores.values()))
    is_right = scores.get(field.removesuffix("_accuracy"))
    return None if is_right is None else float(is_right)


Arms = Mapping[str, Mapping[int, Evaluation]]
"""Name of an arm => seed => evaluation."""


class Question(NamedTuple):
    """Is `arm` better or worse than `against` in a metric?"""

    metric: Metric
    arm: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer to a question; the difference is that of `arm` minus `against`."""

    question: Question
    difference: PairedDifference
    captions_are_paired: bool
    """Whether `difference.caption_error` is that of paired captions; else samples are taken as
    independent, which makes the error too large rather than too small."""
    adjusted_p: float | None
    """p-value after Holm over all comparisons that are shown together; None: there is no test."""
    outcome: Outcome
    more_seeds: int | None
    """Seeds that would decide an open comparison; None if it is not known or above 1,000."""

    @property
    def metric(self) -> Metric:
        """The metric of the question."""
        return self.question.metric

    @property
    def sentence(self) -> str:
        """The difference, its interval, what it rests on, and the outcome."""
        found, metric = self.difference, self.question.metric
        change, count = metric.show_change(found.mean), len(found.values)
        low, high = (
            "" if bound is None else metric.show_change(bound).removesuffix(" points")
            for bound in (found.low, found.high)
        )
        if count == 1:
            over = "captions" if self.captions_are_paired else "samples, not paired"
            interval = f", 95 % interval {low} to {high} over {over}" if low else ""
            return f"one run each: {change}{interval}; one seed does not tell recipes apart"
        if self.adjusted_p is None:
            return f"{change} for each of {count} paired seeds; without spread there is no test"
        p = "p < 0.0001" if self.adjusted_p < 1e-4 else f"p = {self.adjusted_p:.2g}"
        text = f"{change} [{low}, {high}] over {count} paired seeds, {p} after Holm: {self.outcome}"
        if self.outcome != "open":
            return text
        more = "more than" if self.more_seeds is None else "about"
        return f"{text}; {more} {self.more_seeds or MAX_MORE_SEEDS:,} more seeds would decide it"


def compare(arms: Arms, questions: Iterable[Question]) -> list[Comparison]:
    """Answer the questions as one family; those without a seed that both arms have are left out."""
    pairs = {question: _pair(arms, question) for question in dict.fromkeys(questions)}
    found = [(question, *pair) for question, pair in pairs.items() if pair]
    adjusted = holm([difference.p_value for _, difference, _ in found])
    outcomes = [
        decide(difference.mean, p, lower_is_better=question.metric.lower_is_better)
        for (question, difference, _), p in zip(found, adjusted, strict=True)
    ]
    num_open = sum(
        outcome == "open" and p is not None for outcome, p in zip(outcomes, adjusted, strict=True)
    )
    return [
        Comparison(
            question=question,
            difference=difference,
            captions_are_paired=is_paired,
            adjusted_p=p,
            outcome=outcome,
            more_seeds=more_seeds(difference, num_open) if outcome == "open" else None,
        )
        for (question, difference, is_paired), p, outcome in zip(
            found, adjusted, outcomes, strict=True
        )
    ]


def _pair(arms: Arms, question: Question) -> tuple[PairedDifference, bool] | None:
    """The difference over the seeds that compare, and whether its captions are paired."""
    metric, arm, against = question
    pairs = {
        seed: (arms[against][seed], evaluation)
        for seed, evaluation in sorted(arms[arm].items())
        if seed in arms[against]
    }
    measured = [one for pair in pairs.values() for one in pair if one.estimate(metric)]
    kept = {
        seed: pair
        for seed, pair in pairs.items()
        if all(
            one.estimate(metric) and one.target(metric) == measured[0].target(metric)
            for one in pair
        )
    }
    estimates = [
        {seed: estimate for seed, pair in kept.items() if (estimate := pair[side].estimate(metric))}
        for side in (0, 1)
    ]
    error = _paired_error(metric, list(kept.values())) if kept else None
    is_paired = error is not None
    if kept and error is None:
        errors = [np.mean([e.standard_error for e in side.values()]) for side in estimates]
        error = math.hypot(*errors)
    first, second = ({seed: e.value for seed, e in side.items()} for side in estimates)
    difference = pair_by_seed(first, second, error)
    return (difference, is_paired) if difference else None


def _paired_error(metric: Metric, pairs: Sequence[tuple[Evaluation, Evaluation]]) -> float | None:
    """Standard error over captions; None unless all runs have values for the same captions."""
    values = [[evaluation.by_caption(metric) for evaluation in pair] for pair in pairs]
    files = sorted(values[0][0])
    if any(found.keys() != values[0][0].keys() for pair in values for found in pair):
        return None
    first, second = (
        np.array([[pair[side][file] for file in files] for pair in values]) for side in (0, 1)
    )
    return error_over_captions(first, second)


def questions_about(arms: Arms, baseline: str, metrics: Iterable[Metric]) -> list[Question]:
    """Return the questions that compare every arm with the baseline in each of the metrics."""
    others = [arm for arm in arms if arm != baseline]
    return [Question(metric, arm, baseline) for metric in metrics for arm in others]


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """What a study says about a claim."""

    claim: Claim
    verdict: Verdict
    comparisons: list[Comparison]
    missing: list[Question]
    """Questions of the claim that no seed answers; with any of them it cannot be confirmed."""


def evaluate_claims(arms: Arms, claims: Sequence[Claim]) -> list[ClaimResult]:
    """Test claims as one family.

    A claim is confirmed if all its comparisons come out as claimed, refuted if one comes out the
    opposite, not measured if there is none, and open otherwise.
    """
    asked = [
        {
            Question(METRIC_OF[field], claim.arm, against): expected
            for against in claim.against
            for field, expected in claim.metrics.items()
        }
        for claim in claims
    ]
    family = [question for questions in asked for question in questions]
    found = {comparison.question: comparison for comparison in compare(arms, family)}
    return [
        ClaimResult(
            claim=claim,
            verdict=_judge(questions, found),
            comparisons=[found[question] for question in questions if question in found],
            missing=[question for question in questions if question not in found],
        )
        for claim, questions in zip(claims, asked, strict=True)
    ]


def _judge(
    claimed: Mapping[Question, Literal["better", "worse"]], found: Mapping[Question, Comparison]
) -> Verdict:
    outcomes = {
        question: found[question].outcome if question in found else None for question in claimed
    }
    if not any(outcomes.values()):
        return "not measured"
    if outcomes == claimed:
        return "confirmed"
    is_refuted = any(outcomes[q] not in (None, "open", wanted) for q, wanted in claimed.items())
    return "refuted" if is_refuted else "open"
