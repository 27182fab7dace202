"""The verb `report`: run folders => one self-contained HTML page."""

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.runs import Run, Sample, read_runs
from ifvit.figures import RUN_COLOURS, house_style, to_svg
from ifvit.studies.comparisons import METRICS, compare, mismatches
from ifvit.studies.config import ReportConfig
from ifvit.studies.tables import (
    history,
    metric_lines,
    protocol_lines,
    recipe_differences,
    setting_lines,
)

_MAX_WIDTH = 1100
_SMALL = 128


def render(template: str, **values: Any) -> bytes:
    """The page as UTF-8; text in `values` is escaped, ready-made SVG is marked by the template."""
    environment = Environment(loader=PackageLoader("ifvit", "studies"), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template(template).render(**values).encode()


def inline(url: str) -> str:
    """An image file as a data URI; small ones as they are, large ones as WebP."""
    return inline_bytes(storage.read_bytes(url))


def inline_bytes(data: bytes) -> str:
    """The same for the content of a PNG file."""
    with Image.open(io.BytesIO(data)) as file:
        if file.width > _SMALL:
            picture = file.convert("RGB")
            picture.thumbnail((_MAX_WIDTH, 4 * _MAX_WIDTH), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=90)
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


Floats = NDArray[np.float64]

NUM_COLOURS = len(RUN_COLOURS)
_VARIABLES = {colour: f"run{number}" for number, colour in enumerate(RUN_COLOURS)}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity of metrics.jsonl over another."""

    title: str
    x: str
    x_label: str
    y: str
    is_log: bool = False
    """Logarithmic as soon as the values spread over more than a factor of 5."""


CURVES = (
    Curve(title="Loss over steps", x="step", x_label="step", y="loss", is_log=True),
    Curve(title="Loss over time", x="seconds", x_label="training seconds", y="loss", is_log=True),
    Curve(title="Gradient norm", x="step", x_label="step", y="grad_norm", is_log=True),
    Curve(title="Samples per second", x="step", x_label="step", y="samples_per_s"),
)


def draw_curve(curve: Curve, runs: Sequence[Run]) -> str | None:
    """SVG text with every run's raw values faint and smoothed ones solid; None without values."""
    with house_style():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        drawn = [
            _draw(axes, run, curve, RUN_COLOURS[index % NUM_COLOURS])
            for index, run in enumerate(runs)
        ]
        if not any(drawn):
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
    return to_svg(figure, _VARIABLES)


def smooth(values: Floats, window: int) -> Floats:
    """Centred moving average (N,) => (N,); at the ends over the values that there are."""
    weights = np.ones(window)
    total = np.convolve(values, weights, mode="same")
    averaged: Floats = total / np.convolve(np.ones(len(values)), weights, mode="same")
    return averaged


def _draw(axes: Axes, run: Run, curve: Curve, colour: str) -> bool:
    points = [(row[curve.x], row[curve.y]) for row in run.curve if {curve.x, curve.y} <= set(row)]
    if not points:
        return False
    x, y = np.array(points, dtype=np.float64).T
    axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.9)
    axes.plot(x, smooth(y, max(1, len(y) // 25)), color=colour, linewidth=2.0)
    return True


_NUM_CAPTIONS = 24
_NUM_GRIDS = 6


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An inline image; `uri` None is a hole. `marks` say what is right about it.

    `colour` is the CSS variable of the run that drew it.
    """

    colour: str
    uri: str | None
    marks: dict[str, bool]


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One caption, its photograph if known, and what each run drew for it."""

    caption: str
    pictures: list[Picture]


def report(config: ReportConfig) -> None:
    """Write the page; what a run lacks is a named hole in it.

    Raises UserError for a folder that does not exist or a file that is broken.
    """
    if not config.runs:
        raise UserError("report: no runs given; name at least one run folder")
    runs = read_runs(config.runs)
    page = render(
        "report.html",
        title=config.title,
        runs=[{"name": run.name, "colour": n % NUM_COLOURS} for n, run in enumerate(runs)],
        settings=setting_lines(runs),
        metrics=metric_lines(runs),
        comparisons=[found for other in runs[1:] if (found := compare(runs[0], other))],
        protocol=protocol_lines(runs),
        mismatches=mismatches(runs),
        history=history(runs),
        metric_titles=[metric.title for metric in METRICS],
        curves=[(curve.title, draw_curve(curve, runs)) for curve in CURVES],
        has_real=any(sample.real for run in runs for sample in run.samples),
        captions=_caption_rows(runs),
        grids=[(run.name, _grid_pictures(run)) for run in runs],
        differences=recipe_differences(runs),
        recipes=[(run.name, _as_yaml(run.recipe)) for run in runs],
        holes=[hole for run in runs for hole in _holes(run)],
    )
    storage.write_bytes(config.output, page)
    sys.stdout.write(f"{config.output}\n")


def _caption_rows(runs: list[Run]) -> list[CaptionRow]:
    """The first captions that were drawn; each with every run's picture of that caption."""
    drawn = [{(s.image_id, s.prompt): s for s in run.samples} for run in runs]
    wanted = list(dict.fromkeys(key for samples in drawn for key in samples))[:_NUM_CAPTIONS]
    has_real = any(sample.real for run in runs for sample in run.samples)
    rows = []
    for key in wanted:
        found = [samples.get(key) for samples in drawn]
        real = next((sample.real for sample in found if sample and sample.real), None)
        pictures = [Picture(colour="muted", uri=_inline_if_there(real), marks={})]
        pictures = pictures if has_real else []
        pictures += [_picture(f"run{n % NUM_COLOURS}", sample) for n, sample in enumerate(found)]
        rows.append(CaptionRow(caption=key[1], pictures=pictures))
    return rows


def _picture(colour: str, sample: Sample | None) -> Picture:
    scores = (sample.scores if sample else None) or {}
    marks = {name: value for name, value in scores.items() if value is not None}
    uri = _inline_if_there(sample.image if sample else None)
    return Picture(colour=colour, uri=uri, marks=marks)


def _grid_pictures(run: Run) -> list[tuple[int, str]]:
    """(step, inline image) of grids drawn while training: first, last and some between."""
    grids = run.training_grids
    if len(grids) > _NUM_GRIDS:
        stride = (len(grids) - 1) / (_NUM_GRIDS - 1)
        grids = [grids[round(stride * number)] for number in range(_NUM_GRIDS)]
    return [(step, inline(url)) for step, url in grids]


def _holes(run: Run) -> list[str]:
    """What the page would show had the run the files for it."""
    wanted = {
        f"{run.url}/config.yaml: no recipe": run.recipe,
        f"{run.url}/metrics.jsonl: no training curve": run.curve,
        f"{run.url}/weights: no backbone, so no parameters and GFLOPs": run.backbone,
        f"{run.url}/samples: no pictures from training": run.training_grids,
        f"{run.url}/evaluation: not evaluated; run ifvit evaluate --weights {run.url}": run.last,
    }
    return [text for text, found in wanted.items() if not found]


def _as_yaml(recipe: dict[str, Any] | None) -> str | None:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None


def _inline_if_there(url: str | None) -> str | None:
    return inline(url) if url and storage.exists(url) else None
