"""Reads the object counts of runs (arXiv 2403.16530, Figure 5), averages, plots and tabulates them.

`report` and `report paper` show them; `ifvit evaluate --protocol object_count` measures them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ifvit import storage
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.object_count import (
    CountScore,
    ObjectCountRow,
    differences,
    read_object_counts,
)
from ifvit.evaluation.rows import FOLDER
from ifvit.evaluation.runs import Run
from ifvit.figures import INK, house_style, literal
from ifvit.records import dump_csv
from ifvit.studies.comparisons import Metric, SeedMean, mean_over_seeds

ERROR = Metric(field="average_error", title="Average error", is_percent=False, digits=3)
MATCH = Metric(field="match_ratio", title="Match ratio")

# By conditioning: early fusion, half an intermediate fusion, intermediate fusion.
_COLOURS = {
    "concat": ("#a6cbe8", "#5c9bcb", "#1f5f99"),
    "cross_attention": ("#f7c59f", "#e58e4d", "#b3541e"),
}
_OTHER = ("#9aa0a8",) * 3
_HATCHES = ("", "///", "...", "xxx")
_GROUP_WIDTH = 0.8
_COLUMNS = 3


def read_counts(runs: Sequence[Run]) -> tuple[dict[str, ObjectCountRow], list[str]]:
    """Return run name => newest row, and sentences about runs that are left out.

    A run is left out if the protocol or step of its row differs from that of the first row, so
    all returned rows can be plotted together.
    """
    rows: dict[str, ObjectCountRow] = {}
    excluded = []
    first: ObjectCountRow | None = None
    for run in runs:
        found = read_object_counts(storage.join(run.url, FOLDER))
        if not found:
            continue
        row = found[-1]
        first = first or row
        reasons = differences(first.protocol, row.protocol)
        reasons += ["step"] if row.step != first.step else []
        reasons += ["list of prompts"] if row.groups != first.groups else []
        if reasons:
            excluded.append(f"{run.name} was counted with another {', '.join(reasons)}.")
        else:
            rows[run.name] = row
    return rows, excluded


def mean_score(
    rows: Sequence[ObjectCountRow], metric: Metric, name: str | None, asked: int | None
) -> SeedMean:
    """Return the mean over runs for an object and an asked count; None means all of them."""
    return mean_over_seeds([getattr(row.score(name, asked), metric.field) for row in rows])


def mean_row(rows: Sequence[ObjectCountRow]) -> ObjectCountRow:
    """Return the first row with scores that are means over all rows, with Student's intervals."""
    if len(rows) == 1:
        return rows[0]
    scores = []
    for score in rows[0].scores:
        error, match = (mean_score(rows, m, score.object, score.asked) for m in (ERROR, MATCH))
        error_estimate, match_estimate = error.as_estimate(0.0), match.as_estimate(0.0, 1.0)
        scores.append(replace(score, average_error=error_estimate, match_ratio=match_estimate))
    return replace(rows[0], scores=tuple(scores))


def figure(rows_by_run: Mapping[str, ObjectCountRow]) -> Figure:
    """Plot bars of all runs side by side, by object and asked count, and over all counts."""
    rows = list(rows_by_run.values())
    objects, counts = rows[0].objects, rows[0].asked_counts
    num_lines = max(2, -(-len(objects) // (_COLUMNS - 1)))
    with house_style():
        drawing = Figure(figsize=(12, 1 + 2.8 * num_lines), layout="constrained")
        grid = drawing.add_gridspec(num_lines, _COLUMNS)
        shared: Axes | None = None
        for index, name in enumerate(objects):
            line, column = divmod(index, _COLUMNS - 1)
            axes = drawing.add_subplot(grid[line, column], sharey=shared)
            shared = shared or axes
            scores = [[row.score(name, count) for count in counts] for row in rows]
            _plot_bars(axes, scores, rows_by_run, ERROR)
            _label(axes, name, list(map(str, counts)), "asked count", "average error")
        for line, metric in enumerate((ERROR, MATCH)):
            axes = drawing.add_subplot(grid[line, _COLUMNS - 1])
            scores = [[row.score(name) for name in objects] for row in rows]
            _plot_bars(axes, scores, rows_by_run, metric)
            title = metric.title.lower()
            _label(axes, f"{title}, all counts", objects, "", title)
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return drawing


def table(rows_by_run: Mapping[str, ObjectCountRow]) -> bytes:
    """Return a CSV file with a line per run, object and asked count; an empty field means all."""
    records = []
    for run, row in rows_by_run.items():
        for score in row.scores:
            record = {
                "run": run,
                "weights": row.weights,
                "step": row.step,
                "object": score.object,
                "asked": score.asked,
                "num_images": score.match_ratio.num_samples,
            }
            for metric in (ERROR, MATCH):
                found: Estimate = getattr(score, metric.field)
                numbers = {"": found.value, "_low": found.low, "_high": found.high}
                record |= {f"{metric.field}{end}": f"{x:.4f}" for end, x in numbers.items()}
            records.append(record)
    return dump_csv(records)


def _styles(rows: Sequence[ObjectCountRow]) -> list[tuple[str, str]]:
    """Return a colour per variant and a hatch per run; runs of one variant differ in the hatch."""
    seen: Counter[str] = Counter()
    styles = []
    for row in rows:
        shape = row.backbone
        darkness = sum(bool(shape.get(key)) for key in ("num_image_blocks", "num_text_blocks"))
        colour = _COLOURS.get(str(shape.get("conditioning")), _OTHER)[darkness]
        styles.append((colour, _HATCHES[seen[colour] % len(_HATCHES)]))
        seen[colour] += 1
    return styles


def _plot_bars(
    axes: Axes,
    scores: Sequence[Sequence[CountScore | None]],
    rows_by_run: Mapping[str, ObjectCountRow],
    metric: Metric,
) -> None:
    """Plot a group of bars per place, with one bar per run; `scores` is indexed [run][place]."""
    width = _GROUP_WIDTH / len(rows_by_run)
    styles = _styles(list(rows_by_run.values()))
    for index, (name, (colour, hatch), line) in enumerate(
        zip(rows_by_run, styles, scores, strict=True)
    ):
        places = [place for place, score in enumerate(line) if score]
        found: list[Estimate] = [getattr(score, metric.field) for score in line if score]
        axes.bar(
            [place + (index - (len(styles) - 1) / 2) * width for place in places],
            [one.value for one in found],
            width,
            label=literal(name),
            color=colour,
            hatch=hatch,
            edgecolor="white",
            # Because of rounding, a value may lie slightly outside its interval.
            yerr=[
                [max(0.0, one.value - one.low) for one in found],
                [max(0.0, one.high - one.value) for one in found],
            ],
            capsize=1.5,
            error_kw={"elinewidth": 0.9, "ecolor": INK},
        )


def _label(axes: Axes, title: str, places: list[str], x_label: str, y_label: str) -> None:
    axes.set_title(literal(title))
    axes.set_xticks(range(len(places)), map(literal, places))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, axis="y")
