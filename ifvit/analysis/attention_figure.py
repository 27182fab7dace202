"""Attention by layer as Figure 8 of arXiv 2403.16530 shows it, for any number of runs."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure

from ifvit.analysis.attention import (
    NUM_SINGULAR_VALUES,
    AttentionSummary,
    Floats,
    TextAttention,
)
from ifvit.analysis.figure_style import INK, RUN_COLOURS, house_style

_CELL = 1.25
_ROWS = ("image to image", "text to image", "singular values\n(dots: per prompt)")
_SMALLEST = 1e-4
"""Share of the largest singular value below which the axis ends."""


def attention_figure(summaries: dict[str, AttentionSummary]) -> Figure:
    """Three rows a run: image-to-image maps, text-to-image maps, singular values; a layer a column.

    Rows of an image-to-image map are the image tokens that look, its columns those looked at; in a
    text-to-image map, text tokens are the rows and the image tokens that look at them the columns.
    All maps of one kind share one colour scale, the square root of attention, that ends at their
    99.5th percentile; all singular values share one logarithmic axis. So layers and runs compare.
    """
    layers = [layer for summary in summaries.values() for layer in summary.layers]
    texts = [layer.text for layer in layers if layer.text]
    scales = (_scale(layer.image_map for layer in layers), _scale(text.map for text in texts))
    largest = max(text.singular_values[0] for text in texts)
    limits = (_SMALLEST * largest, 2 * largest)
    num_columns = max(len(summary.layers) for summary in summaries.values())
    size = (_CELL * num_columns + 2, (3 * _CELL + 0.6) * len(summaries))
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        parts = figure.subfigures(len(summaries), 1, squeeze=False)[:, 0]
        for part, (name, summary) in zip(parts, summaries.items(), strict=True):
            part.suptitle(f"{name}: {_setting(summary)}", fontsize=9, fontweight="bold")
            _draw_run(part, summary, num_columns, scales, limits)
    return figure


def _draw_run(
    part: SubFigure,
    summary: AttentionSummary,
    num_columns: int,
    scales: tuple[Normalize, Normalize],
    limits: tuple[float, float],
) -> None:
    axes = part.subplots(3, num_columns, squeeze=False)
    for cell in axes[:, len(summary.layers) :].flat:
        cell.set_axis_off()
    for column, layer in zip(axes.T, summary.layers, strict=False):
        column[0].set_title(layer.name, fontsize=8)
        _draw_map(column[0], layer.image_map, scales[0])
        _prepare_values(column[2], limits)
        if layer.text:
            _draw_map(column[1], layer.text.map, scales[1])
            _draw_values(column[2], layer.text)
        else:
            column[1].set(xticks=[], yticks=[])
            for cell in column[1:]:
                middle = {"transform": cell.transAxes, "ha": "center", "va": "center"}
                cell.text(0.5, 0.5, "no text", fontsize=7, **middle)
    axes[2, 0].tick_params(labelleft=True)
    for cells, label in zip(axes, _ROWS, strict=True):
        cells[0].set_ylabel(label, fontsize=8)
    for cells in axes[:2]:
        drawn = next(cell.images[0] for cell in cells if cell.images)
        bar = part.colorbar(drawn, ax=list(cells), pad=0.01, aspect=12, extend="max")
        bar.ax.tick_params(labelsize=6)


def _scale(maps: Iterable[Floats]) -> Normalize:
    """0 ... 99.5th percentile of all maps together."""
    top = np.quantile(np.concatenate([one.ravel() for one in maps]), 0.995)
    return PowerNorm(0.5, 0, float(top))


def _draw_map(cell: Axes, values: Floats, scale: Normalize) -> None:
    cell.imshow(values, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
    cell.set(xticks=[], yticks=[])


def _prepare_values(cell: Axes, limits: tuple[float, float]) -> None:
    cell.set(yscale="log", ylim=limits, xlim=(0.5, NUM_SINGULAR_VALUES + 0.5))
    cell.set_xticks([1, NUM_SINGULAR_VALUES])
    cell.tick_params(labelsize=6, labelleft=False)


def _draw_values(cell: Axes, text: TextAttention) -> None:
    """Those of the mean map as a line, the prompts' own as dots with standard errors."""
    orders = np.arange(1, 1 + len(text.singular_values))
    means = [mean.value for mean in text.prompt_singular_values]
    errors = [mean.standard_error for mean in text.prompt_singular_values]
    cell.plot(orders, text.singular_values, linewidth=1.4, color=RUN_COLOURS[0])
    cell.errorbar(orders, means, errors, fmt=".", markersize=3, color=INK, linewidth=0.8)
    rank = f"rank {text.effective_rank:.1f}\n({text.prompt_effective_rank.value:.1f})"
    cell.text(0.96, 0.97, rank, transform=cell.transAxes, ha="right", va="top", fontsize=6)


def _setting(summary: AttentionSummary) -> str:
    blocks = f"[{summary.num_image_blocks}, {summary.num_text_blocks}]"
    return f"{summary.conditioning}, [N_image, N_text] = {blocks}, step {summary.step:,}"
