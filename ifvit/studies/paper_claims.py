"""What arXiv 2403.16530 claims, and what our runs say of it, with the noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ifvit import storage
from ifvit.evaluation.object_count import (
    CountScore,
    ObjectCountRow,
    differences,
    read_object_count,
)
from ifvit.evaluation.runs import step_files
from ifvit.models.cost import Cost
from ifvit.studies.comparisons import (
    COUNT,
    FID,
    PAPER_CLIP_SCORE,
    RELATION,
    RETRIEVAL,
    Metric,
    Outcome,
    Verdict,
    judge,
)
from ifvit.studies.paper_panels import quality_metric
from ifvit.studies.paper_tables import PAPER_TABLE_1, iterations_per_s
from ifvit.studies.sheet import Sheet
from ifvit.studies.variants import PAPER_SETTINGS, SeedMean, Setting, mean_over_seeds, noise_between

if TYPE_CHECKING:  # its statistics need the extra `rate`, which a sheet without a study does not
    from ifvit.rating.results import PreferenceResults, WinRate

_CONCAT_EARLY, _CONCAT_BOTH, _CROSS_EARLY, _CROSS_BOTH = PAPER_SETTINGS
_CROSS_IMAGE = Setting("cross_attention", True, False)
_CROSS_TEXT = Setting("cross_attention", False, True)
_ONE_RUN = " One setting has one run, so this noise leaves out that of other seeds."
_FURTHER = (RETRIEVAL, COUNT, RELATION)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper, and ours: verdicts with noise, facts that have none."""

    text: str
    verdicts: list[Verdict] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    expected: Outcome = "better"
    """The outcome that the paper's sentence means."""

    @property
    def summary(self) -> str:
        """How many verdicts agree; empty without any."""
        outcomes = [verdict.outcome for verdict in self.verdicts]
        agreeing, undecided = outcomes.count(self.expected), outcomes.count("same")
        opposed = len(outcomes) - agreeing - undecided
        counts = f"Agree: {agreeing}. Opposite: {opposed}. Within the noise: {undecided}."
        return counts if outcomes else ""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    text: str
    first: Setting
    second: Setting
    metrics: tuple[Metric, ...]
    expected: Outcome = "better"


_COMPARISONS = (
    _Comparison(
        text="With concatenation, intermediate fusion has lower FID (5.77 against 5.98) and higher "
        "CLIP Score (0.588 against 0.584) than early fusion.",
        first=_CONCAT_EARLY,
        second=_CONCAT_BOTH,
        metrics=(FID, PAPER_CLIP_SCORE, *_FURTHER),
    ),
    _Comparison(
        text="With cross-attention, intermediate fusion has lower FID (5.68 against 6.48) and "
        "higher CLIP Score (0.588 against 0.575) than early fusion.",
        first=_CROSS_EARLY,
        second=_CROSS_BOTH,
        metrics=(FID, PAPER_CLIP_SCORE, *_FURTHER),
    ),
    _Comparison(
        text="Intermediate fusion by cross-attention is the best of the four settings; against the "
        "baseline: FID 5.68 and 5.98, CLIP Score 0.588 and 0.584.",
        first=_CONCAT_EARLY,
        second=_CROSS_BOTH,
        metrics=(FID, PAPER_CLIP_SCORE, *_FURTHER),
    ),
    _Comparison(
        text="Fusing in the middle blocks alone is the major source of the lower FID (Figure 7).",
        first=_CROSS_EARLY,
        second=_CROSS_IMAGE,
        metrics=(FID,),
    ),
    _Comparison(
        text="Fusing in the middle blocks alone lowers the CLIP Score (Figure 7).",
        first=_CROSS_EARLY,
        second=_CROSS_IMAGE,
        metrics=(PAPER_CLIP_SCORE,),
        expected="worse",
    ),
    _Comparison(
        text="The text branch alone is the major source of the higher CLIP Score (Figure 7).",
        first=_CROSS_EARLY,
        second=_CROSS_TEXT,
        metrics=(PAPER_CLIP_SCORE,),
    ),
)


def compare_with_claims(sheet: Sheet) -> list[Claim]:
    """The claims that the runs can speak to; without FID the distance on CLIP features speaks."""
    return [
        claim
        for claim in (*(_judge(sheet, comparison) for comparison in _COMPARISONS), _cost(sheet))
        if claim.verdicts or claim.facts
    ]


def preference_claims(found: "PreferenceResults") -> list[Claim]:
    """About models that the study calls by their settings' slugs, pair by pair."""
    verdicts = []
    for early, both in ((_CONCAT_EARLY, _CONCAT_BOTH), (_CROSS_EARLY, _CROSS_BOTH)):
        for one in found.win_rates:
            if {one.first, one.second} == {early.slug, both.slug}:
                verdicts.append(_judge_wins(early, both, one))
    text = "People prefer each intermediate fusion setting to its early fusion counterpart."
    return [Claim(text=text, verdicts=verdicts)] if verdicts else []


def _judge_wins(early: Setting, both: Setting, found: "WinRate") -> Verdict:
    low, value, high = found.share.low, found.share.value, found.share.high
    if found.first == early.slug:
        low, value, high = 1 - high, 1 - value, 1 - low
    outcome: Outcome = "better" if low > 0.5 else "worse" if high < 0.5 else "same"
    sentence = (
        f"{both.title} is ranked above {early.title} in {value:.0%} of "
        f"{found.share.num_samples} rankings; the 95 % interval is {low:.0%} to {high:.0%}."
    )
    return Verdict(metric="Preference", outcome=outcome, sentence=sentence)


def _judge(sheet: Sheet, comparison: _Comparison) -> Claim:
    verdicts = []
    for metric in comparison.metrics:
        shown = quality_metric(sheet) if metric is FID else metric
        means = [sheet.mean(s, shown) for s in (comparison.first, comparison.second)]
        if means[0] and means[1]:
            noise = noise_between(means[0], means[1])
            verdict = judge(shown, means[0].value, means[1].value, noise)
            if any(mean.seed_error is None for mean in means if mean):
                verdict = replace(verdict, sentence=verdict.sentence + _ONE_RUN)
            verdicts.append(verdict)
    return Claim(text=comparison.text, verdicts=verdicts, expected=comparison.expected)


def _cost(sheet: Sheet) -> Claim:
    """Speed and operations against concat, early; as ratios, which need no like hardware."""
    facts = []
    base = sheet.settings.get(_CONCAT_EARLY)
    for setting in PAPER_SETTINGS[1:]:
        runs = sheet.settings.get(setting)
        if not base or not runs:
            continue
        paper, paper_base = PAPER_TABLE_1[setting], PAPER_TABLE_1[_CONCAT_EARLY]
        fact = (
            f"{setting.title}: {_flops(runs[0].cost) / _flops(base[0].cost) - 1:+.1%} GFLOPs "
            f"(paper {paper.gflops / paper_base.gflops - 1:+.1%})"
        )
        speeds = iterations_per_s(runs), iterations_per_s(base)
        if speeds[0] and speeds[1]:
            fact += (
                f", {speeds[0] / speeds[1] - 1:+.0%} training iterations a second "
                f"(paper {paper.iterations_per_s / paper_base.iterations_per_s - 1:+.0%})"
            )
        facts.append(f"{fact}.")
    text = "Against the baseline, all other settings train faster and need fewer operations."
    return Claim(text=text, facts=facts)


def _flops(cost: Cost | None) -> int:
    assert cost is not None  # or the run would have no setting
    return cost.layer_flops


_ERROR = Metric(field="average_error", title="Average error", is_percent=False, digits=3)
_MATCH = Metric(field="match_ratio", title="Match ratio")
_CLAIMS = (
    (
        "With concatenation, intermediate fusion counts better for 18 of 20 object-count pairs.",
        0,
        1,
    ),
    (
        "With cross-attention, intermediate fusion counts better or as well for 14 of 20 "
        "object-count pairs.",
        2,
        3,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Newest counts of each run that were made alike, by setting."""

    rows: dict[Setting, list[ObjectCountRow]]
    excluded: list[str]

    def figure_rows(self) -> dict[str, ObjectCountRow]:
        """A row per setting with the means over its runs, and Student's interval over them."""
        return {setting.title: _mean_row(rows) for setting, rows in self.rows.items()}


def read_counts(sheet: Sheet) -> Counts:
    """What `ifvit count-objects` left in the runs; the first run's protocol is the measure."""
    rows: dict[Setting, list[ObjectCountRow]] = {}
    excluded = []
    first: ObjectCountRow | None = None
    for setting, runs in sheet.settings.items():
        for run in runs:
            files = step_files(storage.join(run.url, "evaluation", "object_count"), ".json")
            if not files:
                continue
            row = read_object_count(files[-1][1])
            first = first or row
            reasons = differences(first.protocol, row.protocol)
            reasons += ["step"] if row.step != first.step else []
            if reasons:
                excluded.append(f"{run.name} was counted with another {', '.join(reasons)}.")
            else:
                rows.setdefault(setting, []).append(row)
    return Counts(rows=rows, excluded=excluded)


def count_claims(counts: Counts) -> list[Claim]:
    """The paper's two sentences about pairs of object and count, with our pairs."""
    return [
        _compare(text, counts.rows[PAPER_SETTINGS[early]], counts.rows[PAPER_SETTINGS[both]])
        for text, early, both in _CLAIMS
        if {PAPER_SETTINGS[early], PAPER_SETTINGS[both]} <= set(counts.rows)
    ]


def _compare(text: str, early: list[ObjectCountRow], both: list[ObjectCountRow]) -> Claim:
    verdicts = []
    for metric in (_ERROR, _MATCH):
        first, second = (_mean(rows, metric, None, None) for rows in (early, both))
        verdicts.append(judge(metric, first.value, second.value, noise_between(first, second)))
    pairs = [(s.object, s.asked) for s in early[0].scores if s.object and s.asked is not None]
    means = [[_mean(rows, _ERROR, *pair) for rows in (early, both)] for pair in pairs]
    lower = sum(second.value < first.value for first, second in means)
    equal = sum(second.value == first.value for first, second in means)
    clear = sum(
        first.value - second.value > noise_between(first, second) for first, second in means
    )
    fact = (
        f"Here its average error is lower for {lower} of {len(pairs)} pairs and equal for {equal}; "
        f"lower beyond the noise for {clear}."
    )
    return Claim(text=text, verdicts=verdicts, facts=[fact])


def _mean(
    rows: Sequence[ObjectCountRow], metric: Metric, object_: str | None, asked: int | None
) -> SeedMean:
    scores = [row.score(object_, asked) for row in rows]
    return mean_over_seeds([getattr(score, metric.field) for score in scores])


def _mean_row(rows: list[ObjectCountRow]) -> ObjectCountRow:
    scores = tuple(
        CountScore(
            object=score.object,
            asked=score.asked,
            average_error=_mean(rows, _ERROR, score.object, score.asked).as_estimate(0.0),
            match_ratio=_mean(rows, _MATCH, score.object, score.asked).as_estimate(0.0, 1.0),
        )
        for score in rows[0].scores
    )
    return rows[0] if len(rows) == 1 else replace(rows[0], scores=scores)
