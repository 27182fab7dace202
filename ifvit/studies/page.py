"""What the page of a study consists of: tables, plots, pictures, and the template."""

import base64
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ifvit.figures import COLOURS, INK, house_style, literal, to_png, to_svg
from ifvit.images import open_image
from ifvit.records import dump_csv, shorten
from ifvit.studies.comparisons import Comparison
from ifvit.studies.quantities import Metric
from ifvit.studies.statistics import Outcome

MISSING = "—"
"""Text of a cell without a value."""

_MAX_WIDTH = 1100
_SMALL = 128
_PANEL_SIZE = (4.6, 3.4)
_ROW_HEIGHT, _LOW_ROW = 0.46, 0.3
_MANY_ROWS = 12
"""Forest plots of more differences have low rows."""
_COLUMNS = 3
_GROUP_WIDTH = 0.8
_DOT_SHIFT = 0.08
_MAX_MARKERS = 20
_LOGARITHMIC = 5
"""Axes are logarithmic when the values span more than this factor."""


def render_page(template: str, **values: Any) -> bytes:
    """Render a template of this package to UTF-8; text is escaped unless marked as safe."""
    environment = Environment(loader=PackageLoader("ifvit", "studies"), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template(template).render(**values).encode(errors="replace")


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
    """A value in a table; `notes` are printed small beneath it, `outcome` as an arrow.

    `value` and `error` are the number with all digits and its standard error, for files.
    """

    text: str = MISSING
    notes: tuple[str, ...] = ()
    outcome: Outcome = "open"
    value: float | None = None
    error: float | None = None


class Line(NamedTuple):
    """A line of a table; `colour` is that of its arm, an index of COLOURS."""

    title: str
    cells: Sequence[Cell]
    colour: int | None = None


class Table(NamedTuple):
    """A table; `heads` has the title of each column, the first one included."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Line]

    @property
    def csv(self) -> bytes:
        """The table as CSV, with columns of standard errors and all digits."""
        columns = zip(*(line.cells for line in self.lines), strict=True)
        has_errors = (any(cell.error is not None for cell in column) for column in columns)
        heads = [*zip(self.heads[1:], has_errors, strict=True)]
        records = []
        for line in self.lines:
            record: dict[str, object] = {self.heads[0]: line.title}
            for (head, has_error), cell in zip(heads, line.cells, strict=True):
                text = None if cell.text == MISSING else cell.text
                record[head] = text if cell.value is None else cell.value
                record |= {f"{head} error": cell.error} if has_error else {}
            records.append(record)
        return dump_csv(records)

    @property
    def markdown(self) -> str:
        """The table with its title as Markdown."""
        rows = [[line.title, *map(_cell_text, line.cells)] for line in self.lines]
        lines = [self.heads, ["---"] * len(self.heads), *rows]
        escaped = (" | ".join(text.replace("|", r"\|") for text in line) for line in lines)
        return "\n".join([f"### {self.title}", "", *(f"| {line} |" for line in escaped), ""])


def _cell_text(cell: Cell) -> str:
    arrow = {"better": " ▲", "worse": " ▼", "open": ""}[cell.outcome]
    return "; ".join([cell.text, *cell.notes]).replace("; ±", " ±") + arrow


class PageFigure(NamedTuple):
    """A figure of the page: plots or a picture, and the numbers behind it."""

    title: str
    text: str
    """What it shows; for the reader."""
    plots: "Sequence[Panel | Forest]" = ()
    picture: Figure | None = None
    picture_records: Sequence[Mapping[str, object]] = ()

    @property
    def records(self) -> list[Mapping[str, object]]:
        """The numbers behind the plots, or behind the picture."""
        return [*self.picture_records, *(row for plot in self.plots for row in plot.records)]

    @property
    def png(self) -> bytes:
        """The figure as a PNG file on white."""
        return plots_to_png(self.plots) if self.picture is None else to_png(self.picture)

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return inline_image(self.png)

    @property
    def csv(self) -> bytes:
        """The numbers as a CSV file."""
        return dump_csv(self.records)

    @property
    def svgs(self) -> Iterator[tuple[str, str]]:
        """The title of each plot, and the plot without it, which the page shows as text."""
        for plot in self.plots:
            with house_style():
                figure = Figure(figsize=plot.size, layout="constrained")
                plot.draw(figure.add_subplot())
                yield plot.title, to_svg(figure)


def plots_to_png(plots: "Sequence[Panel | Forest]") -> bytes:
    """Return a PNG of all plots, three in a row, with one legend."""
    num_columns = min(_COLUMNS, len(plots))
    num_lines = -(-len(plots) // num_columns)
    size = plots[0].size[0] * num_columns, plots[0].size[1] * num_lines + 0.5
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        handles = {}
        for number, plot in enumerate(plots, 1):
            axes = figure.add_subplot(num_lines, num_columns, number)
            plot.draw(axes)
            axes.set_title(literal(plot.title))
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles[name] = handle
        if handles:
            place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(4, len(handles))}
            figure.legend(handles.values(), handles.keys(), **place)
        return to_png(figure)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of one arm or model, in an interval from `low` to `high`.

    `colour` is an index of COLOURS; `values` holds the number of each run behind a mean.
    """

    name: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes with lines in bands, which are the intervals of their points.

    With `places`, x is an index of `places`, and points of several names stand side by side there.
    """

    title: str
    points: Sequence[Point]
    x_label: str = ""
    y_label: str = ""
    places: tuple[str, ...] = ()
    size: ClassVar[tuple[float, float]] = _PANEL_SIZE
    """Width and height in inches."""

    @property
    def records(self) -> list[dict[str, object]]:
        """A record per point."""
        return [
            {
                "panel": self.title,
                "place": self.places[round(point.x)] if self.places else None,
                **{key: value for key, value in vars(point).items() if key != "colour"},
            }
            for point in self.points
        ]

    def draw(self, axes: Axes) -> None:
        """Draw the points of each name in its colour."""
        names = list(dict.fromkeys(point.name for point in self.points))
        is_crowded = len({point.x for point in self.points}) < len(self.points)
        for index, name in enumerate(names):
            points = [point for point in self.points if point.name == name]
            if self.places:
                shift = (index - (len(names) - 1) / 2) * _GROUP_WIDTH / len(names) * is_crowded
                _draw_places(axes, points, shift)
            else:
                _draw_line(axes, points)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        axes.grid(visible=True, axis="y")
        if self.places:
            axes.set_xticks(range(len(self.places)), map(wrap_name, self.places), fontsize=9)
            axes.set_xlim(-0.5, len(self.places) - 0.5)
            return
        axes.xaxis.set_major_locator(MaxNLocator(5))
        low, high = axes.dataLim.intervaly
        if high > _LOGARITHMIC * low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")


def _draw_line(axes: Axes, points: Sequence[Point]) -> None:
    """Draw a line in a band."""
    first, colour, x = points[0], COLOURS[points[0].colour], [point.x for point in points]
    band = [point.low for point in points], [point.high for point in points]
    axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    marker = "o" if len(points) <= _MAX_MARKERS else ""
    style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 4}
    axes.plot(x, [point.y for point in points], label=literal(first.name), **style)
    for point in (first, points[-1]):
        if point.label:
            place = (point.x, point.y)
            axes.annotate(point.label, place, (4, 4), textcoords="offset points", fontsize=8)


def _draw_places(axes: Axes, points: Sequence[Point], shift: float) -> None:
    """Draw means with whiskers, and beside each mean of several runs a dot for each run."""
    colour = COLOURS[points[0].colour]
    x, y = [point.x + shift for point in points], [point.y for point in points]
    # Because of rounding, a value may lie slightly outside its interval.
    below = [max(0.0, point.y - point.low) for point in points]
    above = [max(0.0, point.high - point.y) for point in points]
    style: dict[str, Any] = {"color": colour, "linestyle": "", "elinewidth": 1.0, "capsize": 2}
    style |= {"marker": "o", "markersize": 5, "label": literal(points[0].name)}
    axes.errorbar(x, y, [below, above], **style)
    for point in points:
        if len(point.values) > 1:
            dots = [point.x + shift + _DOT_SHIFT] * len(point.values)
            axes.plot(dots, point.values, ".", color=colour, alpha=0.55)


@dataclass(frozen=True, kw_only=True)
class Forest:
    """A forest plot: the differences of arms in one metric, beside the line of no difference.

    Filled marks are those that are called a difference; dots are single seeds.
    """

    metric: Metric
    comparisons: Sequence[Comparison]
    colours: Mapping[str, int]
    """Arm => index of COLOURS."""

    @property
    def title(self) -> str:
        """Title of the metric."""
        return self.metric.title

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        count = len(self.comparisons)
        return _PANEL_SIZE[0], 0.85 + count * (_LOW_ROW if count > _MANY_ROWS else _ROW_HEIGHT)

    @property
    def records(self) -> list[dict[str, object]]:
        """A record per difference."""
        return [
            {
                "metric": self.title,
                "name": found.question.arm,
                "mean": found.difference.mean,
                "low": found.difference.low,
                "high": found.difference.high,
                "values": found.difference.values,
                "outcome": found.outcome,
            }
            for found in self.comparisons
        ]

    def draw(self, axes: Axes) -> None:
        """Draw the first difference at the top."""
        axes.axvline(0, color=INK, linewidth=1)
        for place, found in enumerate(self.comparisons):
            colour, d = COLOURS[self.colours[found.question.arm]], found.difference
            if d.low is not None and d.high is not None:
                ends: dict[str, Any] = {"color": colour, "solid_capstyle": "round"}
                axes.plot([d.low, d.high], [place, place], linewidth=2.2, alpha=0.75, **ends)
            if len(d.values) > 1:
                heights = [place + 0.26] * len(d.values)
                axes.plot(d.values, heights, ".", color=colour, alpha=0.5, markersize=5)
            face = "none" if found.outcome == "open" else colour
            axes.plot(d.mean, place, "o", color=colour, markerfacecolor=face, markersize=7)
        names = [wrap_name(found.question.arm, 20) for found in self.comparisons]
        axes.set_yticks(range(len(names)), names, fontsize=10, linespacing=0.9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        is_share = self.metric.digits is None
        if is_share:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
        unit = ", points" if is_share else ""
        is_lower = self.metric.lower_is_better
        label = f"← better{unit}" if is_lower else f"better{unit} →"
        axes.set_xlabel(label, loc="left" if is_lower else "right", fontsize=10)


def wrap_name(name: str, width: int = 14) -> str:
    """Return the name of an arm in lines of at most this many letters."""
    lines = textwrap.wrap(shorten(name, 60).replace("_", " "), width)
    return "\n".join(map(literal, lines))
