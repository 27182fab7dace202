"""`report` of made run folders compares the runs and names missing files."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from made_counts import made_row
from made_runs import build_row, estimate, write_evaluation, write_run

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow
from ifvit.evaluation.runs import read_runs
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import write_sealed
from ifvit.studies.arms import Selection, as_arms, select
from ifvit.studies.comparisons import compare, questions_about
from ifvit.studies.config import ReportConfig
from ifvit.studies.quantities import HELD_OUT_LOSS, RETRIEVAL
from ifvit.studies.study_figures import curves_figure, guidance_figure, steps_figure
from ifvit.studies.study_page import report
from ifvit.studies.study_tables import arms_table, evaluations_table


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs; tests only read them."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        write_run(folder / "early", build_row(0.41)),
        write_run(folder / "intermediate", build_row(0.63), "image 5*cross_attention image"),
    ]
    for run in found:
        write_sealed(f"{run}/evaluation/object_count/w2/step_00001200.json", made_row((0, 1)))
    return found


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(runs, tmp_path_factory.mktemp("page") / "report.html")


def render(runs: list[str], output: Path) -> str:
    report(ReportConfig(runs=runs, output=str(output)))
    return " ".join(output.read_text().split())


def selected(*runs: str) -> Selection:
    return select(as_arms(read_runs(list(runs))))


def test_the_page_shows_both_runs_and_needs_no_network(page: str) -> None:
    for expected in ("early", "intermediate", "63.0 %", "41.0 %", "two red circles", "150"):
        assert expected in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "url(http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64") == 3 * 2 + 1 + 2
    for anchor in re.findall(r'<a href="#(\w+)"', page):
        assert f'<h2 id="{anchor}">' in page
    for section in ("claims", "atlas", "attention"):
        assert f'<h2 id="{section}">' not in page
    assert "Match ratio, all counts" in page


def test_one_run_per_arm_never_makes_a_difference(runs: list[str], page: str) -> None:
    assert 'class="better"' not in page
    selection = selected(*runs)
    evaluations = selection.evaluations(selection.series[0])
    (found,) = compare(evaluations, questions_about(evaluations, "early", [RETRIEVAL]))
    assert found.outcome == "open"
    assert found.difference.mean == pytest.approx(0.22)


def test_what_is_missing_is_named_and_never_invented(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = render([str(tmp_path / "empty")], tmp_path / "report.html")
    for verb in (
        "metrics.jsonl",
        "--steps all",
        "--guidance_scales",
        "object_count",
        "rate create",
        "attention",
    ):
        assert verb in page
    assert not re.search(r"<td[^>]*>[^—1<]", page)


def test_a_run_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        render([str(tmp_path / "nowhere")], tmp_path / "report.html")


def test_runs_evaluated_in_another_way_are_named_and_not_compared(tmp_path: Path) -> None:
    other = "image 5*cross_attention image"
    urls = [
        write_run(tmp_path / "a", build_row(0.5)),
        write_run(tmp_path / "b", build_row(0.9, num_steps=50), other),
        write_run(tmp_path / "c", build_row(0.7), other),
        write_run(tmp_path / "d", build_row(0.8, guidance_scale=4.0), other),
    ]
    selection = selected(*urls)
    assert selection.excluded == [
        "b is left out of scenes/w2 at step 1,200: num steps 50 against 25.",
        "b has no evaluation scenes/w2 that can be compared.",
        "d has no evaluation scenes/w2 that can be compared.",
    ]
    evaluations = selection.evaluations(selection.series[0])
    assert [name for name, seeds in evaluations.items() if seeds] == ["a", "c"]
    assert [str(series) for series in selection.series] == ["scenes/w2", "scenes/w4"]


def with_method(row: MetricsRow, method: str, seconds: float) -> MetricsRow:
    sampling = SamplingConfig(num_steps=25, method=method).settings  # type: ignore[arg-type]
    protocol = dataclasses.replace(row.protocol, name=f"scenes_{method}", sampling=sampling)
    return dataclasses.replace(row, protocol=protocol, seconds_per_image=seconds)


def test_alignment_methods_of_one_run_are_shown_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", with_method(build_row(0.4), "plain", 0.5))
    write_evaluation(Path(run), with_method(build_row(0.6), "date", 0.75))
    write_evaluation(Path(run), with_method(build_row(0.4, step=600), "regulate", 0.5))
    table = evaluations_table(selected(run))
    found = [
        dict(zip(table.heads[1:], (cell.text for cell in line.cells), strict=True))
        for line in table.lines
        if line.cells[1].text == "1,200"
    ]
    assert [one["Method"] for one in found] == ["date", "plain"]
    assert [one["Seconds per image"] for one in found] == ["0.750", "0.500"]
    assert [one["Retrieval among 16 captions ↑"] for one in found] == ["60.0 %", "40.0 %"]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "run").mkdir(parents=True)
    runs = read_runs([str(tmp_path / "one/run"), str(tmp_path / "two/run")])
    assert [run.name for run in runs] == ["one/run", "two/run"]


def test_held_out_losses_of_other_targets_are_not_compared(tmp_path: Path) -> None:
    def row(loss: float, target: str) -> MetricsRow:
        return dataclasses.replace(build_row(0.5), held_out_loss=estimate(loss), target=target)

    urls = [
        write_run(tmp_path / "a", row(0.5, "epsilon")),
        write_run(tmp_path / "b", row(0.9, "flow"), prediction="flow"),
        write_run(tmp_path / "c", row(0.3, "epsilon")),
    ]
    with Path(urls[2], "config.yaml").open("a") as recipe:
        recipe.write("objective: {min_snr_gamma: 1.0}\n")
    selection = selected(*urls)
    evaluations = selection.evaluations(selection.series[0])
    (found,) = compare(evaluations, questions_about(evaluations, "a", [HELD_OUT_LOSS]))
    assert found.question.arm == "c"
    table = arms_table("", selection.arms, evaluations)
    column = [*table.heads].index("Held-out loss ↓") - 1
    notes = [line.cells[column].notes[-1] for line in table.lines]
    assert notes == ["of epsilon", "of flow", "of epsilon"]
    panels = {plot.title: plot for plot in curves_figure(selection.arms).plots}
    own = {title: plot for title, plot in panels.items() if title.startswith("Held-out")}
    named = {title: {record["name"] for record in plot.records} for title, plot in own.items()}
    assert named == {
        "Held-out loss: epsilon of vae 000000000000 x 1, 9 samples of made": {"a", "c"},
        "Held-out loss: flow of vae 000000000000 x 1, 9 samples of made": {"b"},
    }
    assert [title for title in panels if title.startswith("Loss")] == [
        "Loss: epsilon of vae 000000000000 x 1",
        "Loss: flow of vae 000000000000 x 1",
        "Loss: epsilon of vae 000000000000 x 1, min_snr_gamma 1.0",
    ]


def test_training_curves_are_means_of_neighbouring_lines(runs: list[str]) -> None:
    (early, *_) = read_runs(runs)
    panel = curves_figure(as_arms([early])).plots[2]
    points = panel.records
    losses = [row.loss for row in early.curve if row.loss is not None]
    assert len(points) == 100 < len(losses)
    ys = [float(str(point["y"])) for point in points]
    assert ys[0] == pytest.approx(np.mean(losses[:2]))
    assert ys[-1] == pytest.approx(losses[-1])
    for point, y in zip(points, ys, strict=True):
        assert float(str(point["low"])) <= y <= float(str(point["high"]))


def test_metrics_are_plotted_over_steps_and_guidance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", build_row(0.5))
    write_evaluation(Path(run), build_row(0.3, step=600))
    write_evaluation(Path(run), build_row(0.4, guidance_scale=4.0))
    write_evaluation(Path(run), build_row(0.9, step=900, num_samples=64))
    selection = selected(run)
    figure = steps_figure(selection, [RETRIEVAL])
    steps, operations = figure.plots
    assert [(one["x"], one["y"]) for one in steps.records] == [(600, 0.3), (1200, 0.5)]
    xs = [float(str(one["x"])) for one in operations.records]
    cost = selection.runs[0].cost
    assert cost
    assert xs == pytest.approx([3 * cost.flops * 32 * step for step in (600, 1200)])
    assert [*figure.svgs] == [*figure.svgs], "the same numbers give the same page"
    (guidance,) = guidance_figure(selection, [RETRIEVAL]).plots
    assert [(one["label"], one["y"]) for one in guidance.records] == [("w=2", 0.5), ("w=4", 0.4)]


def test_the_fusion_map_is_drawn_with_a_square_per_block(page: str) -> None:
    assert 'aria-label="fusion map image 5*cross_attention image"' in page
    assert page.count(': cross_attention"></i>') == 7 + 5
    assert page.count(': image"></i>') == 2
    assert page.count('title="text branch"></i>') == 2
    assert "cross_attention_intermediate" in page
