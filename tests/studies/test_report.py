"""The report of run folders made of real files; what is missing must show as missing."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import build_row, write_run

from ifvit.errors import UserError
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.runs import read_run, read_runs
from ifvit.studies.comparisons import RETRIEVAL, best_run, compare_runs
from ifvit.studies.config import ReportConfig
from ifvit.studies.report import metric_lines, report, smooth


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        write_run(tmp_path / "early", build_row(0.41), 0),
        write_run(tmp_path / "intermediate", build_row(0.63), 3),
    ]


def render(runs: list[str], output: Path) -> str:
    report(ReportConfig(runs=runs, output=str(output)))
    return output.read_text()


def test_the_page_shows_both_runs_and_needs_no_network(runs: list[str], tmp_path: Path) -> None:
    page = render(runs, tmp_path / "report.html")
    for expected in ("early", "intermediate", "63.0 %", "41.0 %", "two red circles", "150"):
        assert expected in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "url(http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64") == 3 * 2 + 1 + 2


def test_the_page_is_the_same_every_time(runs: list[str], tmp_path: Path) -> None:
    assert render(runs, tmp_path / "one.html") == render(runs, tmp_path / "two.html")


def test_what_a_run_lacks_is_named_and_never_invented(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = render([str(tmp_path / "empty")], tmp_path / "report.html")
    for name in ("config.yaml", "metrics.jsonl", "weights", "samples", "evaluation"):
        assert f"empty/{name}:" in page
    assert not re.search(r"<td[^>]*>[^—<]", page)


def test_a_run_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        render([str(tmp_path / "nowhere")], tmp_path / "report.html")


def test_a_difference_within_the_noise_is_called_that(tmp_path: Path) -> None:
    early = read_run(write_run(tmp_path / "early", build_row(0.60), 0), "early")
    close = read_run(write_run(tmp_path / "close", build_row(0.63), 3), "close")
    far = read_run(write_run(tmp_path / "far", build_row(0.40), 3), "far")
    within, beyond = compare_runs(early, close), compare_runs(early, far)
    assert within is not None
    assert beyond is not None
    assert within.comparisons[0].outcome == "same"
    assert "smaller than the noise of 5.5 points" in within.comparisons[0].sentence
    assert "no difference beyond the noise in Retrieval" in within.summary
    assert beyond.comparisons[0].outcome == "worse"
    assert "by 20.0 points" in beyond.comparisons[0].sentence
    assert best_run(RETRIEVAL, [early, close]) is None
    assert best_run(RETRIEVAL, [far, close]) == "close"


def test_a_smaller_frechet_distance_is_better(tmp_path: Path) -> None:
    good = dataclasses.replace(
        build_row(0.5),
        frechet_distance=Estimate(
            value=0.01, standard_error=0.001, num_samples=500, low=0.008, high=0.012
        ),
    )
    runs = read_runs(
        [
            write_run(tmp_path / "a", build_row(0.5), 0),
            write_run(tmp_path / "b", good, 3),
        ]
    )
    comparison = compare_runs(*runs)
    assert comparison is not None
    outcomes = {comparison.metric: comparison.outcome for comparison in comparison.comparisons}
    assert outcomes["Fréchet distance on CLIP features"] == "better"


def test_evaluations_done_differently_are_marked_and_not_compared(tmp_path: Path) -> None:
    urls = [
        write_run(tmp_path / "a", build_row(0.5), 0),
        write_run(tmp_path / "b", build_row(0.9, guidance_scale=4.0), 3),
        write_run(tmp_path / "c", build_row(0.7), 3),
    ]
    page = " ".join(render(urls, tmp_path / "report.html").split())
    assert "b is not compared, because it was not measured like the first run" in page
    assert "first run: guidance scale 4.0 against 2.0." in page
    assert "b against a" not in page
    assert "c against a" in page
    runs = read_runs(urls)
    assert best_run(RETRIEVAL, runs) == "c"
    notes = [cell.note for cell in metric_lines(runs)[0].cells]
    assert ["not compared" in note for note in notes] == [False, True, False]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "run").mkdir(parents=True)
    runs = read_runs([str(tmp_path / "one/run"), str(tmp_path / "two/run")])
    assert [run.name for run in runs] == ["one/run", "two/run"]


def test_smoothing_keeps_a_constant_and_its_ends() -> None:
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 4), 3.0)
