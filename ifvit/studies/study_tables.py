"""The tables of a study's page."""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np

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
from ifvit.studies.page import MISSING, Cell, Line, Table
from ifvit.studies.quantities import (
    HELD_OUT_LOSS,
    METRIC_OF,
    METRICS,
    Metric,
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

    def notes(self, arm: str, metric: Metric, ours: float | None) -> list[str]:
        """Return the published number, and the difference of ours if the protocols agree."""
        notes = []
        for each in self._published:
            theirs = each.values.get(arm, {}).get(metric.field)
            if theirs is not None:
                notes.append(f"published {theirs:g}")
                if ours is not None and metric.field in METRIC_OF and not self.unlike[each.source]:
                    notes.append(f"ours {metric.show_change(ours - theirs)}")
        return notes


def _unlike(published: Published, rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the facts of a published protocol that our rows do not have, in words."""
    found = []
    for name, theirs in published.protocol.items():
        ours = {json.dumps(row.get(name)): row.get(name) for row in rows}
        if list(ours) != [json.dumps(theirs)]:
            shown = " and ".join(describe_value(name, one) for one in ours.values()) or "unknown"
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
    costs = {arm.name: _mean_costs(arm) if published else {} for arm in arms}
    shown = [metric for metric, found in means.items() if found]
    shown += [cost for cost in COSTS if any(cost.field in own for own in costs.values())]
    targets = _targets(evaluations)
    lines = []
    for arm in arms:
        cells = [Cell(str(len(arm.runs)))]
        for metric in shown:
            mean = means.get(metric, {}).get(arm.name)
            value = mean.value if mean else costs[arm.name].get(metric.field)
            notes = published.notes(arm.name, metric, value) if published else []
            if mean and len(mean.values) != len(arm.runs):
                notes.insert(0, f"{len(mean.values)} of {len(arm.runs)} runs")
            if metric == HELD_OUT_LOSS and arm.name in targets:
                notes.append(f"of {targets[arm.name]}")
            cell = number_cell(metric, value, mean.error if mean else None)
            outcome = outcomes.get((arm.name, metric.field), "open")
            cells.append(cell._replace(notes=(*cell.notes, *notes), outcome=outcome))
        lines.append(Line(arm.name, cells, arm.colour))
    heads = [metric.title if metric in COSTS else metric.heading for metric in shown]
    return Table(title, ["Arm", "Runs", *heads], lines)


def _mean_costs(arm: Arm) -> dict[str, float]:
    found = [costs_of(run) for run in arm.runs.values()]
    fields = dict.fromkeys(field for one in found for field in one)
    return {field: fmean(one[field] for one in found if field in one) for field in fields}


def number_cell(metric: Metric, value: float | None, error: float | None = None) -> Cell:
    """Return a cell with a number and its standard error."""
    if value is None:
        return Cell()
    notes = () if error is None else (f"± {metric.show(error)}",)
    return Cell(metric.show(value), notes, value=value, error=error)


def _targets(evaluations: Arms) -> dict[str, str]:
    """Arm => what its held-out loss is the error of; empty if all losses compare."""
    found = {
        name: one.row.target or ""
        for name, seeds in evaluations.items()
        for one in seeds.values()
        if one.row and one.row.held_out_loss
    }
    return found if len(set(found.values())) > 1 else {}


_COMPARED = (
    *("Metric", "Arm", "Against", "Seeds", "Difference", "95 % from", "to", "p", "p after Holm"),
    *("Outcome", "Error over seeds", "Error over captions", "Correlation", "Variance ratio"),
    "More seeds",
)


def _compared_cells(found: Comparison) -> list[Cell]:
    """Return all that the outcome of a comparison rests on, in the order of `_COMPARED`."""
    metric, d = found.metric, found.difference
    mean, low, high = (
        Cell() if value is None else Cell(metric.show_change(value), value=value)
        for value in (d.mean, d.low, d.high)
    )
    return [
        *map(Cell, (metric.title, found.question.arm, found.question.against, str(len(d.seeds)))),
        *(mean._replace(outcome=found.outcome), low, high),
        plain_cell(d.p_value, "{:.2g}"),
        plain_cell(found.adjusted_p, "{:.2g}"),
        Cell(found.outcome),
        number_cell(metric, d.seed_error),
        number_cell(metric, d.caption_error),
        plain_cell(d.correlation, "{:.2f}"),
        plain_cell(d.variance_ratio, "{:.2f}"),
        plain_cell(found.more_seeds, "{:,}"),
    ]


def plain_cell(value: float | None, template: str) -> Cell:
    """Return a cell with a number in this format."""
    return Cell() if value is None else Cell(template.format(value), value=value)


def differences_table(comparisons: Sequence[Comparison]) -> Table:
    """Return a line per comparison."""
    title = "Differences from the baseline"
    numbered = enumerate(comparisons, 1)
    lines = [Line(str(number), _compared_cells(found)) for number, found in numbered]
    return Table(title, ["Number", *_COMPARED], lines)


def claims_table(results: Sequence[ClaimResult]) -> Table:
    """Return a line per claim and comparison."""
    lines = []
    for result in results:
        rows = [_compared_cells(found) for found in result.comparisons]
        rows = rows or [[Cell()] * len(_COMPARED)]
        lines += [Line(result.claim.text, [Cell(result.verdict), *cells]) for cells in rows]
    return Table("Claims", ["Claim", "Verdict", *_COMPARED], lines)


def pairing_table(comparisons: Sequence[Comparison]) -> Table:
    """Return what pairing gains in each metric: medians over the arms."""
    lines = []
    for metric in dict.fromkeys(found.metric for found in comparisons):
        found = [one.difference for one in comparisons if one.metric == metric]
        correlations = [d.correlation for d in found if d.correlation is not None]
        ratios = [d.variance_ratio for d in found if d.variance_ratio is not None]
        if ratios and correlations:
            medians = [plain_cell(median(each), "{:.2f}") for each in (correlations, ratios)]
            counts = Cell(str(len(ratios))), Cell(str(max(len(d.seeds) for d in found)))
            lines.append(Line(metric.title, [*medians, *counts]))
    heads = ["Metric", "Correlation", "Variance ratio", "Comparisons", "Seeds"]
    return Table("What pairing gains", heads, lines)


def evaluations_table(selection: Selection) -> Table:
    """Return a line per evaluation of every run, in all series."""
    rows = [(run, row) for run in selection.runs for row in selection.rows[run.name]]
    metrics = [metric for metric in METRICS if any(metric.of(row) for _, row in rows)]
    lines = []
    for run, row in rows:
        cells = [
            *map(
                Cell, (str(series_of(row)), f"{row.step:,}", str(row.protocol.sampling["method"]))
            ),
            plain_cell(row.seconds_per_image, "{:.3f}"),
        ]
        for metric in metrics:
            value, error = (e.value, e.standard_error) if (e := metric.of(row)) else (None, None)
            cells.append(number_cell(metric, value, error))
        lines.append(Line(run.name, cells))
    heads = ["Run", "Evaluation", "Step", "Method", "Seconds per image"]
    return Table("All evaluations", [*heads, *(metric.heading for metric in metrics)], lines)


def protocol_table(selection: Selection) -> Table:
    """Return the protocol of each series."""
    rows = {series_of(row): row for run in selection.runs for row in selection.rows[run.name]}
    found = {str(series): rows[series] for series in selection.series}
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
    recipes = {arm.name: flatten(arm.first.recipe or {}) for arm in arms if arm.first}
    title = "What differs between recipes"
    table = _values_table(title, ["Key", *recipes], [*recipes.values()])
    return table._replace(lines=[line for line in table.lines if len(set(line.cells)) > 1])


def _values_table(title: str, heads: list[str], columns: Sequence[Mapping[str, object]]) -> Table:
    """Return a line per key of any column."""
    names = dict.fromkeys(name for column in columns for name in column)
    texts = {name: [str(column.get(name, MISSING)) for column in columns] for name in names}
    return Table(title, heads, [Line(name, [*map(Cell, own)]) for name, own in texts.items()])
