"""How figures look: as PNG on white, or as inline SVG in the colours of the page around it."""

import io
import re
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK, RULE = "#666b75", "#e3e4e8"
"""Text and lines, as `--muted` and `--rule` of base.html are in light pages."""

RUN_COLOURS = (
    "#2f6fde",
    "#e07b1a",
    "#1f9d7a",
    "#b4479c",
    "#7a5bd0",
    "#9a7b12",
    "#c2413b",
    "#4a7f96",
)
"""Colours of runs side by side, as `--run0` … `--run7` of base.html are in light pages."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ifvit",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def house_style() -> Any:
    """Context manager around the drawing of a figure."""
    return rc_context(_STYLE)


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """A PNG file on white, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, variables: Mapping[str, str]) -> str:
    """The <svg> element, with each colour of `variables` replaced by the CSS variable it names."""
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in {INK: "muted", RULE: "rule", **variables}.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
