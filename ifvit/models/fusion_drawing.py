"""Drawing of fusion maps: `ifvit cost --draw FILE`, and docs/fusion.png.

One row per map. The upper lane holds the image tokens, the lower lane the text tokens; a cell is a
block, and arcs are long skips.
"""

from collections.abc import Mapping
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyBboxPatch

from ifvit.figures import RULE, RUN_COLOURS, house_style, literal, to_png
from ifvit.models.config import TEXT_KEYS, UPDATES_TEXT, Fusion, FusionTransformerConfig
from ifvit.models.cost import count_cost
from ifvit.models.presets import PRESETS, with_setting
from ifvit.storage import write_bytes

COLOURS: dict[Fusion, str] = {
    "image": "#d3d7df",
    "concat": RUN_COLOURS[0],
    "cross_attention": RUN_COLOURS[1],
    "separate_cross_attention": RUN_COLOURS[2],
    "dual_stream": RUN_COLOURS[3],
    "adaln": RUN_COLOURS[5],
}
_MEANINGS: dict[Fusion, str] = {
    "image": "image tokens alone",
    "concat": "one sequence, one set of weights",
    "cross_attention": "text keys in the same softmax",
    "separate_cross_attention": "a sublayer with its own weights",
    "dual_stream": "own weights per stream, joint attention",
    "adaln": "pooled text modulates the block",
}
TEXT_COLOUR, SKIP_COLOUR = "#3c404a", "#aab0bb"
ROW_HEIGHT, TEXT_LANE = 3.2, -1.05
"""Distances between rows, and from the image lane down to the text lane, in blocks."""
INCHES = 0.45
"""Width of a block with the gap behind it."""

_SMALL = PRESETS["small"]
_PLAIN = replace(_SMALL, long_skip=False, num_text_blocks=0)
EXAMPLES: dict[str, FusionTransformerConfig] = {
    "U-ViT": with_setting(_SMALL, "concat_early"),
    "arXiv 2403.16530": _SMALL,
    "like PixArt": replace(_PLAIN, fusion="13*separate_cross_attention", modulation="shared"),
    "like SD3": replace(_PLAIN, fusion="13*dual_stream", modulation="adaln_zero"),
    "like HBridge": replace(_PLAIN, fusion="4*image 5*dual_stream 4*image", long_skip=True),
    "any order": replace(
        _SMALL,
        fusion="3*concat 2*image cross_attention 2*image cross_attention 2*image 2*adaln",
        num_text_blocks=2,
    ),
}
"""Six maps at the paper's size, by title."""


def draw_maps(file: str, maps: Mapping[str, FusionTransformerConfig]) -> None:
    """Draw maps, by their titles, into a PNG file."""
    num_blocks = max(len(config.blocks) for config in maps.values())
    start = -0.9 - max(config.num_text_blocks for config in maps.values())
    left, right, top = start - 1.6, max(num_blocks, 13) + 3.4, 1.7
    legend = -ROW_HEIGHT * (len(maps) - 1) - 2.1
    bottom = legend - 3.0
    with house_style():
        figure = Figure(figsize=(INCHES * (right - left), INCHES * (top - bottom)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axes.axis("off")
        for row, (title, config) in enumerate(maps.items()):
            _draw_row(axes, start, -ROW_HEIGHT * row, title, config)
        _draw_legend(axes, start - 1.3, right - 0.3, legend)
        write_bytes(file, to_png(figure, dpi=140))


def _draw_row(
    axes: Axes, start: float, y: float, title: str, config: FusionTransformerConfig
) -> None:
    """Draw a map whose lanes begin at x = start; block n is at x = n."""
    blocks, cost, lane = config.blocks, count_cost(config), y + TEXT_LANE
    notation = config.fusion if title != config.fusion else ""
    axes.text(start - 1.3, y + 1.25, literal(title), weight="bold", size=10, color=TEXT_COLOUR)
    axes.text(start + 3.2, y + 1.25, notation, size=8.5, family="monospace")
    for block, mirror in config.mirrors.items():
        height = 0.2 + 1.1 * (block - mirror) / len(blocks)
        middle = (block + mirror) / 2, y + 0.36
        axes.add_patch(Arc(middle, block - mirror, height, theta2=180, color=SKIP_COLOUR))
    axes.plot([start, len(blocks) - 1], [y, y], color=SKIP_COLOUR, linewidth=1.2, zorder=1)
    axes.text(start - 0.15, y, "image", size=9, ha="right", va="center")
    if config.text_blocks:
        end = config.text_blocks[-1]
        axes.plot([start, end], [lane, lane], color=TEXT_COLOUR, linewidth=1.2, zorder=1)
        axes.text(start - 0.15, lane, "text", size=9, ha="right", va="center")
    for number in range(config.num_text_blocks):
        _draw_cell(axes, number - config.num_text_blocks - 0.15, lane, 0.5, TEXT_COLOUR)
    last = max(config.text_key_blocks, default=0)
    for number, entry in enumerate(blocks):
        _draw_block(axes, number, y, entry, is_last=number == last)
    x = len(blocks) - 0.1
    params, gflops = cost.params / 1e6, cost.flops / 1e9
    size = f"{params:.1f}M params" if params >= 10 else f"{params:.2f}M params"
    work = f"{gflops:.1f} GFLOPs" if gflops >= 1 else f"{1000 * gflops:.1f} MFLOPs"
    axes.text(x, y, size, size=9.5, va="center", color=TEXT_COLOUR)
    axes.text(x, lane, work, size=9.5, va="center", color=TEXT_COLOUR)


def _draw_block(axes: Axes, x: float, y: float, entry: Fusion, *, is_last: bool) -> None:
    """Draw a block in the image lane, and what it does with the text lane."""
    colour, lane = COLOURS[entry], y + TEXT_LANE
    if entry == "concat":  # one sequence, one set of weights: a cell across both lanes
        _draw_cell(axes, x, y + TEXT_LANE / 2 + 0.06, 0.72 + 0.88, colour)
        return
    if entry in TEXT_KEYS:
        axes.plot([x, x], [lane, y], color=colour, linewidth=2, zorder=1.5)
    elif entry == "adaln":
        axes.plot([x, x], [lane, y], color=colour, linewidth=2, linestyle=":", zorder=1.5)
    if entry in UPDATES_TEXT:  # the last one computes keys and values of the text only
        _draw_cell(axes, x, lane, 0.5, "white" if is_last else colour, edge=colour)
    elif entry != "image":
        axes.plot([x], [lane], marker="o", markersize=4.5, color=colour, zorder=3)
    _draw_cell(axes, x, y, 0.72, colour)


def _draw_cell(
    axes: Axes, x: float, y: float, height: float, colour: str, edge: str | None = None
) -> None:
    box = FancyBboxPatch(
        (x - 0.36, y - height / 2),
        0.72,
        height,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=colour,
        edgecolor=edge or colour,
        linewidth=1.2,
        zorder=2,
    )
    axes.add_patch(box)


def _draw_legend(axes: Axes, left: float, right: float, y: float) -> None:
    axes.plot([left, right], [y + 0.35] * 2, color=RULE, linewidth=0.8)
    names: list[tuple[str, str, str]]
    names = [(colour, entry, _MEANINGS[entry]) for entry, colour in COLOURS.items()]
    names.append((TEXT_COLOUR, "text branch", "blocks over text alone"))
    names.append((SKIP_COLOUR, "long skip", "from each block to its mirror"))
    for number, (colour, name, meaning) in enumerate(names):
        x, line = (left, right - 9.2)[number // 4] + 0.3, y - 0.25 - 0.68 * (number % 4)
        marker = "$\\frown$" if name == "long skip" else "s"
        axes.plot([x], [line], marker=marker, markersize=9, color=colour, linestyle="")
        axes.text(x + 0.4, line, name, size=8.5, va="center", color=TEXT_COLOUR, weight="bold")
        axes.text(x + (4.8, 3.1)[number // 4], line, meaning, size=8.5, va="center")
