"""The figure of object counts shows the numbers of the rows."""

import csv
from pathlib import Path

import pytest
from made_counts import made_row

from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.runs import read_run
from ifvit.storage import write_sealed
from ifvit.studies.arms import Arm, select
from ifvit.studies.page import PageFigure
from ifvit.studies.study_figures import counts_figure

ROWS = {"early": [made_row((0, 2))], "late": [made_row((0, 1))]}


def figure_of(folder: Path, rows: dict[str, list[ObjectCountRow]]) -> PageFigure:
    """Write each row to a run of its arm, and plot all of them."""
    arms = []
    for colour, (name, own) in enumerate(rows.items()):
        runs = {}
        for seed, row in enumerate(own):
            run = folder / name / f"seed{seed}"
            write_sealed(str(run / "evaluation/object_count/w2/step_00002000.json"), row)
            runs[seed] = read_run(str(run), f"{name}/seed{seed}")
        arms.append(Arm(name=name, colour=colour, runs=runs))
    return counts_figure(select(arms))


def test_points_are_the_numbers_of_the_rows(tmp_path: Path) -> None:
    figure = figure_of(tmp_path, ROWS)
    lines = list(csv.DictReader(figure.csv.decode().splitlines()))
    names = ["bus", "sheep", "person", "apple"]
    places = {name: ["1", "2", "3", "4", "5"] for name in names}
    for metric in ("Average error", "Match ratio"):
        places[f"{metric}, all counts"] = [*names, "all"]
    means = {"early": 1.0, "late": 0.5}
    assert [(one["panel"], one["name"], one["place"], float(one["y"])) for one in lines] == [
        (panel, name, place, 0.5 if panel.startswith("Match") else means[name])
        for panel, own in places.items()
        for name in means
        for place in own
    ]
    found = {(one["panel"], one["name"], one["place"]): float(one["high"]) for one in lines}
    row: ObjectCountRow = ROWS["late"][0]
    sheep, overall = row.score("sheep", 3), row.score()
    assert sheep
    assert overall
    assert found["sheep", "late", "3"] == pytest.approx(sheep.average_error.high)
    whole = found["Match ratio, all counts", "late", "all"]
    assert whole == pytest.approx(overall.match_ratio.high)


def test_intervals_stay_where_the_numbers_can_be(tmp_path: Path) -> None:
    rows = [made_row((2, 2)), made_row((1, 1))]
    figure = figure_of(tmp_path, {"both": rows, "far": [made_row((0, 9))]})
    for point in map(dict, figure.records):
        assert 0 <= float(point["low"]) <= float(point["y"]) <= float(point["high"])
        if point["panel"] == "Match ratio, all counts":
            assert float(point["high"]) <= 1
    first = dict(figure.records[0])
    assert (first["y"], first["values"], first["low"]) == (1.5, (2.0, 1.0), 0.0)
    assert float(first["high"]) > 2


def test_no_rows_are_no_plots() -> None:
    assert not counts_figure(select([])).plots
