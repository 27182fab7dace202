"""What the pages of `report` and `report paper` consist of: tables, plots, pictures, templates."""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, TemplateError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ifvit.errors import UserError
from ifvit.figures import COLOURS, house_style, literal, to_png, to_svg
from ifvit.images import open_image
from ifvit.records import dump_csv, shorten
from ifvit.studies.quantities import Metric, SeedMean

MISSING = "—"
"""Text of a cell without a value."""

_MAX_WIDTH = 1100
_SMALL = 128
_PANEL_SIZE = (4.6, 3.4)
_COLUMNS = 3
_GROUP_WIDTH = 0.8
_DOT_SHIFT = 0.08
_MAX_MARKERS = 20
_LOOKS = {"colour", "is_hollow"}
_LOGARITHMIC = 5
"""Axes are logarithmic when the values span more than this factor."""


def render_page(template: str, **values: Any) -> bytes:
    """Render a template of this package to UTF-8; text is escaped unless marked as safe.

    Raises UserError for a template that was changed and no longer renders.
    """
    environment = Environment(loader=PackageLoader("ifvit", "studies"), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    try:
        return environment.get_template(template).render(**values).encode(errors="replace")
    except TemplateError as error:
        raise UserError(
            f"ifvit/studies/{template}: damaged ({shorten(error)}); install ifvit again"
        ) from None


def inline_image(data: bytes) -> str:
    """Return an image file as a data URI; images wider than 128 pixels as WebP."""
    image = open_image(data)
    if image.width > _SMALL:
        picture = image.convert("RGB")
        picture.thumbnail((_MAX_WIDTH, 4 * _MAX_WIDTH), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=90)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


class Cell(NamedTuple):
    """A value in a table; `note` is printed small beside it."""

    text: str = MISSING
    note: str = ""
    is_best: bool = False


class Line(NamedTuple):
    """A line of a table."""

    title: str
    cells: list[Cell]


class Table(NamedTuple):
    """A table; `heads` has the title of each column, the first one included.

    `records` are its numbers with all their digits, for a CSV file.
    """

    heads: list[str]
    lines: list[Line]
    records: Sequence[dict[str, object]] = ()


def text_cell(value: object, template: str = "{}", note: str = "") -> Cell:
    """Return a cell with a value; without the value, a cell that says so."""
    return Cell() if value is None else Cell(text=template.format(value), note=note)


def metric_cells(
    metric: Metric,
    means: Mapping[str, SeedMean | None],
    excluded: Collection[str] = (),
    best: str | None = None,
) -> dict[str, Cell]:
    """Return a cell with a standard error for each mean; that of `best` is marked.

    Those that are `excluded` are not compared with the others, and their notes say so.
    """
    cells = {}
    for key, mean in means.items():
        notes = [f"± {metric.show(mean.error)}"] if mean and mean.error else []
        notes += ["not compared"] if mean and key in excluded else []
        text = metric.show(mean.value) if mean else MISSING
        cells[key] = Cell(text, ", ".join(notes), is_best=key == best)
    return cells


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of one run, variant or model, in an interval from `low` to `high`.

    `colour` is an index of COLOURS; `values` holds the number of each run behind a mean.
    """

    name: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    is_hollow: bool = False
    values: tuple[float, ...] = ()
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The content of one pair of axes: lines in bands, which are the intervals of their points.

    With `places`, x is an index of `places`, and points of several names stand side by side there.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    points: list[Point]
    places: tuple[str, ...] = ()

    @property
    def svg(self) -> str | None:
        """The panel without its title, which the page shows as text; None without points."""
        if not self.points:
            return None
        with house_style():
            figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
            axes = figure.add_subplot()
            _plot(axes, self)
            axes.set_title("")
            return to_svg(figure)


def panels_to_csv(panels: Sequence[Panel]) -> bytes:
    """Return a CSV file with a line per point."""
    records: list[dict[str, object]] = [
        {
            "panel": panel.title,
            "place": panel.places[round(point.x)].replace("\n", " ") if panel.places else None,
            **{key: value for key, value in vars(point).items() if key not in _LOOKS},
        }
        for panel in panels
        for point in panel.points
    ]
    return dump_csv(records)


def panels_to_png(panels: Sequence[Panel]) -> bytes:
    """Return a PNG of all panels, three in a row, with one legend."""
    num_columns = min(_COLUMNS, len(panels))
    num_lines = -(-len(panels) // num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_lines + 0.5)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        handles = {}
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(num_lines, num_columns, number)
            _plot(axes, panel)
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles[name] = handle
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
        return to_png(figure)


def _plot(axes: Axes, panel: Panel) -> None:
    names = list(dict.fromkeys(point.name for point in panel.points))
    is_crowded = len({point.x for point in panel.points}) < len(panel.points)
    for index, name in enumerate(names):
        points = [point for point in panel.points if point.name == name]
        if panel.places:
            shift = (index - (len(names) - 1) / 2) * _GROUP_WIDTH / len(names) * is_crowded
            _plot_places(axes, points, shift)
        else:
            _plot_line(axes, points)
    axes.set_title(literal(panel.title))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, axis="y")
    if panel.places:
        axes.set_xticks(range(len(panel.places)), map(literal, panel.places), fontsize=9)
        axes.set_xlim(-0.5, len(panel.places) - 0.5)
        return
    axes.xaxis.set_major_locator(MaxNLocator(5))
    low, high = axes.dataLim.intervaly
    if high > _LOGARITHMIC * low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def _plot_line(axes: Axes, points: Sequence[Point]) -> None:
    """Plot a line in a band; it is dashed if its points are hollow."""
    first, colour, x = points[0], COLOURS[points[0].colour], [point.x for point in points]
    band = [point.low for point in points], [point.high for point in points]
    axes.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        x,
        [point.y for point in points],
        color=colour,
        linestyle="--" if first.is_hollow else "-",
        linewidth=1.8,
        marker="o" if len(points) <= _MAX_MARKERS else "",
        markersize=5,
        markerfacecolor="none" if first.is_hollow else colour,
        label=literal(first.name),
    )
    for point in (first, points[-1]):
        if point.label:
            place = (point.x, point.y)
            axes.annotate(point.label, place, (4, 4), textcoords="offset points", fontsize=8)


def _plot_places(axes: Axes, points: Sequence[Point], shift: float) -> None:
    """Plot means with whiskers, and beside each mean of several runs a dot for each run."""
    first, colour = points[0], COLOURS[points[0].colour]
    axes.errorbar(
        [point.x + shift for point in points],
        [point.y for point in points],
        # Because of rounding, a value may lie slightly outside its interval.
        [
            [max(0.0, point.y - point.low) for point in points],
            [max(0.0, point.high - point.y) for point in points],
        ],
        color=colour,
        linestyle="",
        elinewidth=1.0,
        capsize=2,
        marker="o",
        markersize=5,
        markerfacecolor="none" if first.is_hollow else colour,
        label=literal(first.name),
    )
    for point in points:
        if len(point.values) > 1:
            x = [point.x + shift + _DOT_SHIFT] * len(point.values)
            axes.plot(x, point.values, ".", color=colour, alpha=0.55)
