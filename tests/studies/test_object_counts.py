"""The figure and the table of object counts show the numbers of the rows."""

import csv

import pytest
from made_counts import made_row
from matplotlib.colors import to_rgb

from ifvit.studies.object_counts import figure, table

EARLY = {"num_image_blocks": 0, "num_text_blocks": 0}
ROWS = {
    "concat": made_row((0, 2), conditioning="concat", **EARLY),
    "concat+": made_row((1, 1), conditioning="concat"),
    "cross": made_row((0, 0), conditioning="cross_attention", **EARLY),
    "cross+": made_row((0, 1), conditioning="cross_attention"),
}


def test_bars_show_the_numbers_of_the_rows() -> None:
    *objects, errors, matches = figure(ROWS).axes
    assert [axes.get_title() for axes in objects] == ["bus", "sheep", "person", "apple"]
    for axes, places, values in (
        *((axes, 5, (1.0, 1.0, 0.0, 0.5)) for axes in objects),
        (errors, 4, (1.0, 1.0, 0.0, 0.5)),
        (matches, 4, (0.5, 0.0, 1.0, 0.5)),
    ):
        bars = axes.containers[1::2]  # the others are their whiskers
        heights = [[patch.get_height() for patch in bar] for bar in bars]
        assert heights == [[value] * places for value in values]
        assert [bar.get_label() for bar in bars] == list(ROWS)


def test_axes_begin_at_0_and_hold_every_interval() -> None:
    rows = {"near": ROWS["cross"], "far": made_row((0, 9), conditioning="concat")}
    *objects, errors, matches = figure(rows).axes
    highest = max(one.average_error.high for one in rows["far"].scores if one.object)
    assert {axes.get_ylim() for axes in objects} == {objects[0].get_ylim()}
    assert objects[0].get_ylim()[1] > highest
    assert all(axes.get_ylim()[0] == 0 for axes in (*objects, errors, matches))


def test_early_fusion_is_lighter_and_seeds_differ_in_their_hatch() -> None:
    axes = figure(ROWS | {"seed2": ROWS["concat"]}).axes[0]
    bars = {bar.get_label(): bar.patches[0] for bar in axes.containers[1::2]}
    light = {name: sum(to_rgb(patch.get_facecolor())) for name, patch in bars.items()}
    assert light["concat"] > light["concat+"]
    assert light["cross"] > light["cross+"]
    assert bars["seed2"].get_facecolor() == bars["concat"].get_facecolor()
    assert bars["seed2"].get_hatch() != bars["concat"].get_hatch()


def test_the_table_has_every_score_of_every_run() -> None:
    lines = list(csv.DictReader(table(ROWS).decode().splitlines()))
    assert len(lines) == 4 * (1 + 4 + 5 + 20)
    (line,) = [
        one
        for one in lines
        if (one["run"], one["object"], one["asked"]) == ("cross+", "sheep", "3")
    ]
    score = ROWS["cross+"].score("sheep", 3)
    assert score is not None
    assert line["num_images"] == "2"
    assert float(line["average_error"]) == score.average_error.value
    assert float(line["match_ratio_low"]) == pytest.approx(score.match_ratio.low, abs=1e-4)
    assert lines[0]["object"] == lines[0]["asked"] == ""
