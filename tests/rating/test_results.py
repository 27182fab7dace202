"""Answers become results, a report and an exported table."""

import csv
import json
from pathlib import Path

import pytest
from made_study import add, make_study

from ifvit.errors import UserError
from ifvit.rating.answers import Store
from ifvit.rating.config import RateExportConfig, RateReportConfig
from ifvit.rating.results import export, read_results, report
from ifvit.rating.study import Study

COUNTS = {"early": {"apple": 5, "bus": 1}, "intermediate": {"apple": 2, "bus": 1}}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two raters have finished: both rank intermediate, early, late and count as in COUNTS.

    Rater 2 swaps early and late in repeated questions, and skips the first question without a
    repeat.
    """
    study = make_study(tmp_path_factory.mktemp("rated"), num_preference=10)
    store = Store(study.folder)
    blind = {name: blind for blind, name in study.names.items()}
    for rater in (1, 2):
        for task in study.tasks(rater):
            if task.item.kind == "counting":
                (name,) = (study.names[each] for each in task.shown)
                add(store, task, rater, COUNTS[name][str(task.item.object)])
                continue
            order = ["intermediate", "early", "late"]
            if task.repetition and rater == 2:
                order = ["intermediate", "late", "early"]
            add(store, task, rater, tuple(blind[name] for name in order))
    first = next(t for t in study.tasks(2) if not is_repeated(study, t.item.number, 2))
    add(store, first, 2, None, "too close to call")
    store.close()
    return study


def is_repeated(study: Study, number: int, rater: int) -> bool:
    return any(t.repetition for t in study.tasks(rater) if t.item.number == number)


def test_rankings_become_mean_ranks_scores_and_win_rates(study: Study) -> None:
    found = read_results(str(study.folder)).preference
    assert found is not None
    assert found.num_rankings == 19
    means = {name: estimate.value for name, estimate in found.mean_rank.items()}
    assert means == {"early": 2, "intermediate": 1, "late": 3}
    scores = {name: estimate.value for name, estimate in found.score.items()}
    assert scores == {"early": 2, "intermediate": 3, "late": 1}
    wins = {(rate.first, rate.second): rate.share.value for rate in found.win_rates}
    assert wins == {
        ("early", "intermediate"): 0,
        ("early", "late"): 1,
        ("intermediate", "late"): 1,
    }
    assert found.alpha == 1


def test_repeats_only_measure_consistency(study: Study) -> None:
    found = read_results(str(study.folder)).preference
    assert found is not None
    assert found.replies.num_repeats == 2
    assert found.replies.consistency == pytest.approx((1 + 2 / 3) / 2)
    assert found.replies.skips == {"too close to call": 1}
    assert found.replies.num_shown == 22


def test_counts_become_the_papers_error_and_match_ratio(study: Study) -> None:
    found = read_results(str(study.folder)).counting
    assert found is not None
    numbers = {
        (group.object, group.count): {
            name: (group.average_error[name].value, group.match_ratio[name].value)
            for name in group.average_error
        }
        for group in found.groups
    }
    right, apples = (0, 1), (3, 0)
    assert numbers == {
        (None, None): {"early": (1.5, 0.5), "intermediate": right},
        ("apple", None): {"early": apples, "intermediate": right},
        ("bus", None): {"early": right, "intermediate": right},
        (None, 1): {"early": right, "intermediate": right},
        (None, 2): {"early": apples, "intermediate": right},
        ("apple", 2): {"early": apples, "intermediate": right},
        ("bus", 1): {"early": right, "intermediate": right},
    }
    assert found.groups[0].average_error["early"].num_samples == 4
    assert found.alpha == 1


def test_the_report_has_sentences_and_numbers(study: Study) -> None:
    report(RateReportConfig(study=str(study.folder)))
    page = (study.folder / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "intermediate is above early in 100 % of 19 rankings" in page
    assert "preferred" not in page  # one training each does not tell recipes apart
    assert "No sign that the place on the page changed the rank" in page
    assert "early: off by 1.50 objects on average" in page
    assert "Agreement between raters is reliable: Krippendorff's alpha is 1.00" in page
    assert "In 2 repeated questions, 83 % of the pairs of images were put in the same order" in page
    assert "5 % of 22 questions were skipped: too close to call 1." in page
    assert "<link" not in page
    assert "<script" not in page
    numbers = json.loads((study.folder / "results.json").read_text())
    assert numbers["preference"]["mean_rank"]["late"]["value"] == 3
    assert [rater["done"] for rater in numbers["progress"]] == [16, 16, 0]


def test_a_study_without_answers_has_a_report(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    results = read_results(str(study.folder))
    assert (results.preference, results.counting) == (None, None)
    report(RateReportConfig(study=str(study.folder)))
    assert "No ranking yet." in (study.folder / "report.html").read_text()
    with pytest.raises(UserError, match="no answers yet"):
        export(RateExportConfig(study=str(study.folder), output=str(tmp_path / "x.csv")))


def test_an_export_has_one_row_per_image_shown(study: Study, tmp_path: Path) -> None:
    for name in ("answers.csv", "answers.jsonl"):
        export(RateExportConfig(study=str(study.folder), output=str(tmp_path / name)))
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    with (tmp_path / "answers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == table
    assert len(rows) == 2 * (11 * 3 + 5)
    ranks = {(row["model"], row["rank"]) for row in rows if row["kind"] == "preference"}
    assert ("intermediate", 1) in ranks
    assert ("early", None) in ranks  # the skipped question
    assert {row["count"] for row in rows if row["object"] == "apple"} == {2, 5}
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        RateExportConfig(study=str(study.folder), output="answers.xlsx")
