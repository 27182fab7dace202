"""The plots of object counts show the numbers of the rows."""

import csv

import pytest
from made_counts import made_row

from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.studies.object_counts import count_panels, mean_score
from ifvit.studies.page import PageFigure
from ifvit.studies.quantities import COUNT_ERROR

COLOURS = {"early": 0, "late": 1}
ROWS = {"early": [made_row((0, 2))], "late": [made_row((0, 1))]}


def test_points_are_the_numbers_of_the_rows() -> None:
    *objects, errors, matches = count_panels(ROWS, COLOURS)
    assert [panel.title for panel in objects] == ["bus", "sheep", "person", "apple"]
    assert objects[0].places == ("1", "2", "3", "4", "5")
    assert errors.places == matches.places == ("bus", "sheep", "person", "apple", "all")
    for panels, values in ((objects, (1.0, 0.5)), ([errors], (1.0, 0.5)), ([matches], (0.5, 0.5))):
        for panel in panels:
            found = [(point.name, point.x, point.y) for point in panel.points]
            assert found == [
                (name, place, value)
                for name, value in zip(ROWS, values, strict=True)
                for place in range(5)
            ]


def test_intervals_stay_where_the_numbers_can_be() -> None:
    for panel in count_panels(ROWS | {"far": [made_row((0, 9))]}, COLOURS | {"far": 2}):
        assert all(0 <= point.low <= point.y <= point.high for point in panel.points)
        if panel.y_label == "match ratio":
            assert all(point.high <= 1 for point in panel.points)


def test_several_runs_are_their_mean_with_the_interval_over_runs() -> None:
    rows = [made_row((2, 2)), made_row((1, 1))]
    mean = mean_score(rows, COUNT_ERROR, "bus", 2)
    assert mean is not None
    assert (mean.value, mean.seed_error) == (1.5, pytest.approx(0.5))
    (point, *_) = count_panels({"early": rows}, COLOURS)[0].points
    assert (point.values, point.low) == ((2.0, 1.0), 0.0)
    assert point.high == mean.high > 2


def test_the_table_has_every_point_with_its_interval() -> None:
    figure = PageFigure(title="", text="", plots=count_panels(ROWS, COLOURS))
    lines = list(csv.DictReader(figure.csv.decode().splitlines()))
    assert len(lines) == 2 * (4 * 5 + 2 * 5)
    (line,) = [
        one for one in lines if (one["panel"], one["name"], one["place"]) == ("sheep", "late", "3")
    ]
    row: ObjectCountRow = ROWS["late"][0]
    score = row.score("sheep", 3)
    assert score is not None
    assert float(line["y"]) == score.average_error.value
    assert float(line["high"]) == pytest.approx(score.average_error.high)
    (line,) = [
        one
        for one in lines
        if (one["panel"][:5], one["name"], one["place"]) == ("Match", "late", "all")
    ]
    overall = row.score()
    assert overall is not None
    assert float(line["low"]) == pytest.approx(overall.match_ratio.low)


def test_no_rows_are_no_plots() -> None:
    assert count_panels({}, {}) == []
