"""Draws the panels of the paper's figures, and pictures of two models for the same captions."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ifvit.analysis.figure_style import house_style, to_png, to_svg
from ifvit.analysis.paper_panels import Panel, Trace
from ifvit.images import Pixels

# In the order of SETTINGS: concat blue, cross-attention orange; early light, intermediate dark;
# then the halves of intermediate fusion. Dark pages have their own, see paper.html.
SETTING_COLOURS = (
    ("#7fb0f2", "#3f6fc0"),
    ("#1d4fb8", "#8db8ff"),
    ("#f0a35e", "#b3672a"),
    ("#b3480c", "#ffb784"),
    ("#1f9d7a", "#57cfab"),
    ("#8a55c8", "#b892f0"),
    ("#7a9a12", "#b5d14a"),
    ("#b4479c", "#e48bd0"),
)
"""Colour on light pages and on paper, and on dark pages."""

_VARIABLES = {light: f"run{number}" for number, (light, _) in enumerate(SETTING_COLOURS)}
_PANEL_SIZE = (4.6, 3.4)
_COLUMNS = 3
_CELL = 1.6
_CAPTION_WIDTH = 24


def panels_png(panels: Sequence[Panel]) -> bytes:
    """All panels in one picture, three in a row, with a legend."""
    num_columns = min(_COLUMNS, len(panels))
    num_lines = -(-len(panels) // num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_lines + 0.5)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(num_lines, num_columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        handles = {
            name: handle
            for axes in grid.flat
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
        return to_png(figure)


def panel_svg(panel: Panel) -> str:
    """One panel for the page, without a title: the page has it."""
    with house_style():
        figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, panel)
        axes.set_title("")
        return to_svg(figure, _VARIABLES)


def pairs_png(captions: Sequence[str], top: Sequence[Pixels], bottom: Sequence[Pixels]) -> bytes:
    """Two pictures (H, W, 3) per caption, one above the other, six captions in a row."""
    num_columns = min(6, len(captions))
    num_lines = -(-len(captions) // num_columns)
    with house_style():
        figure = Figure(
            figsize=(_CELL * num_columns, (2 * _CELL + 0.4) * num_lines), layout="constrained"
        )
        grid = figure.subplots(2 * num_lines, num_columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for index, (caption, *pictures) in enumerate(zip(captions, top, bottom, strict=True)):
            line, column = divmod(index, num_columns)
            cells = grid[2 * line : 2 * line + 2, column]
            for axes, picture in zip(cells, pictures, strict=True):
                axes.imshow(picture, interpolation="nearest")
            lines = textwrap.wrap(caption, _CAPTION_WIDTH, max_lines=3, placeholder=" …")
            cells[0].set_title("\n".join(lines), fontsize=7)
        return to_png(figure)


def _draw(axes: Axes, panel: Panel) -> None:
    for trace in panel.traces:
        _draw_trace(axes, trace, connected=not panel.places)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, axis="y")
    if panel.places:
        axes.set_xticks(range(len(panel.places)), panel.places, fontsize=9)
        axes.set_xlim(-0.5, len(panel.places) - 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_trace(axes: Axes, trace: Trace, connected: bool) -> None:
    """Means with standard errors; early fusion dashed and hollow; single runs as small points."""
    if not trace.points:
        return
    colour = SETTING_COLOURS[trace.colour][0]
    line = "" if not connected else "--" if trace.is_early else "-"
    axes.errorbar(
        [point.x for point in trace.points],
        [point.y for point in trace.points],
        [point.error for point in trace.points],
        [point.x_error or 0.0 for point in trace.points],
        color=colour,
        linestyle=line,
        linewidth=1.8,
        elinewidth=1.0,
        capsize=2,
        marker="o",
        markersize=5,
        markerfacecolor="none" if trace.is_early else colour,
        label=trace.name,
    )
    for point in trace.points:
        if not connected:
            axes.plot(
                [point.x + 0.14] * len(point.values), point.values, ".", color=colour, alpha=0.55
            )
    for point in (trace.points[0], trace.points[-1]):
        if point.label:
            axes.annotate(
                point.label, (point.x, point.y), (4, 4), textcoords="offset points", fontsize=8
            )
