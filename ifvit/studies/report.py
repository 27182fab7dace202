"""The verb `report`: run folders => one self-contained HTML page that compares the runs."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ifvit import storage
from ifvit.diffusion.config import ObjectiveConfig
from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow, describe_field, describe_value
from ifvit.evaluation.runs import Run, read_runs
from ifvit.figures import RUN_COLOURS
from ifvit.images import ImageError
from ifvit.models.presets import setting_of
from ifvit.records import shorten
from ifvit.studies.comparisons import compare_runs, compares, mismatches
from ifvit.studies.config import ReportConfig
from ifvit.studies.object_counts import count_panels, read_counts
from ifvit.studies.page import (
    MISSING,
    Cell,
    Line,
    Panel,
    Point,
    Table,
    inline_image,
    metric_cells,
    render_page,
    text_cell,
)
from ifvit.studies.quantities import METRICS, mean_over_seeds

_NUM_COLOURS = len(RUN_COLOURS)
_NUM_CAPTIONS = 24
_NUM_GRIDS = 6
_NUM_BINS = 100


def report(config: ReportConfig) -> None:
    """Write the page; it names the files that a run lacks.

    Raises UserError if no run is given, a folder does not exist, or a file is broken.
    """
    if not config.runs:
        raise UserError("report: no runs given; name at least one run folder")
    runs = read_runs(config.runs)
    counts, counts_excluded = read_counts({run.name: [run] for run in runs})
    differing = mismatches(runs)
    colours = {run.name: number % _NUM_COLOURS for number, run in enumerate(runs)}
    page = render_page(
        "report.html",
        title="ifvit report",
        loaded=runs,
        all_metrics=METRICS,
        runs=[{"name": name, "colour": colour} for name, colour in colours.items()],
        setting_of=setting_of,
        metrics=metric_lines({run.name: run.last for run in runs}, differing),
        comparisons=[found for other in runs[1:] if (found := compare_runs(runs[0], other))],
        protocol=_value_lines([_protocol_of(run) for run in runs]),
        mismatches=differing,
        methods=method_tables(runs),
        counts=count_panels(counts, colours),
        counts_excluded=counts_excluded,
        curves=curve_panels(runs, colours),
        captions=_caption_rows(runs),
        grids=[(run.name, _training_grids(run)) for run in runs],
        differences=recipe_differences(runs),
        dump=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    )
    storage.write_bytes(config.output, page)
    sys.stdout.write(f"{config.output}\n")


def metric_lines(
    rows: Mapping[str, MetricsRow | None], excluded: Collection[str] = ()
) -> list[Line]:
    """Return a line per measured metric with a cell for each row.

    A note marks the numbers of the `excluded` rows, which cannot be compared with the first row,
    and held-out losses of another target than the first one.
    """
    lines = []
    for metric in METRICS:
        means = {
            name: mean_over_seeds([estimate]) if (estimate := metric.of(row)) else None
            for name, row in rows.items()
        }
        if any(means.values()):
            first = next(row for row in rows.values() if metric.of(row))
            others = {name for name, row in rows.items() if not compares(metric, first, row)}
            cells = metric_cells(metric, means, others.union(excluded))
            lines.append(Line(metric.heading, [*cells.values()]))
    return lines


def method_tables(runs: Sequence[Run]) -> list[Table]:
    """Compare the alignment methods of each run that has two of them under one protocol."""
    tables = []
    for run in runs:
        for rows in _rows_by_method(run):
            seconds = [text_cell(row.seconds_per_image, "{:.3f}") for row in rows]
            methods = {str(row.protocol.sampling["method"]): row for row in rows}
            lines = [Line("Seconds per image", seconds), *metric_lines(methods)]
            tables.append(Table([f"{run.name}, step {rows[0].step:,}", *methods], lines))
    return tables


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


def recipe_differences(runs: Sequence[Run]) -> list[Line]:
    """Return a line per key of config.yaml whose value differs between runs."""
    lines = _value_lines([_flatten(run.recipe or {}) for run in runs])
    return [line for line in lines if len(set(line.cells)) > 1]


def _value_lines(rows: Sequence[Mapping[str, object]]) -> list[Line]:
    """Return a line per key of any row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [Line(n, [Cell(str(row.get(n, MISSING))) for row in rows]) for n in names]


def _protocol_of(run: Run) -> dict[str, object]:
    facts = run.last.protocol.facts | {"step": run.last.step} if run.last else {}
    return {describe_field(name): describe_value(name, value) for name, value in facts.items()}


def _flatten(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` => `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


_CURVES = (  # title, quantity of metrics.jsonl, its label, quantity over it
    ("Loss over steps", "step", "step", "loss"),
    ("Loss over time", "seconds", "training seconds", "loss"),
    ("Held-out loss over steps", "step", "step", "validation_loss"),
    ("Held-out loss over time", "seconds", "training seconds", "validation_loss"),
    ("Gradient norm", "step", "step", "grad_norm"),
    ("Samples per second", "step", "step", "samples_per_s"),
)


def curve_panels(runs: Sequence[Run], colours: Mapping[str, int]) -> list[Panel]:
    """Plot training curves: means of neighbouring log lines, in a band of most single values.

    Losses that do not compare have panels of their own.
    """
    panels = []
    for title, x, x_label, y in _CURVES:
        groups: dict[str, list[Point]] = {}
        for run in runs:
            group = _comparable_group(run, y)
            for xs, ys in _bins([(getattr(row, x), getattr(row, y)) for row in run.curve]):
                point = Point(
                    name=run.name,
                    colour=colours[run.name],
                    x=float(xs.mean()),
                    y=float(ys.mean()),
                    low=float(np.quantile(ys, 0.1)),
                    high=float(np.quantile(ys, 0.9)),
                )
                groups.setdefault(group, []).append(point)
        for group, points in groups.items():
            name = f"{title}: {group}" if len(groups) > 1 else title
            panels.append(Panel(title=name, x_label=x_label, points=points))
    return panels


def _comparable_group(run: Run, quantity: str) -> str:
    """What a loss of the run is the error of; equal for all runs that compare."""
    if not quantity.endswith("loss"):
        return ""
    target, held_out = run.target or "no weights yet", run.facts.validation
    if quantity == "loss":  # the mean over other timesteps, or with other weights, is another loss
        default = ObjectiveConfig()
        own = vars(replace(run.facts.objective, prediction=default.prediction)).items()
        changed = [f"{name} {value}" for name, value in own if value != getattr(default, name)]
        return ", ".join([target, *changed])
    return f"{target}, {held_out.get('num_samples')} samples of {held_out.get('shards')}"


def _bins(pairs: Sequence[tuple[float, float | None]]) -> Iterator[NDArray[np.float64]]:
    """Yield arrays (2, n) of neighbouring pairs without missing values, at most 100 arrays."""
    values = np.array([pair for pair in pairs if pair[1] is not None], dtype=np.float64)
    for part in np.array_split(values, min(_NUM_BINS, len(values))) if len(values) else ():
        yield part.T


def _caption_rows(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, object]]]]:
    """Return the first captions, each with its real image (if any) and the image of every run.

    A picture has the CSS variable of its colour, a data URI, None for a missing image, and marks
    that say which parts of the caption are right.
    """
    generated = [{(s.image_id, s.prompt): s for s in run.samples} for run in runs]
    wanted = list(dict.fromkeys(key for samples in generated for key in samples))[:_NUM_CAPTIONS]
    has_real = any(sample.real for run in runs for sample in run.samples)
    rows = []
    for key in wanted:
        found = [samples.get(key) for samples in generated]
        pictures: list[dict[str, object]] = []
        if has_real:
            pairs = zip(runs, found, strict=True)
            real = ((run, run.sample_url(s.real)) for run, s in pairs if s and s.real)
            uri = _inline_file(*next(real, (runs[0], None)))
            pictures.append({"colour": "muted", "uri": uri})
        for number, (run, sample) in enumerate(zip(runs, found, strict=True)):
            scores = (sample.scores if sample else None) or {}
            marks = {name: value for name, value in scores.items() if value is not None}
            uri = _inline_file(run, run.sample_url(sample.file) if sample else None)
            pictures.append({"colour": f"run{number % _NUM_COLOURS}", "uri": uri, "marks": marks})
        rows.append((shorten(key[1], 1000), pictures))
    return rows


def _inline_file(run: Run, url: str | None) -> str | None:
    """Return an image of the run as a data URI; None without the file.

    Raises UserError for a link to somewhere else, and for what is not an image.
    """
    if url is None or not storage.exists(url):
        return None
    try:
        return inline_image(storage.read_bytes(run.locate(url)))
    except ImageError as error:
        raise UserError(f"{url}: {error}") from None


def _training_grids(run: Run) -> list[tuple[int, str | None]]:
    """Return (step, data URI) of the first, the last and some grids between them."""
    grids = run.training_grids
    if len(grids) > _NUM_GRIDS:
        stride = (len(grids) - 1) / (_NUM_GRIDS - 1)
        grids = [grids[round(stride * number)] for number in range(_NUM_GRIDS)]
    return [(step, _inline_file(run, url)) for step, url in grids]
