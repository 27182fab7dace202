"""Object counts of runs for Figure 5 of arXiv 2403.16530: seeds of a setting together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ifvit import storage
from ifvit.analysis.paper_claims import Claim
from ifvit.analysis.runs import step_files
from ifvit.analysis.settings import (
    PAPER_SETTINGS,
    SeedMean,
    Setting,
    mean_over_seeds,
    noise_between,
)
from ifvit.analysis.sheet import Sheet
from ifvit.analysis.verdicts import Metric, judge
from ifvit.evaluation.object_count import (
    CountScore,
    ObjectCountRow,
    differences,
    read_object_count,
)

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
