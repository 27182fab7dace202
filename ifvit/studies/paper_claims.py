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
    PAPER_CLIP_SCORE,
    RELATION,
    RETRIEVAL,
    Comparison,
    Metric,
    Outcome,
    SeedMean,
    compare,
    noise_between,
)
from ifvit.studies.object_counts import ERROR, MATCH, mean_score
from ifvit.studies.paper_tables import GFLOPS, PAPER_TABLE_1, SPEED, gflops_of, iterations_per_s
from ifvit.studies.variants import PAPER_VARIANTS, Sheet, title_of

if TYPE_CHECKING:  # a sheet without a rating study does not need the extra `rate`
    from ifvit.rating.results import PreferenceResults


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

    first: str
    second: str
    text: str
    metrics: tuple[Metric, ...] = (FID, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION)
    expected: Outcome = "better"


_METRIC_CLAIMS = (
    _MetricClaim(
        "concat_early",
        "concat_intermediate",
        "With concatenation, intermediate fusion has lower FID (5.77 against 5.98) and higher "
        "CLIP Score (0.588 against 0.584) than early fusion.",
    ),
    _MetricClaim(
        "cross_attention_early",
        "cross_attention_intermediate",
        "With cross-attention, intermediate fusion has lower FID (5.68 against 6.48) and "
        "higher CLIP Score (0.588 against 0.575) than early fusion.",
    ),
    _MetricClaim(
        "concat_early",
        "cross_attention_intermediate",
        "Intermediate fusion by cross-attention is the best of the four variants; against the "
        "baseline: FID 5.68 and 5.98, CLIP Score 0.588 and 0.584.",
    ),
    _MetricClaim(
        "cross_attention_early",
        "cross_attention_image_blocks_only",
        "Fusing in the middle blocks alone is the major source of the lower FID (Figure 7).",
        (FID,),
    ),
    _MetricClaim(
        "cross_attention_early",
        "cross_attention_image_blocks_only",
        "Fusing in the middle blocks alone lowers the CLIP Score (Figure 7).",
        (PAPER_CLIP_SCORE,),
        "worse",
    ),
    _MetricClaim(
        "cross_attention_early",
        "cross_attention_text_branch_only",
        "The text branch alone is the major source of the higher CLIP Score (Figure 7).",
        (PAPER_CLIP_SCORE,),
    ),
)
_COUNT_CLAIMS = {
    "concat": "With concatenation, intermediate fusion counts better for 18 of 20 object-count "
    "pairs.",
    "cross_attention": "With cross-attention, intermediate fusion counts better or as well for 14 "
    "of 20 object-count pairs.",
}


def make_claims(
    sheet: Sheet,
    counts: Mapping[str, Sequence[ObjectCountRow]],
    preference: "PreferenceResults | None",
) -> list[Claim]:
    """Return the claims whose variants were measured, counted or rated."""
    claims = [*(_compare_variants(sheet, claim) for claim in _METRIC_CLAIMS), _cost(sheet)]
    for mechanism, text in _COUNT_CLAIMS.items():
        rows = [counts.get(f"{mechanism}_{fusion}", ()) for fusion in ("early", "intermediate")]
        claims += [_compare_counts(text, *rows)] if all(rows) else []
    claims.append(
        Claim(
            text="People prefer each intermediate fusion variant to its early fusion counterpart.",
            facts=[
                f"{rate.first} is ranked above {rate.second} in {rate.share.value:.0%} of "
                f"{rate.share.num_samples} rankings; the 95 % interval is {rate.share.low:.0%} to "
                f"{rate.share.high:.0%}."
                for rate in (preference.win_rates if preference else ())
            ],
        )
    )
    return [claim for claim in claims if claim.comparisons or claim.facts]


def _compare_variants(sheet: Sheet, claim: _MetricClaim) -> Claim:
    comparisons = []
    for metric in claim.metrics:
        shown = sheet.quality if metric is FID else metric
        first, second = sheet.mean(claim.first, shown), sheet.mean(claim.second, shown)
        if first and second:
            found = compare(shown, first, second)
            if None in (first.seed_error, second.seed_error):
                one_run = " One variant has one run, so this noise leaves out that of other seeds."
                found = replace(found, sentence=found.sentence + one_run)
            comparisons.append(found)
    return Claim(text=claim.text, comparisons=comparisons, expected=claim.expected)


def _cost(sheet: Sheet) -> Claim:
    """Compare speed and GFLOPs with those of early concat as ratios, which any hardware allows."""
    costs = {
        variant: {GFLOPS: gflops_of(runs[0]), SPEED: iterations_per_s(runs)}
        for variant, runs in sheet.variants.items()
    }
    base, *others = PAPER_VARIANTS
    facts = [
        f"{title_of(variant)}: {metric.title} {ours / ours_base - 1:+.1%} "
        f"(paper {paper[variant] / paper[base] - 1:+.1%})."
        for variant in others
        for metric in (GFLOPS, SPEED)
        if (ours := costs.get(variant, {}).get(metric))
        and (ours_base := costs.get(base, {}).get(metric))
        and (paper := PAPER_TABLE_1[metric])
    ]
    text = "Against the baseline, all other variants train faster and need fewer operations."
    return Claim(text=text, facts=facts)


def _compare_counts(
    text: str, early: Sequence[ObjectCountRow], both: Sequence[ObjectCountRow]
) -> Claim:
    def means(metric: Metric, name: str | None, asked: int | None) -> list[SeedMean]:
        found = [mean_score(rows, metric, name, asked) for rows in (early, both)]
        return [mean for mean in found if mean]

    pairs = early[0].group_sizes
    found = [means(ERROR, *pair) for pair in pairs]
    gains = [first.value - second.value for first, second in found]
    clear = sum(gain > noise_between(*pair) for gain, pair in zip(gains, found, strict=True))
    fact = (
        f"Here its average error is lower for {sum(gain > 0 for gain in gains)} of {len(pairs)} "
        f"pairs and equal for {gains.count(0.0)}; lower beyond the noise for {clear}."
    )
    comparisons = [compare(metric, *means(metric, None, None)) for metric in (ERROR, MATCH)]
    return Claim(text=text, comparisons=comparisons, facts=[fact])
