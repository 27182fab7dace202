"""Training curves as inline SVG that takes its colours from the page around it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from ifvit.analysis.figure_style import RUN_COLOURS, house_style, to_svg
from ifvit.analysis.runs import Run

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
