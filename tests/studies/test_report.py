"""`report` of made run folders compares the runs and names missing files."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_counts import made_row
from made_runs import build_row, estimate, write_evaluation, write_run

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow
from ifvit.evaluation.runs import Run, read_runs
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import write_sealed
from ifvit.studies.comparisons import Comparison, compare_runs
from ifvit.studies.config import ReportConfig
from ifvit.studies.report import curve_panels, method_tables, metric_lines, report


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        write_run(tmp_path / "early", build_row(0.41)),
        write_run(tmp_path / "intermediate", build_row(0.63), "image 5*cross_attention image"),
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
    assert "Alignment methods" not in page
    assert "Object count" not in page
    assert page == render(runs, tmp_path / "again.html"), "the page is reproducible"


def test_what_a_run_lacks_is_named_and_never_invented(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = render([str(tmp_path / "empty")], tmp_path / "report.html")
    for name in ("config.yaml", "metrics.jsonl", "weights", "samples", "evaluation"):
        assert f"empty/{name}:" in page
    assert not re.search(r"<td[^>]*>[^—<]", page)


def test_a_run_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        render([str(tmp_path / "nowhere")], tmp_path / "report.html")


def test_runs_are_compared_metric_by_metric_and_never_called_different(
    runs: list[str], tmp_path: Path
) -> None:
    found = {one.metric.field: one for one in compare_runs(*read_runs(runs))}
    assert found.keys() == {
        *("retrieval_at_16", "clip_score", "clip_score_paper", "frechet_distance"),
        "count_accuracy",
    }
    assert found["retrieval_at_16"].question[1:] == ("intermediate", "early")
    assert {one.outcome for one in found.values()} == {"open"}
    page = render(runs, tmp_path / "report.html")
    assert "intermediate against early: " in page
    assert (
        "one run each: +22.0 points, 95 % interval +16.5 to +27.5 over samples, not paired; "
        "one seed does not tell recipes apart"
    ) in page
    assert 'class="best"' not in page


def test_runs_evaluated_in_different_ways_are_marked_and_not_compared(tmp_path: Path) -> None:
    urls = [
        write_run(tmp_path / "a", build_row(0.5)),
        write_run(
            tmp_path / "b", build_row(0.9, guidance_scale=4.0), "image 5*cross_attention image"
        ),
        write_run(tmp_path / "c", build_row(0.7), "image 5*cross_attention image"),
    ]
    page = " ".join(render(urls, tmp_path / "report.html").split())
    assert "b is not compared, because it was not measured like the first run" in page
    assert "first run: guidance scale 4.0 against 2.0." in page
    assert "b against a" not in page
    assert "c against a" in page
    rows = {run.name: run.last for run in read_runs(urls)}
    cells = metric_lines(rows, {"b"})[0].cells
    assert ["not compared" in cell.note for cell in cells] == [False, True, False]


def with_method(row: MetricsRow, method: str, seconds: float) -> MetricsRow:
    sampling = SamplingConfig(num_steps=25, method=method).settings  # type: ignore[arg-type]
    protocol = dataclasses.replace(row.protocol, name=f"scenes_{method}", sampling=sampling)
    return dataclasses.replace(row, protocol=protocol, seconds_per_image=seconds)


def test_alignment_methods_of_one_run_are_shown_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", with_method(build_row(0.4), "plain", 0.5))
    write_evaluation(Path(run), with_method(build_row(0.6), "date", 0.75))
    write_evaluation(Path(run), with_method(build_row(0.4, step=600), "regulate", 0.5))
    (table,) = method_tables(read_runs([run]))
    assert table.heads == ["run, step 1,200", "plain", "date"]
    cells = {line.title: line.cells for line in table.lines}
    assert [cell.text for cell in cells["Seconds per image"]] == ["0.500", "0.750"]
    retrieval = cells["Retrieval among 16 captions ↑"]
    assert [cell.text for cell in retrieval] == ["40.0 %", "60.0 %"]
    assert "Alignment methods" in render([run], tmp_path / "report.html")


def test_object_counts_of_runs_are_shown_side_by_side(runs: list[str], tmp_path: Path) -> None:
    for run in runs:
        write_sealed(f"{run}/evaluation/object_count/w2/step_00001200.json", made_row((0, 1)))
    page = render(runs, tmp_path / "report.html")
    assert "Match ratio, all counts" in page


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "run").mkdir(parents=True)
    runs = read_runs([str(tmp_path / "one/run"), str(tmp_path / "two/run")])
    assert [run.name for run in runs] == ["one/run", "two/run"]


def test_held_out_losses_of_other_targets_are_not_compared(tmp_path: Path) -> None:
    def row(retrieval: float, loss: float, target: str) -> MetricsRow:
        return dataclasses.replace(
            build_row(retrieval), held_out_loss=estimate(loss), target=target
        )

    urls = [
        write_run(tmp_path / "a", row(0.5, 0.5, "epsilon")),
        write_run(tmp_path / "b", row(0.5, 0.9, "flow"), prediction="flow"),
        write_run(tmp_path / "c", row(0.5, 0.3, "epsilon")),
    ]
    with Path(urls[2], "config.yaml").open("a") as recipe:
        recipe.write("objective: {min_snr_gamma: 1.0}\n")
    a, b, c = runs = read_runs(urls)
    cells = {line.title: line.cells for line in metric_lines({run.name: run.last for run in runs})}
    losses = cells["Held-out loss ↓"]
    assert [cell.text for cell in losses] == ["0.5000", "0.9000", "0.3000"]
    assert ["not compared" in cell.note for cell in losses] == [False, True, False]
    for other, compared in ((b, False), (c, True)):
        fields = [comparison.metric.field for comparison in compare_runs(a, other)]
        assert ("held_out_loss" in fields) == compared
    panels = {panel.title: panel for panel in curve_panels(runs, dict.fromkeys("abc", 0))}
    own = {
        title: panel for title, panel in panels.items() if title.startswith("Held-out loss over s")
    }
    named = {title: {point.name for point in panel.points} for title, panel in own.items()}
    assert named == {
        "Held-out loss over steps: epsilon of vae 000000000000 x 1, 9 samples of made": {"a", "c"},
        "Held-out loss over steps: flow of vae 000000000000 x 1, 9 samples of made": {"b"},
    }
    assert [title for title in panels if title.startswith("Loss over s")] == [
        "Loss over steps: epsilon of vae 000000000000 x 1",
        "Loss over steps: flow of vae 000000000000 x 1",
        "Loss over steps: epsilon of vae 000000000000 x 1, min_snr_gamma 1.0",
    ]
    assert a.last_validation_loss == 2 / 1200
    page = render(urls, tmp_path / "report.html")
    assert "Last held-out loss while training" in page


def test_held_out_losses_are_compared_sample_by_sample(tmp_path: Path) -> None:
    def made(name: str, losses: list[float]) -> Run:
        row = dataclasses.replace(
            build_row(0.5), held_out_loss=estimate(float(np.mean(losses)), 0.3), target="epsilon"
        )
        (run,) = read_runs([write_run(tmp_path / name, row)])
        pairs = zip(run.samples, losses, strict=True)
        samples = [dataclasses.replace(sample, held_out_loss=loss) for sample, loss in pairs]
        return dataclasses.replace(run, samples=samples)

    def find(second: Run) -> Comparison:
        found = {one.metric.field: one for one in compare_runs(base, second)}
        return found["held_out_loss"]

    base = made("base", [0.2, 0.5, 0.8])
    other = made("other", [0.19, 0.48, 0.79])
    paired = find(other)
    assert paired.captions_are_paired
    assert paired.difference.caption_error == pytest.approx(0.01 / 3)
    unpaired = find(dataclasses.replace(other, samples=other.samples[:2]))
    assert not unpaired.captions_are_paired
    assert unpaired.difference.caption_error == pytest.approx(0.3 * math.sqrt(2))


def test_training_curves_are_means_of_neighbouring_lines(runs: list[str]) -> None:
    early, other = read_runs(runs)
    panel = curve_panels([early, other], {early.name: 0, other.name: 1})[0]
    points = [point for point in panel.points if point.name == early.name]
    losses = [row.loss for row in early.curve if row.loss is not None]
    assert len(points) == 100 < len(losses)
    assert all(point.low <= point.y <= point.high for point in points)
    assert points[0].y == pytest.approx(np.mean(losses[:2]))
    assert points[-1].y == pytest.approx(losses[-1])
    assert early.last_loss == pytest.approx(np.mean(losses[-12:]))


def test_the_fusion_map_is_drawn_with_a_square_per_block(runs: list[str], tmp_path: Path) -> None:
    page = render(runs, tmp_path / "report.html")
    assert 'aria-label="fusion map image 5*cross_attention image"' in page
    assert page.count(': cross_attention"></i>') == 7 + 5
    assert page.count(': image"></i>') == 2
    assert page.count('title="text branch"></i>') == 2
    assert "cross_attention_intermediate" in page
