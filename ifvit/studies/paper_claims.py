"""The claims of arXiv 2403.16530, and what our runs say about each one.

`report paper` shows a card per claim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.studies.comparisons import (
    COUNT,
    FID,
    FRECHET,
    PAPER_CLIP_SCORE,
    RELATION,
    RETRIEVAL,
    Comparison,
    Metric,
    Outcome,
    compare,
    noise_between,
)
from ifvit.studies.object_counts import ERROR, MATCH, mean_score
from ifvit.studies.paper_tables import PAPER_TABLE_1, gflops_of, iterations_per_s
from ifvit.studies.variants import PAPER_VARIANTS, Sheet, Variant

if TYPE_CHECKING:  # a sheet without a rating study does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults, WinRate

CountsByVariant = Mapping[Variant, Sequence[ObjectCountRow]]

_CONCAT_EARLY, _CONCAT_BOTH, _CROSS_EARLY, _CROSS_BOTH = PAPER_VARIANTS
_ONE_RUN = " One variant has one run, so this noise leaves out that of other seeds."


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, our comparisons with their noise, and facts that have no noise."""

    text: str
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    expected: Outcome = "better"
    """The outcome of the comparisons if the claim holds."""

    @property
    def summary(self) -> str:
        """Counts of agreeing, opposite and undecided comparisons; empty without comparisons."""
        outcomes = [comparison.outcome for comparison in self.comparisons]
        agreeing, undecided = outcomes.count(self.expected), outcomes.count("same")
        opposed = len(outcomes) - agreeing - undecided
        counts = f"Agree: {agreeing}. Opposite: {opposed}. Within the noise: {undecided}."
        return counts if outcomes else ""


class _MetricClaim(NamedTuple):
    """A claim that variant `second` is better (or worse) than variant `first` in these metrics."""

    first: Variant
    second: Variant
    text: str
    metrics: tuple[Metric, ...] = (FID, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION)
    expected: Outcome = "better"


_METRIC_CLAIMS = (
    _MetricClaim(
        _CONCAT_EARLY,
        _CONCAT_BOTH,
        "With concatenation, intermediate fusion has lower FID (5.77 against 5.98) and higher "
        "CLIP Score (0.588 against 0.584) than early fusion.",
    ),
    _MetricClaim(
        _CROSS_EARLY,
        _CROSS_BOTH,
        "With cross-attention, intermediate fusion has lower FID (5.68 against 6.48) and "
        "higher CLIP Score (0.588 against 0.575) than early fusion.",
    ),
    _MetricClaim(
        _CONCAT_EARLY,
        _CROSS_BOTH,
        "Intermediate fusion by cross-attention is the best of the four variants; against the "
        "baseline: FID 5.68 and 5.98, CLIP Score 0.588 and 0.584.",
    ),
    _MetricClaim(
        _CROSS_EARLY,
        Variant("cross_attention", True, False),
        "Fusing in the middle blocks alone is the major source of the lower FID (Figure 7).",
        (FID,),
    ),
    _MetricClaim(
        _CROSS_EARLY,
        Variant("cross_attention", True, False),
        "Fusing in the middle blocks alone lowers the CLIP Score (Figure 7).",
        (PAPER_CLIP_SCORE,),
        "worse",
    ),
    _MetricClaim(
        _CROSS_EARLY,
        Variant("cross_attention", False, True),
        "The text branch alone is the major source of the higher CLIP Score (Figure 7).",
        (PAPER_CLIP_SCORE,),
    ),
)
_PAIRS = ((_CONCAT_EARLY, _CONCAT_BOTH), (_CROSS_EARLY, _CROSS_BOTH))
"""Early fusion and its intermediate counterpart, for each conditioning."""
_COUNT_CLAIMS = (
    "With concatenation, intermediate fusion counts better for 18 of 20 object-count pairs.",
    "With cross-attention, intermediate fusion counts better or as well for 14 of 20 object-count "
    "pairs.",
)


def quality_metric(sheet: Sheet) -> Metric:
    """Return FID, or the distance on CLIP features if only that one was measured."""
    return FRECHET if sheet.has(FRECHET) and not sheet.has(FID) else FID


def metric_claims(sheet: Sheet) -> list[Claim]:
    """Return the claims about metrics and cost whose variants were measured."""
    claims = [*(_compare_variants(sheet, claim) for claim in _METRIC_CLAIMS), _cost(sheet)]
    return [claim for claim in claims if claim.comparisons or claim.facts]


def count_claims(counts: CountsByVariant) -> list[Claim]:
    """Return the paper's claims about object counts for the variants that were counted."""
    return [
        _compare_counts(text, counts[early], counts[both])
        for text, (early, both) in zip(_COUNT_CLAIMS, _PAIRS, strict=True)
        if early in counts and both in counts
    ]


def preference_claims(found: "PreferenceResults") -> list[Claim]:
    """Return the claim about preference, for models whose names are slugs of variants."""
    comparisons = [
        _compare_wins(early, both, rate)
        for early, both in _PAIRS
        for rate in found.win_rates
        if {rate.first, rate.second} == {early.slug, both.slug}
    ]
    text = "People prefer each intermediate fusion variant to its early fusion counterpart."
    return [Claim(text=text, comparisons=comparisons)] if comparisons else []


def _compare_variants(sheet: Sheet, claim: _MetricClaim) -> Claim:
    comparisons = []
    for metric in claim.metrics:
        shown = quality_metric(sheet) if metric is FID else metric
        first, second = (sheet.mean(variant, shown) for variant in (claim.first, claim.second))
        if first and second:
            found = compare(shown, first, second)
            if None in (first.seed_error, second.seed_error):
                found = replace(found, sentence=found.sentence + _ONE_RUN)
            comparisons.append(found)
    return Claim(text=claim.text, comparisons=comparisons, expected=claim.expected)


def _cost(sheet: Sheet) -> Claim:
    """Compare speed and GFLOPs with those of early concat as ratios, which any hardware allows."""
    text = "Against the baseline, all other variants train faster and need fewer operations."
    base = sheet.variants.get(_CONCAT_EARLY)
    facts = []
    for variant in PAPER_VARIANTS[1:]:
        runs = sheet.variants.get(variant)
        if not base or not runs:
            continue
        fact = (
            f"{variant.title}: {gflops_of(runs[0]) / gflops_of(base[0]) - 1:+.1%} GFLOPs "
            f"(paper {_paper_ratio('gflops', variant) - 1:+.1%})"
        )
        speed, base_speed = iterations_per_s(runs), iterations_per_s(base)
        if speed and base_speed:
            fact += (
                f", {speed / base_speed - 1:+.0%} training iterations a second "
                f"(paper {_paper_ratio('iterations_per_s', variant) - 1:+.0%})"
            )
        facts.append(f"{fact}.")
    return Claim(text=text, facts=facts)


def _paper_ratio(key: str, variant: Variant) -> float:
    return PAPER_TABLE_1[key][variant] / PAPER_TABLE_1[key][_CONCAT_EARLY]


def _compare_counts(
    text: str, early: Sequence[ObjectCountRow], both: Sequence[ObjectCountRow]
) -> Claim:
    comparisons = [
        compare(metric, *(mean_score(rows, metric, None, None) for rows in (early, both)))
        for metric in (ERROR, MATCH)
    ]
    pairs = [(s.object, s.asked) for s in early[0].scores if s.object and s.asked is not None]
    gains, noises = [], []
    for pair in pairs:
        first, second = (mean_score(rows, ERROR, *pair) for rows in (early, both))
        gains.append(first.value - second.value)
        noises.append(noise_between(first, second))
    lower, equal = sum(gain > 0 for gain in gains), gains.count(0.0)
    clear = sum(gain > noise for gain, noise in zip(gains, noises, strict=True))
    fact = (
        f"Here its average error is lower for {lower} of {len(pairs)} pairs and equal for {equal}; "
        f"lower beyond the noise for {clear}."
    )
    return Claim(text=text, comparisons=comparisons, facts=[fact])


def _compare_wins(early: Variant, both: Variant, found: "WinRate") -> Comparison:
    low, value, high = found.share.low, found.share.value, found.share.high
    if found.first == early.slug:
        low, value, high = 1 - high, 1 - value, 1 - low
    outcome: Outcome = "better" if low > 0.5 else "worse" if high < 0.5 else "same"
    sentence = (
        f"{both.title} is ranked above {early.title} in {value:.0%} of "
        f"{found.share.num_samples} rankings; the 95 % interval is {low:.0%} to {high:.0%}."
    )
    return Comparison(metric="Preference", outcome=outcome, sentence=sentence)
