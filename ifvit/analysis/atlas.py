"""Heat maps over windows of blocks, and the atlas of where to fuse text.

A window is the blocks first ... last of a fusion map, counted from 0. The analysis of knock-out
draws its windows here. The page of a study draws the atlas: a metric of trained networks whose text
is in one window, beside what the knock-out of one network predicts for it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from ifvit.figures import INK, RUN_COLOURS, house_style, literal

Window = tuple[int, int]
"""First and last block, counted from 0."""

_MARK = RUN_COLOURS[6]
"""Colour of the frame around the best window."""
_MAX_TEXTS = 10
"""Maps of more blocks than this have no numbers in their cells."""


@dataclass(frozen=True, kw_only=True)
class AtlasPoint:
    """A metric of networks that were trained with text in the window first ... last alone."""

    mechanism: str
    """Entry of the fusion map in the window, such as `cross_attention`."""
    first: int
    last: int
    values: Sequence[float]
    """The metric of each seed, at least one."""

    @property
    def window(self) -> Window:
        """First and last block that see text."""
        return self.first, self.last

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def standard_error(self) -> float | None:
        """Standard error over seeds; None for one seed."""
        count = len(self.values)
        return stdev(self.values) / count**0.5 if count > 1 else None


Predictions = Mapping[str, Mapping[Window, float]]
"""Mechanism => window => held-out loss of the network whose text is in all blocks, with text
switched on in this window alone (`ifvit analyze knockout`)."""


def correlate_ranks(
    points: Sequence[AtlasPoint], prediction: Mapping[Window, float], *, lower_is_better: bool
) -> tuple[float, float, int] | None:
    """Spearman's rank correlation of one mechanism's means and the knock-out's losses of windows.

    Returns rho, the p of no correlation, and the number of windows that both have. rho is positive
    if windows that the knock-out ranks higher are better. None for fewer than three windows in
    common, and if all means or all losses are equal.
    """
    from scipy.stats import spearmanr  # takes 0.7 s, which the other figures save

    common = [point for point in points if point.window in prediction]
    means = [point.mean if lower_is_better else -point.mean for point in common]
    losses = [prediction[point.window] for point in common]
    if len(common) < 3 or len(set(means)) == 1 or len(set(losses)) == 1:
        return None
    found = spearmanr(means, losses)
    return float(found.statistic), float(found.pvalue), len(common)


def atlas_rows(points: Sequence[AtlasPoint], predictions: Predictions) -> list[dict[str, Any]]:
    """Return a row per point, by mechanism in the order given, then by window."""
    mechanisms = list(dict.fromkeys(point.mechanism for point in points))
    return [
        {
            "mechanism": point.mechanism,
            "first": point.first,
            "last": point.last,
            "mean": point.mean,
            "standard_error": point.standard_error,
            "num_seeds": len(point.values),
            "prediction": predictions.get(point.mechanism, {}).get(point.window),
        }
        for point in sorted(points, key=lambda one: (mechanisms.index(one.mechanism), one.window))
    ]


def atlas_figure(
    points: Sequence[AtlasPoint],
    metric: str,
    predictions: Predictions,
    *,
    lower_is_better: bool = True,
    digits: int = 3,
) -> Figure:
    """Return heat maps of a metric over the windows of text, a column per mechanism.

    The upper maps show means over seeds and, in small print, their standard errors. The lower ones
    show the knock-out's prediction, with its rank correlation to the upper map in the title. Maps
    of a row share one colour scale, on which better is brighter; a frame marks the best window.
    `metric` is the metric's name in words, and `digits` are the decimals of its numbers.
    """
    measured: dict[str, list[AtlasPoint]] = {}
    for point in points:
        measured.setdefault(point.mechanism, []).append(point)
    given = {name: found for name, found in predictions.items() if name in measured}
    windows = [*(point.window for point in points), *(w for found in given.values() for w in found)]
    num_blocks, num_rows = 1 + max(last for _, last in windows), 2 if given else 1
    means = {n: {p.window: p.mean for p in own} for n, own in measured.items()}
    texts = {n: {p.window: _show(p, digits) for p in own} for n, own in measured.items()}
    with house_style():
        size = (1.5 + 4.2 * len(measured), 0.6 + 4.2 * num_rows)
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(num_rows, len(measured), squeeze=False)
        maps = WindowMaps.of(means.values(), num_blocks, lower_is_better=lower_is_better)
        for cell, name in zip(axes[0], measured, strict=True):
            maps.plot(cell, means[name], texts[name])
            cell.set_title(literal(name.replace("_", " ")), fontweight="bold")
        maps.add_colour_bar(figure, axes[0], f"{metric}, trained")
        if not given:
            return figure
        maps = WindowMaps.of(given.values(), num_blocks)
        for cell, (name, own) in zip(axes[1], measured.items(), strict=True):
            if name not in given:
                cell.set_axis_off()
                continue
            maps.plot(cell, given[name], {w: f"{x:.{digits}f}" for w, x in given[name].items()})
            cell.set_title(_describe_ranks(own, given[name], lower_is_better))
        maps.add_colour_bar(figure, axes[1], "held-out loss, knock-out")
    return figure


def _show(point: AtlasPoint, digits: int) -> str:
    error = point.standard_error
    return f"{point.mean:.{digits}f}" + (f"\n±{error:.{digits + 1}f}" if error is not None else "")


def _describe_ranks(
    points: Sequence[AtlasPoint], prediction: Mapping[Window, float], lower_is_better: bool
) -> str:
    found = correlate_ranks(points, prediction, lower_is_better=lower_is_better)
    if found is None:
        return "too few windows for a rank correlation"
    rho, p, count = found
    return (
        f"rank correlation {rho:+.2f} (n = {count}, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'})"
    )


@dataclass(frozen=True, kw_only=True)
class WindowMaps:
    """Triangular heat maps of one colour scale: first block on x, last block on y."""

    num_blocks: int
    scale: Normalize
    colour_map: str
    find_best: Callable[..., Any]
    """min or max."""

    @classmethod
    def of(
        cls,
        maps: Iterable[Mapping[Window, float]],
        num_blocks: int,
        *,
        lower_is_better: bool = True,
    ) -> "WindowMaps":
        """Choose the colour scale of these maps; on it, better is brighter."""
        values = [value for one in maps for value in one.values()]
        return cls(
            num_blocks=num_blocks,
            scale=Normalize(min(values), max(values)),
            colour_map="viridis_r" if lower_is_better else "viridis",
            find_best=min if lower_is_better else max,
        )

    def plot(
        self,
        cell: Axes,
        values: Mapping[Window, float],
        texts: Mapping[Window, str],
        *,
        label: str = "with text",
        mark_best: bool = True,
    ) -> None:
        """Plot a value per window; windows without a value stay blank, the best has a frame.

        Each text has a first line and a smaller one below it. `label` says in words what the
        blocks of a window have.
        """
        grid = np.full((self.num_blocks, self.num_blocks), np.nan)
        for (first, last), value in values.items():
            grid[last, first] = value
        edges = np.arange(self.num_blocks + 1) - 0.5
        mesh: dict[str, Any] = {"cmap": self.colour_map, "norm": self.scale, "edgecolors": "white"}
        cell.pcolormesh(edges, edges, np.ma.masked_invalid(grid), linewidth=1, **mesh)
        if mark_best:
            first, last = self.find_best(values, key=lambda window: values[window])
            frame: dict[str, Any] = {"fill": False, "edgecolor": _MARK, "linewidth": 2.5}
            cell.add_patch(Rectangle((first - 0.5, last - 0.5), 1, 1, **frame))
        for window, text in texts.items():
            if self.num_blocks <= _MAX_TEXTS:
                self._write(cell, window, values[window], text)
        ticks = range(0, self.num_blocks, 1 + self.num_blocks // 16)
        cell.set(xticks=ticks, yticks=ticks, aspect="equal")
        cell.set(xlabel=f"first block {label}", ylabel=f"last block {label}")
        cell.tick_params(length=0)

    def _write(self, cell: Axes, window: Window, value: float, text: str) -> None:
        red, green, blue, _ = colormaps[self.colour_map](self.scale(value))
        is_bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        colour = "black" if is_bright else "white"
        size = 60 / self.num_blocks
        mean, _, small = text.partition("\n")
        up = 0.14 if small else 0.0
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        cell.text(window[0], window[1] + up, mean, fontsize=size, **middle)
        cell.text(window[0], window[1] - 0.24, small, fontsize=0.7 * size, **middle)

    def add_colour_bar(self, figure: Figure | SubFigure, axes: Iterable[Axes], label: str) -> None:
        """Add the colour bar of all maps to the right of these axes."""
        mappable = ScalarMappable(norm=self.scale, cmap=self.colour_map)
        bar = figure.colorbar(mappable, ax=list(axes), pad=0.02, aspect=25, label=label)
        bar.outline.set_edgecolor(INK)
        if self.find_best is min:
            bar.ax.invert_yaxis()  # better is up
