"""The atlas: rows, rank correlation, and heat maps of windows of blocks."""

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ifvit.analysis.atlas import AtlasPoint, Window, atlas_figure, atlas_rows, correlate_ranks
from ifvit.figures import to_png, to_svg

WINDOWS = [(0, 3), (0, 1), (1, 2), (2, 3), (3, 3)]


def points(mechanism: str, means: list[float]) -> list[AtlasPoint]:
    return [
        AtlasPoint(mechanism=mechanism, first=first, last=last, values=[mean - 0.1, mean + 0.1])
        for (first, last), mean in zip(WINDOWS, means, strict=True)
    ]


MEASURED = [*points("concat", [1.0, 3.0, 2.0, 4.0, 5.0]), *points("adaln", [2.0, 2.5, 3.0, 6.0, 7])]
PREDICTED = {"concat": dict(zip(WINDOWS, [0.1, 0.2, 0.3, 0.4, 0.5], strict=True)) | {(0, 0): 0.05}}


def values_of(cell: Any) -> dict[Window, float]:
    """The cells of a map that are not blank."""
    (mesh,) = (artist for artist in cell.collections if isinstance(artist, QuadMesh))
    grid = np.ma.filled(mesh.get_array(), np.nan)
    return {(c, r): grid[r, c] for r, c in np.argwhere(~np.isnan(grid)).tolist()}


def framed(cell: Any) -> Window:
    (frame,) = (patch for patch in cell.patches if isinstance(patch, Rectangle))
    return round(frame.get_x() + 0.5), round(frame.get_y() + 0.5)


def maps_of(figure: Figure) -> list[Any]:
    return [cell for cell in figure.axes if cell.get_xlabel()]


def test_every_measured_window_is_a_cell_and_the_best_has_a_frame() -> None:
    concat, adaln, predicted = maps_of(atlas_figure(MEASURED, "held-out loss", PREDICTED))
    assert values_of(concat) == pytest.approx(dict(zip(WINDOWS, [1, 3, 2, 4, 5], strict=True)))
    assert values_of(adaln) == pytest.approx(dict(zip(WINDOWS, [2, 2.5, 3, 6, 7], strict=True)))
    assert values_of(predicted) == pytest.approx(PREDICTED["concat"])
    assert [framed(cell) for cell in (concat, adaln, predicted)] == [(0, 3), (0, 3), (0, 0)]
    assert concat.get_title() == "concat"
    assert "1.000" in {text.get_text() for text in concat.texts}
    assert "±0.1000" in {text.get_text() for text in concat.texts}
    (mesh, other) = (cell.collections[0] for cell in (concat, adaln))
    assert (mesh.norm.vmin, mesh.norm.vmax) == (other.norm.vmin, other.norm.vmax) == (1, 7)


def test_the_largest_value_is_best_for_metrics_that_rise() -> None:
    (only,) = maps_of(
        atlas_figure(points("concat", [1, 2, 5, 4, 3]), "CLIP Score", {}, lower_is_better=False)
    )
    assert framed(only) == (1, 2)


def test_the_rank_correlation_counts_windows_that_both_have() -> None:
    found = correlate_ranks(MEASURED[:5], PREDICTED["concat"], lower_is_better=True)
    assert found is not None
    # Ranks 1 3 2 4 5 and 1 2 3 4 5: 1 - 6 * 2 / (5 * 24).
    assert (found[0], found[2]) == (pytest.approx(0.9), 5)
    turned = correlate_ranks(MEASURED[:5], PREDICTED["concat"], lower_is_better=False)
    assert turned is not None
    assert turned[0] == pytest.approx(-0.9)
    assert correlate_ranks(MEASURED[:5], {(0, 1): 1, (0, 3): 2}, lower_is_better=True) is None
    title = maps_of(atlas_figure(MEASURED, "loss", PREDICTED))[2].get_title()
    assert title == f"rank correlation +0.90 (n = 5, p = {found[1]:.2g})"


def test_rows_are_ordered_by_mechanism_and_window() -> None:
    rows = atlas_rows(MEASURED[::-1], PREDICTED)
    assert [row["mechanism"] for row in rows] == ["adaln"] * 5 + ["concat"] * 5
    assert [(row["first"], row["last"]) for row in rows[:5]] == sorted(WINDOWS)
    assert rows[0]["prediction"] is None
    last = {"mechanism": "concat", "first": 3, "last": 3, "mean": 5, "standard_error": 0.1}
    assert rows[-1] == pytest.approx(last | {"num_seeds": 2, "prediction": 0.5})


def test_one_seed_has_no_standard_error() -> None:
    point = AtlasPoint(mechanism="concat", first=1, last=2, values=[0.5])
    assert point.standard_error is None
    deep = AtlasPoint(mechanism="concat", first=38, last=39, values=[0.5])
    figure = atlas_figure([point, deep], "loss", {})
    assert to_png(figure, 30)
    assert "<svg" in to_svg(figure)
