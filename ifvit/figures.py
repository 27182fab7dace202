"""Figures as files: PNG on white, and inline SVG in the colours of the page.

The analysis of attention, the report and the paper's sheet use it.
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ifvit.records import shorten

INK, RULE = "#666b75", "#e3e4e8"
"""Colours of text and of lines: `--muted` and `--rule` of base.html on light pages."""

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
"""Colours of runs side by side."""
COLOURS = (*RUN_COLOURS, "#7fb0f2", "#1d4fb8", "#f0a35e", "#b3480c")
"""All colours of plots: `--run0` … `--run11` of base.html on light pages."""

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
    """Return a context manager that sets the style of the figures made in it."""
    return rc_context(_STYLE)


def literal(text: str) -> str:
    """`text` as Matplotlib draws it letter by letter, for names and captions that files contain.

    Text between dollar signs would be a formula, control characters would be boxes.
    """
    return shorten(text, 200).replace("$", r"\$")


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """Return a PNG file on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """Return the <svg> element; the colours of this module become CSS variables of base.html."""
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    variables = {colour: f"run{number}" for number, colour in enumerate(COLOURS)}
    for colour, variable in (variables | {INK: "muted", RULE: "rule"}).items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
