"""The tables of a study's page."""

import json
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import MetricsRow, describe_field, describe_value
from ifvit.evaluation.runs import Run
from ifvit.studies.arms import (
    Arm,
    Selection,
    flatten,
    means_of,
    operations_per_step,
    series_of,
)
from ifvit.studies.comparisons import Arms, ClaimResult, Comparison
from ifvit.studies.config import Published
from ifvit.studies.page import MISSING, Cell, Line, Table, text_cell
from ifvit.studies.quantities import (
    HELD_OUT_LOSS,
    METRIC_OF,
    METRICS,
    Metric,
    SeedMean,
)

_PETA = 1e15
COSTS = (
    Metric(field="mparams", title="Parameters, M", digits=2),
    Metric(field="gflops", title="GFLOPs", digits=3),
    Metric(field="steps", title="Steps", digits=0),
    Metric(field="petaflops", title="Training, 1e15 operations", digits=4),
    Metric(field="seconds", title="Training, seconds", digits=0),
    Metric(field="iterations_per_s", title="Training it/s", digits=2),
)
"""What a run costs. GFLOPs are those of one forward pass for one image, without attention."""


def costs_of(run: Run) -> dict[str, float]:
    """Return what a run costs, by field of COSTS; the speed is a median over the log."""
    found: dict[str, float] = {}
    if run.cost:
        found |= {"mparams": run.cost.params / 1e6, "gflops": run.cost.layer_flops / 1e9}
    if run.end:
        found |= {"steps": run.end.step, "seconds": run.end.seconds}
        if per_step := operations_per_step(run):
            found["petaflops"] = run.end.step * per_step / _PETA
        if batch := run.facts.global_batch_size:
            speeds = [row.samples_per_s for row in run.curve]
            found["iterations_per_s"] = float(np.median(speeds)) / batch
    return found


class PublishedNumbers:
    """Published numbers of the arms, and how their protocols differ from that of our rows."""

    def __init__(self, published: Sequence[Published], rows: Sequence[MetricsRow]) -> None:
        facts = [
            row.protocol.facts | {"step": row.step, "ema_decay": row.ema_decay} for row in rows
        ]
        self._published = published
        self.unlike = {each.source: _unlike(each, facts) for each in published}
        """Source => the facts of its protocol that ours does not share."""

    def find(self, arm: str, field: str) -> tuple[float, str] | None:
        """Return the number and its source; None if there is none."""
        for each in self._published:
            if field in each.values.get(arm, {}):
                return each.values[arm][field], each.source
        return None

    def notes(self, arm: str, metric: Metric, ours: float | None) -> list[str]:
        """Return the number as a note, and the difference of ours if the protocols agree."""
        found = self.find(arm, metric.field)
        if not found:
            return []
        notes = [f"published {found[0]:g}"]
        if ours is not None and metric.field in METRIC_OF and not self.unlike[found[1]]:
            notes.append(f"ours {metric.show_change(ours - found[0])}")
        return notes


def _unlike(published: Published, rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the facts of a published protocol that our rows do not have, in words."""
    found = []
    for name, theirs in published.protocol.items():
        ours = dict.fromkeys(json.dumps(row.get(name)) for row in rows)
        if list(ours) != [json.dumps(theirs)]:
            values = (describe_value(name, json.loads(value)) for value in ours)
            shown = " and ".join(values) or "unknown"
            found.append(f"{describe_field(name)} {describe_value(name, theirs)}, ours {shown}")
    return found


def arms_table(
    title: str,
    arms: Sequence[Arm],
    evaluations: Arms,
    comparisons: Sequence[Comparison] = (),
    published: PublishedNumbers | None = None,
) -> Table:
    """Return a line per arm: means over seeds with standard errors.

    An arrow marks a difference from the baseline by the rule of `comparisons`. With published
    numbers, which stand beneath ours, the table also has the costs.
    """
    outcomes = {(c.question.arm, c.metric.field): c.outcome for c in comparisons}
    means = {metric: means_of(evaluations, metric) for metric in METRIC_OF.values()}
    runs = {arm.name: arm.runs.values() if published else () for arm in arms}
    costs = {name: [costs_of(run) for run in own] for name, own in runs.items()}
    published = published or PublishedNumbers([], [])
    shown = [
        *(metric for metric, found in means.items() if found),
        *(
            cost
            for cost in COSTS
            if any(cost.field in one for own in costs.values() for one in own)
        ),
    ]
    targets = _targets(evaluations)
    lines, records = [], []
    for arm in arms:
        cells = [Cell(str(len(arm.runs)))]
        for metric in shown:
            mean = means.get(metric, {}).get(arm.name)
            spent = [one[metric.field] for one in costs[arm.name] if metric.field in one]
            value = mean.value if mean else sum(spent) / len(spent) if spent else None
            notes = [f"± {metric.show(mean.error)}"] if mean else []
            if mean and len(mean.values) != len(arm.runs):
                notes.append(f"{len(mean.values)} seeds")
            if metric == HELD_OUT_LOSS and len(targets) > 1 and arm.name in targets:
                notes.append(f"of {targets[arm.name]}")
            notes += published.notes(arm.name, metric, value)
            text = MISSING if value is None else metric.show(value)
            outcome = outcomes.get((arm.name, metric.field), "open")
            cells.append(Cell(text, tuple(notes), outcome))
            records.append(_record(arm.name, metric, mean, value, published))
        lines.append(Line(arm.name, cells, arm.colour))
    heads = [metric.title if metric in COSTS else metric.heading for metric in shown]
    return Table(title, ["Arm", "Runs", *heads], lines, records)


def _record(
    arm: str,
    metric: Metric,
    mean: SeedMean | None,
    value: float | None,
    published: PublishedNumbers,
) -> dict[str, object]:
    number, source = published.find(arm, metric.field) or (None, None)
    return {
        "arm": arm,
        "quantity": metric.field,
        "value": value,
        "seed_error": mean and mean.seed_error,
        "sample_error": mean and mean.sample_error,
        "num_seeds": mean and len(mean.values),
        "published": number,
        "source": source,
    }


def _targets(evaluations: Arms) -> dict[str, str]:
    """Arm => what its held-out loss is the error of; empty if all losses compare."""
    found = {
        name: one.row.target or ""
        for name, seeds in evaluations.items()
        for one in seeds.values()
        if one.row and one.row.held_out_loss
    }
    return found if len(set(found.values())) > 1 else {}


def differences_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Return a line per comparison, with all that its outcome rests on."""
    heads = [
        *("Arm", "Metric", "Against", "Seeds", "Difference", "95 % interval", "p", "p after Holm"),
        *("Outcome", "Error over seeds", "Error over captions", "Correlation", "Variance ratio"),
        "More seeds",
    ]
    lines = []
    for found in comparisons:
        metric, d = found.metric, found.difference
        interval = "" if d.low is None or d.high is None else _interval(metric, d.low, d.high)
        errors = (None if e is None else metric.show(e) for e in (d.seed_error, d.caption_error))
        cells = [
            Cell(metric.title),
            Cell(found.question.against),
            Cell(str(len(d.seeds))),
            Cell(metric.show_change(d.mean), outcome=found.outcome),
            Cell(interval or MISSING),
            text_cell(d.p_value, "{:.2g}"),
            text_cell(found.adjusted_p, "{:.2g}"),
            Cell(found.outcome),
            *(text_cell(error) for error in errors),
            text_cell(d.correlation, "{:.2f}"),
            text_cell(d.variance_ratio, "{:.2f}"),
            text_cell(found.more_seeds, "{:,}"),
        ]
        lines.append(Line(found.question.arm, cells))
    return Table(title, heads, lines, [comparison_record(found) for found in comparisons])


def _interval(metric: Metric, low: float, high: float) -> str:
    return f"{metric.show_change(low)} to {metric.show_change(high)}".replace(" points to", " to")


def comparison_record(found: Comparison) -> dict[str, object]:
    """Return all numbers of a comparison."""
    d = found.difference
    return {
        "arm": found.question.arm,
        "against": found.question.against,
        "metric": found.metric.field,
        "num_seeds": len(d.seeds),
        "mean": d.second,
        "mean_against": d.first,
        "difference": d.mean,
        "low": d.low,
        "high": d.high,
        "seed_error": d.seed_error,
        "caption_error": d.caption_error,
        "captions_are_paired": found.captions_are_paired,
        "p": d.p_value,
        "p_after_holm": found.adjusted_p,
        "outcome": found.outcome,
        "correlation": d.correlation,
        "variance_ratio": d.variance_ratio,
        "more_seeds": found.more_seeds,
        "seeds": " ".join(map(str, d.seeds)),
        "differences": " ".join(f"{value:.6g}" for value in d.values),
    }


def claims_table(results: Sequence[ClaimResult]) -> Table:
    """Return a line per claim and comparison."""
    lines, records = [], []
    for result in results:
        claim = result.claim
        for found in result.comparisons:
            d, metric = found.difference, found.metric
            interval = None if d.low is None or d.high is None else _interval(metric, d.low, d.high)
            cells = [
                Cell(result.verdict),
                Cell(f"{claim.arm} {claim.metrics[metric.field]} than {found.question.against}"),
                Cell(metric.title),
                Cell(metric.show_change(d.mean), outcome=found.outcome),
                text_cell(interval),
                text_cell(found.adjusted_p, "{:.2g}"),
                Cell(str(len(d.seeds))),
                text_cell(found.more_seeds, "{:,}"),
            ]
            lines.append(Line(claim.text, cells))
            own = {"claim": claim.text, "verdict": result.verdict}
            records.append(own | comparison_record(found))
        if not result.comparisons:
            lines.append(Line(claim.text, [Cell(result.verdict), *[Cell()] * 7]))
    heads = [
        *("Claim", "Verdict", "Comparison", "Metric", "Difference", "95 % interval"),
        *("p after Holm", "Seeds", "More seeds"),
    ]
    return Table("Claims", heads, lines, records)


def pairing_table(comparisons: Sequence[Comparison]) -> Table:
    """Return what pairing gains in each metric: medians over the arms."""
    lines, records = [], []
    for metric in dict.fromkeys(found.metric for found in comparisons):
        found = [c.difference for c in comparisons if c.metric == metric]
        ratios = [d.variance_ratio for d in found if d.variance_ratio is not None]
        correlations = [d.correlation for d in found if d.correlation is not None]
        if not ratios or not correlations:
            continue
        correlation, ratio = median(correlations), median(ratios)
        seeds = max(len(d.seeds) for d in found)
        cells = [Cell(f"{correlation:.2f}"), Cell(f"{ratio:.2f}"), Cell(str(len(ratios)))]
        lines.append(Line(metric.title, [*cells, Cell(str(seeds))]))
        records.append(
            {
                "metric": metric.field,
                "correlation": correlation,
                "variance_ratio": ratio,
                "num_comparisons": len(ratios),
                "num_seeds": seeds,
            }
        )
    heads = ["Metric", "Correlation", "Variance ratio", "Comparisons", "Seeds"]
    return Table("What pairing gains", heads, lines, records)


def evaluations_table(selection: Selection) -> Table:
    """Return a line per evaluation of every run, in all series."""
    rows = [(run, row) for run in selection.runs for row in selection.rows[run.name]]
    metrics = [metric for metric in METRICS if any(metric.of(row) for _, row in rows)]
    lines, records = [], []
    for run, row in rows:
        found = {metric: metric.of(row) for metric in metrics}
        series = str(series_of(row))
        cells = [Cell(series), Cell(f"{row.step:,}"), *map(estimate_cell, metrics, found.values())]
        lines.append(Line(run.name, cells))
        records.append(
            {"run": run.name, "series": series, "step": row.step}
            | {metric.field: estimate and estimate.value for metric, estimate in found.items()}
        )
    heads = ["Run", "Evaluation", "Step", *(metric.heading for metric in metrics)]
    return Table("All evaluations", heads, lines, records)


def estimate_cell(metric: Metric, estimate: Estimate | None) -> Cell:
    """Return a cell with an estimate and its standard error over samples."""
    if estimate is None:
        return Cell()
    return Cell(metric.show(estimate.value), (f"± {metric.show(estimate.standard_error)}",))


def methods_table(runs: Sequence[Run]) -> Table:
    """Return a line per alignment method of each run that has two of them under one protocol."""
    groups = [(run, rows) for run in runs for rows in _rows_by_method(run)]
    metrics = [m for m in METRICS if any(m.of(row) for _, rows in groups for row in rows)]
    lines, records = [], []
    for run, row in ((run, row) for run, rows in groups for row in rows):
        method = str(row.protocol.sampling["method"])
        found = [metric.of(row) for metric in metrics]
        cells = [Cell(f"{row.step:,}"), Cell(method), text_cell(row.seconds_per_image, "{:.3f}")]
        lines.append(Line(run.name, [*cells, *map(estimate_cell, metrics, found)]))
        own = {"run": run.name, "step": row.step, "method": method}
        own |= {"seconds_per_image": row.seconds_per_image}
        values = {m.field: e and e.value for m, e in zip(metrics, found, strict=True)}
        records.append(own | values)
    heads = ["Run", "Step", "Method", "Seconds per image", *(m.heading for m in metrics)]
    return Table("Alignment methods", heads, lines, records)


def _rows_by_method(run: Run) -> list[list[MetricsRow]]:
    """Return groups of rows that differ only in the method; the plain method comes first."""
    groups: dict[str, list[MetricsRow]] = {}
    for row in sorted(run.rows, key=lambda row: row.protocol.sampling["method"] != "plain"):
        ignored = {"name", "method", "date", "regulation"}
        facts = {name: v for name, v in row.protocol.facts.items() if name not in ignored}
        groups.setdefault(json.dumps([row.step, facts], sort_keys=True), []).append(row)
    return [
        rows
        for rows in groups.values()
        if len({row.protocol.sampling["method"] for row in rows}) > 1
    ]


def protocol_table(selection: Selection) -> Table:
    """Return the protocol of each series that is shown."""
    found = {
        str(series): next(row for run in selection.runs if (row := selection.last(run, series)))
        for series in selection.series
        if any(selection.last(run, series) for run in selection.runs)
    }
    facts = [
        {
            describe_field(name): describe_value(name, value)
            for name, value in (row.protocol.facts | {"ema_decay": row.ema_decay}).items()
        }
        for row in found.values()
    ]
    return _values_table("Protocol", ["Protocol", *found], facts)


def recipes_table(arms: Sequence[Arm]) -> Table:
    """Return a line per key of config.yaml whose value differs between arms."""
    shown = [arm for arm in arms if arm.runs]
    recipes = [flatten(next(iter(arm.runs.values())).recipe or {}) for arm in shown]
    table = _values_table(
        "What differs between recipes", ["Key", *(a.name for a in shown)], recipes
    )
    differing = [len(set(line.cells)) > 1 for line in table.lines]
    return table._replace(
        lines=[line for line, kept in zip(table.lines, differing, strict=True) if kept],
        records=[one for one, kept in zip(table.records, differing, strict=True) if kept],
    )


def _values_table(title: str, heads: list[str], columns: Sequence[Mapping[str, object]]) -> Table:
    """Return a line per key of any column."""
    names = dict.fromkeys(name for column in columns for name in column)
    texts = {name: [str(column.get(name, MISSING)) for column in columns] for name in names}
    return Table(
        title=title,
        heads=heads,
        lines=[Line(name, [*map(Cell, own)]) for name, own in texts.items()],
        records=[dict(zip(heads, [name, *own], strict=True)) for name, own in texts.items()],
    )
