"""What the page of a study consists of: tables, plots, pictures, and the template."""

import base64
import io
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, TemplateError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ifvit.errors import UserError
from ifvit.figures import COLOURS, INK, house_style, literal, to_png, to_svg
from ifvit.images import open_image
from ifvit.records import dump_csv, shorten
from ifvit.studies.statistics import Outcome

MISSING = "—"
"""Text of a cell without a value."""

_MAX_WIDTH = 1100
_SMALL = 128
_PANEL_SIZE = (4.6, 3.4)
_ROW_HEIGHT, _LOW_ROW = 0.46, 0.3
_MANY_ROWS = 12
"""Forest plots of more differences have low rows."""
_NAME_WIDTH = 20
_COLUMNS = 3
_GROUP_WIDTH = 0.8
_DOT_SHIFT = 0.08
_MAX_MARKERS = 20
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
        columns = list(zip(*(line.cells for line in self.lines), strict=True))
        records = []
        for line in self.lines:
            record: dict[str, object] = {self.heads[0]: line.title}
            for head, cell, column in zip(self.heads[1:], line.cells, columns, strict=True):
                text = None if cell.text == MISSING else cell.text
                record[head] = text if cell.value is None else cell.value
                if any(other.error is not None for other in column):
                    record[f"{head} error"] = cell.error
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


@dataclass(frozen=True, kw_only=True)
class Plot(ABC):
    """The content of one pair of axes."""

    title: str

    @property
    @abstractmethod
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""

    @property
    @abstractmethod
    def records(self) -> list[dict[str, object]]:
        """The numbers behind the plot, with its title."""

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Draw everything but the title."""

    @property
    def svg(self) -> str:
        """The plot without its title, which the page shows as text."""
        with house_style():
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            return to_svg(figure)


class PageFigure(NamedTuple):
    """A figure of the page: plots or a picture, and the numbers behind it."""

    title: str
    text: str
    """What it shows; for the reader."""
    plots: Sequence[Plot] = ()
    picture: Figure | None = None
    records: Sequence[Mapping[str, object]] = ()
    """Numbers behind the picture."""

    @property
    def png(self) -> bytes:
        """The figure as a PNG file on white."""
        return plots_to_png(self.plots) if self.picture is None else to_png(self.picture)

    @property
    def csv(self) -> bytes:
        """The numbers as a CSV file."""
        plotted = [record for plot in self.plots for record in plot.records]
        return dump_csv(self.records or plotted)

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return inline_image(self.png)


def plots_to_png(plots: Sequence[Plot]) -> bytes:
    """Return a PNG of all plots, three in a row, with one legend."""
    num_columns = min(_COLUMNS, len(plots))
    num_lines = -(-len(plots) // num_columns)
    width, height = plots[0].size
    with house_style():
        figure = Figure(
            figsize=(width * num_columns, height * num_lines + 0.5), layout="constrained"
        )
        handles = {}
        for number, plot in enumerate(plots, 1):
            axes = figure.add_subplot(num_lines, num_columns, number)
            plot.draw(axes)
            axes.set_title(literal(plot.title))
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles[name] = handle
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=min(4, len(handles)),
            )
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
class Panel(Plot):
    """Lines in bands, which are the intervals of their points.

    With `places`, x is an index of `places`, and points of several names stand side by side there.
    """

    x_label: str = ""
    y_label: str = ""
    points: Sequence[Point]
    places: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        return _PANEL_SIZE

    @property
    def records(self) -> list[dict[str, object]]:
        """A record per point."""
        return [
            {
                "panel": self.title,
                "place": self.places[round(point.x)].replace("\n", " ") if self.places else None,
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
            axes.set_xticks(range(len(self.places)), map(literal, self.places), fontsize=9)
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
    axes.plot(
        x,
        [point.y for point in points],
        color=colour,
        linewidth=1.8,
        marker="o" if len(points) <= _MAX_MARKERS else "",
        markersize=4,
        label=literal(first.name),
    )
    for point in (first, points[-1]):
        if point.label:
            place = (point.x, point.y)
            axes.annotate(point.label, place, (4, 4), textcoords="offset points", fontsize=8)


def _draw_places(axes: Axes, points: Sequence[Point], shift: float) -> None:
    """Draw means with whiskers, and beside each mean of several runs a dot for each run."""
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
        label=literal(first.name),
    )
    for point in points:
        if len(point.values) > 1:
            x = [point.x + shift + _DOT_SHIFT] * len(point.values)
            axes.plot(x, point.values, ".", color=colour, alpha=0.55)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A difference from the baseline: its interval, and the difference of each seed."""

    name: str
    colour: int
    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Forest(Plot):
    """A forest plot: one difference below the other, beside the line of no difference.

    Filled marks are those that are called a difference; dots are single seeds.
    """

    bars: Sequence[Bar]
    lower_is_better: bool
    is_share: bool = False
    """Whether the numbers are shares, and shown in percentage points."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        count = len(self.bars)
        return _PANEL_SIZE[0], 0.85 + count * (_LOW_ROW if count > _MANY_ROWS else _ROW_HEIGHT)

    @property
    def records(self) -> list[dict[str, object]]:
        """A record per difference."""
        return [
            {"metric": self.title, **{k: v for k, v in vars(bar).items() if k != "colour"}}
            for bar in self.bars
        ]

    def draw(self, axes: Axes) -> None:
        """Draw the first difference at the top."""
        axes.axvline(0, color=INK, linewidth=1)
        for place, bar in enumerate(self.bars):
            colour = COLOURS[bar.colour]
            if bar.low is not None and bar.high is not None:
                ends: dict[str, Any] = {"color": colour, "solid_capstyle": "round"}
                axes.plot([bar.low, bar.high], [place, place], linewidth=2.2, alpha=0.75, **ends)
            if len(bar.values) > 1:
                heights = [place + 0.26] * len(bar.values)
                axes.plot(bar.values, heights, ".", color=colour, alpha=0.5, markersize=5)
            face = "none" if bar.outcome == "open" else colour
            axes.plot(bar.mean, place, "o", color=colour, markerfacecolor=face, markersize=7)
        names = [_wrap(bar.name.replace("_", " ")) for bar in self.bars]
        axes.set_yticks(range(len(names)), names, fontsize=10, linespacing=0.9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if self.is_share:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
        unit = ", points" if self.is_share else ""
        axes.set_xlabel(
            f"← better{unit}" if self.lower_is_better else f"better{unit} →",
            loc="left" if self.lower_is_better else "right",
            fontsize=10,
        )


def _wrap(name: str) -> str:
    lines = textwrap.wrap(shorten(name, 60), _NAME_WIDTH)
    return "\n".join(map(literal, lines))
