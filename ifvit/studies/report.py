"""The verb `report`: run folders => one self-contained HTML page that compares the runs."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow, describe_field, describe_value
from ifvit.evaluation.runs import Run, read_runs
from ifvit.figures import RUN_COLOURS, house_style, to_svg
from ifvit.images import ImageError
from ifvit.models.config import FusionTransformerConfig, setting_of
from ifvit.records import shorten
from ifvit.studies.comparisons import (
    METRICS,
    Metric,
    SeedMean,
    compare_runs,
    mean_over_seeds,
    mismatches,
)
from ifvit.studies.config import ReportConfig
from ifvit.studies.object_counts import count_panels, read_counts
from ifvit.studies.page import (
    MISSING,
    Cell,
    Line,
    Table,
    inline_image,
    legend_of,
    metric_cells,
    render_page,
    text_cell,
)

_NUM_COLOURS = len(RUN_COLOURS)
_NUM_CAPTIONS = 24
_NUM_GRIDS = 6


def report(config: ReportConfig) -> None:
    """Write the page; it names the files that a run lacks.

    Raises UserError if no run is given, a folder does not exist, or a file is broken.
    """
    if not config.runs:
        raise UserError("report: no runs given; name at least one run folder")
    runs = read_runs(config.runs)
    counts, counts_excluded = read_counts(runs)
    colours = {run.name: number % _NUM_COLOURS for number, run in enumerate(runs)}
    page = render_page(
        "report.html",
        title=config.title,
        runs=[{"name": name, "colour": colour} for name, colour in colours.items()],
        maps=fusion_maps(runs),
        settings=settings_lines(runs),
        metrics=metric_lines(runs),
        comparisons=[found for other in runs[1:] if (found := compare_runs(runs[0], other))],
        protocol=protocol_lines(runs),
        mismatches=mismatches(runs),
        methods=method_table(runs),
        counts=count_panels({name: [row] for name, row in counts.items()}, colours),
        counts_excluded=counts_excluded,
        legend_of=legend_of,
        history=evaluation_history(runs),
        curves=[{"title": curve.title, "svg": plot_curve(curve, runs)} for curve in _CURVES],
        has_real=any(sample.real for run in runs for sample in run.samples),
        captions=_caption_rows(runs),
        grids=[(run.name, _training_grids(run)) for run in runs],
        differences=recipe_differences(runs),
        recipes=[
            (
                run.name,
                run.recipe and yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
            )
            for run in runs
        ],
        missing=[text for run in runs for text in _missing_files(run)],
    )
    storage.write_bytes(config.output, page)
    sys.stdout.write(f"{config.output}\n")


# Tables


def fusion_maps(runs: Sequence[Run]) -> list[tuple[str, FusionTransformerConfig]]:
    """Return name and configuration of the runs whose backbone has a fusion map."""
    return [(r.name, r.backbone) for r in runs if isinstance(r.backbone, FusionTransformerConfig)]


def settings_lines(runs: Sequence[Run]) -> list[Line]:
    """Return lines about backbone, cost and training, with a cell per run."""

    def line(title: str, values: Sequence[object], template: str = "{}", note: str = "") -> Line:
        return Line(title=title, cells=[text_cell(value, template, note) for value in values])

    shapes = [b if isinstance(b := run.backbone, FusionTransformerConfig) else None for run in runs]
    costs = [run.cost for run in runs]
    ends = [run.curve[-1] if run.curve else None for run in runs]
    return [
        line("Architecture", [run.backbone and run.backbone.architecture for run in runs]),
        line("Fusion map", [s and s.fusion for s in shapes]),
        line("Text-branch blocks", [s and s.num_text_blocks for s in shapes]),
        line("Setting of the paper", [s and setting_of(s) for s in shapes]),
        line("Blocks, width", [s and f"{len(s.blocks)}, {s.width}" for s in shapes]),
        line("Parameters", [c and c.params for c in costs], "{:,}"),
        line("GFLOPs", [c and c.layer_flops / 1e9 for c in costs], "{:.3f}"),
        line("GFLOPs with attention", [c and c.flops / 1e9 for c in costs], "{:.3f}"),
        line("Steps", [end and end.step for end in ends], "{:,}"),
        line("Images seen", [end and end.samples_seen for end in ends], "{:,}"),
        line("Training seconds", [end and end.seconds for end in ends], "{:,.0f}"),
        line("Last loss", [_last_loss(run) for run in runs], "{:.4f}", "mean of the last tenth"),
    ]


def metric_lines(runs: Sequence[Run]) -> list[Line]:
    """Return a line per measured metric, with standard errors; a clearly best run is marked.

    A note marks the numbers of runs that cannot be compared with the first run.
    """
    excluded = mismatches(runs)
    lines = []
    for metric in METRICS:
        means = {run.name: _mean(metric, run.last) for run in runs}
        if any(means.values()):
            hint = " (lower is better)" if metric.lower_is_better else ""
            cells = list(metric_cells(metric, means, excluded).values())
            lines.append(Line(title=f"{metric.title}{hint}", cells=cells))
    return lines


def method_table(runs: Sequence[Run]) -> Table:
    """Compare the alignment methods of each run.

    A run without two methods under one protocol has no lines. A value that is clearly the best of
    its run's methods is marked.
    """
    groups = [(run.name, rows) for run in runs for rows in _rows_by_method(run)]
    metrics = [m for m in METRICS if any(m.of(row) for _, rows in groups for row in rows)]
    lines = []
    for name, rows in groups:
        base = rows[0].seconds_per_image
        cells = [
            metric_cells(metric, {n: _mean(metric, row) for n, row in enumerate(rows)})
            for metric in metrics
        ]
        for number, row in enumerate(rows):
            seconds = row.seconds_per_image
            note = f"{seconds / base - 1:+.0%}" if seconds and base and number else ""
            title = f"{name}, {row.protocol.sampling['method']}, step {row.step:,}"
            time = text_cell(seconds, "{:.3f}", note)
            lines.append(Line(title=title, cells=[time, *(column[number] for column in cells)]))
    heads = ["Run, method", "Seconds per image", *(metric.heading for metric in metrics)]
    return Table(heads=heads, lines=lines)


def _mean(metric: Metric, row: MetricsRow | None) -> SeedMean | None:
    estimate = metric.of(row)
    return mean_over_seeds([estimate]) if estimate else None


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


def protocol_lines(runs: Sequence[Run]) -> list[Line]:
    """Return a line per field of the protocols of the runs' last evaluations."""
    rows = [run.last.protocol.facts | {"step": run.last.step} if run.last else {} for run in runs]
    return [
        Line(
            title=describe_field(name),
            cells=[Cell(text=describe_value(name, row.get(name, MISSING))) for row in rows],
        )
        for name in dict.fromkeys(name for row in rows for name in row)
    ]


def recipe_differences(runs: Sequence[Run]) -> list[Line]:
    """Return a line per key of config.yaml whose value differs between runs."""
    flat = [_flatten(run.recipe or {}) for run in runs]
    return [
        Line(title=name, cells=[Cell(text=str(recipe.get(name, MISSING))) for recipe in flat])
        for name in dict.fromkeys(name for recipe in flat for name in recipe)
        if len({repr(recipe.get(name)) for recipe in flat}) > 1
    ]


def evaluation_history(runs: Sequence[Run]) -> Table | None:
    """Return the metrics of all evaluations; None if no run has two."""
    if all(len(run.evaluations) < 2 for run in runs):
        return None
    lines = [
        Line(
            title=f"{run.name}, step {row.step:,}",
            cells=[
                text_cell(e and metric.show(e.value))
                for metric in METRICS
                for e in [metric.of(row)]
            ],
        )
        for run in runs
        for row in run.evaluations
    ]
    return Table(heads=["Run", *(metric.title for metric in METRICS)], lines=lines)


def _last_loss(run: Run) -> float | None:
    losses = [row.loss for row in run.curve if row.loss is not None]
    last = losses[-math.ceil(len(losses) / 10) :]
    return sum(last) / len(last) if last else None


def _flatten(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` => `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


# Training curves


class _Curve(NamedTuple):
    """One quantity of metrics.jsonl over another."""

    title: str
    x: str
    x_label: str
    y: str
    is_log: bool
    """Whether the axis is logarithmic when the values span more than a factor of 5."""


_CURVES = (
    _Curve("Loss over steps", "step", "step", "loss", is_log=True),
    _Curve("Loss over time", "seconds", "training seconds", "loss", is_log=True),
    _Curve("Gradient norm", "step", "step", "grad_norm", is_log=True),
    _Curve("Samples per second", "step", "step", "samples_per_s", is_log=False),
)


def plot_curve(curve: _Curve, runs: Sequence[Run]) -> str | None:
    """Return an SVG with faint values and solid moving averages; None without values."""
    with house_style():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            pairs = [(getattr(row, curve.x), getattr(row, curve.y)) for row in run.curve]
            points = [(x, y) for x, y in pairs if y is not None]
            if not points:
                continue
            x, y = np.array(points, dtype=np.float64).T
            colour = RUN_COLOURS[number % _NUM_COLOURS]
            axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.9)
            axes.plot(x, smooth(y, max(1, len(y) // 25)), color=colour, linewidth=2.0)
        if not axes.lines:
            return None
        low, high = axes.dataLim.intervaly
        if curve.is_log and high > 5 * low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(curve.x_label)
        axes.grid(visible=True, axis="y")
        axes.margins(x=0.01)
    return to_svg(figure)


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centred moving average (N,) => (N,); at both ends the window is shorter."""
    weights = np.ones(window)
    total = np.convolve(values, weights, mode="same")
    averaged: NDArray[np.float64] = total / np.convolve(np.ones(len(values)), weights, mode="same")
    return averaged


# Pictures, recipes and missing files


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """An image on the page; `uri` is None for a missing image.

    `colour` is the CSS variable of its run; `marks` says which parts of the caption are right.
    """

    colour: str
    uri: str | None
    marks: dict[str, bool]


def _caption_rows(runs: Sequence[Run]) -> list[tuple[str, list[_Picture]]]:
    """Return the first captions, each with its real image (if any) and the image of every run."""
    generated = [{(s.image_id, s.prompt): s for s in run.samples} for run in runs]
    wanted = list(dict.fromkeys(key for samples in generated for key in samples))[:_NUM_CAPTIONS]
    has_real = any(sample.real for run in runs for sample in run.samples)
    rows = []
    for key in wanted:
        found = [samples.get(key) for samples in generated]
        pictures = []
        if has_real:
            real = ((run, s.real) for run, s in zip(runs, found, strict=True) if s and s.real)
            uri = _inline_if_there(*next(real, (runs[0], None)))
            pictures.append(_Picture(colour="muted", uri=uri, marks={}))
        for number, (run, sample) in enumerate(zip(runs, found, strict=True)):
            scores = (sample.scores if sample else None) or {}
            marks = {name: value for name, value in scores.items() if value is not None}
            uri = _inline_if_there(run, sample.image if sample else None)
            pictures.append(_Picture(colour=f"run{number % _NUM_COLOURS}", uri=uri, marks=marks))
        rows.append((shorten(key[1], 1000), pictures))
    return rows


def _inline_if_there(run: Run, url: str | None) -> str | None:
    return _inline_file(run, url) if url and storage.exists(url) else None


def _inline_file(run: Run, url: str) -> str:
    """Return an image of the run as a data URI. Raises UserError for a link to somewhere else."""
    try:
        return inline_image(storage.read_bytes(run.locate(url)))
    except ImageError as error:
        raise UserError(f"{url}: {error}") from None


def _training_grids(run: Run) -> list[tuple[int, str]]:
    """Return (step, data URI) of the first, the last and some grids between them."""
    grids = run.training_grids
    if len(grids) > _NUM_GRIDS:
        stride = (len(grids) - 1) / (_NUM_GRIDS - 1)
        grids = [grids[round(stride * number)] for number in range(_NUM_GRIDS)]
    return [(step, _inline_file(run, url)) for step, url in grids]


def _missing_files(run: Run) -> list[str]:
    """Return each missing file of the run and what the page lacks without it."""
    wanted = {
        f"{run.url}/config.yaml: no recipe": run.recipe,
        f"{run.url}/metrics.jsonl: no training curve": run.curve,
        f"{run.url}/weights: no backbone, so no parameters and GFLOPs": run.backbone,
        f"{run.url}/samples: no pictures from training": run.training_grids,
        f"{run.url}/evaluation: not evaluated; run ifvit evaluate --weights {run.url}": run.last,
    }
    return [text for text, found in wanted.items() if not found]
