"""`study report` of made runs: the page, its files, and what is missing, left out or published."""

import csv
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_counts import made_row
from made_runs import PROMPTS, build_row, estimate, write_evaluation, write_training
from PIL import Image

from ifvit.evaluation.rows import MetricsRow
from ifvit.models.presets import PRESETS
from ifvit.rating.agreement import OrderBias
from ifvit.rating.results import PreferenceResults, Replies
from ifvit.storage import write_sealed
from ifvit.studies.arms import plan_runs, read_arms, select
from ifvit.studies.config import Claim, Published, StudyReportConfig
from ifvit.studies.quantities import RETRIEVAL
from ifvit.studies.study_figures import atlas_figures, rating_figure
from ifvit.studies.study_page import report_study
from ifvit.studies.study_tables import PublishedNumbers
from ifvit.training.config import TrainConfig

ARMS = {
    "early": {"backbone.fusion": "7*cross_attention"},
    "middle": {"backbone.fusion": "2*image 3*cross_attention 2*image"},
}
GAINS = {"early": 0.0, "middle": 0.2}
COUNTS = "evaluation/object_count/w2/step_00002000.json"
PAPER = Published(
    source="a paper",
    values={"early": {"retrieval_at_16": 0.5, "gflops": 29.56}},
    protocol={"num_samples": 500, "step": 1200, "guidance_scale": 2.0, "ema_decay": 0.999},
)
BETTER = {"retrieval_at_16": "better"}
CLAIMS: list[dict[str, Any]] = [
    {"text": "Text helps in the middle.", "arm": "middle", "against": ("early",)},
    {"text": "Text helps first.", "arm": "early", "against": ("middle",)},
]


def study(folder: Path, **changes: Any) -> StudyReportConfig:
    """Describe a study of two arms and three seeds."""
    recipe = TrainConfig(
        run="ignored", shards="made", backbone=PRESETS["tiny"], max_steps=1200, global_batch_size=32
    )
    settings: dict[str, Any] = {"folder": str(folder), "train": recipe, "arms": ARMS} | changes
    return StudyReportConfig(**settings)


def row_of(arm: str, seed: int, **changes: Any) -> MetricsRow:
    """Build a row in which the middle is always better, by almost the same amount."""
    gain = GAINS[arm] * (1 + 0.01 * seed)
    row = build_row(0.4 + 0.05 * seed + gain, **changes)
    return dataclasses.replace(row, held_out_loss=estimate(1.0 + seed), target="epsilon")


def write_runs(config: StudyReportConfig) -> None:
    for run in plan_runs(config):
        folder = Path(run.recipe.run)
        write_training(folder, run.recipe.backbone, run.seed)
        write_evaluation(folder, row_of(run.arm, run.seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished study, and its page; tests only read them."""
    folder = tmp_path_factory.mktemp("study")
    claims = tuple(Claim(**claim, metrics=BETTER) for claim in CLAIMS)
    config = study(folder, claims=claims, published=(PAPER,), title="<b>Where</b>")
    write_runs(config)
    for number, arm in enumerate(ARMS):
        write_sealed(str(folder / arm / "seed1" / COUNTS), made_row((number, number)))
    report_study(config)
    return folder, " ".join((folder / "report/index.html").read_text().split())


def records(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"report/{name}.csv").read_text().splitlines()))


def test_the_page_and_its_files_are_complete_and_need_no_network(made: tuple[Path, str]) -> None:
    folder, page = made
    files = {path.name for path in (folder / "report").iterdir()}
    tables = {"arms", "claims", "differences", "pairing", "evaluations", "protocol", "recipes"}
    drawn = {"forest", "captions", "training", "object_count"}
    expected = {f"{name}.csv" for name in tables | drawn} | {f"{name}.png" for name in drawn}
    assert files == expected | {"index.html", "results.md"}
    for name in drawn:
        Image.open(folder / f"report/{name}.png").verify()
    assert not re.search(r"""src=["'](?!data:)""", page)
    assert set(re.findall(r'href="([^#"]+)"', page)) == expected
    assert "<script" not in page
    assert "<b>Where" not in page
    assert "6 of 6 runs are finished." in page
    assert "not shown" not in page


def test_the_table_of_arms_has_means_over_seeds_and_marks_differences(
    made: tuple[Path, str],
) -> None:
    folder, page = made
    early, middle = records(folder, "arms")
    retrieval = "Retrieval among 16 captions ↑"
    assert (early["Arm"], early["Runs"], middle["Arm"]) == ("early", "3", "middle")
    assert float(early[retrieval]) == pytest.approx(0.5)
    assert float(middle[f"{retrieval} error"]) == pytest.approx(0.052 / 3**0.5)
    assert float(early["Parameters, M"]) > 0
    assert page.count('<td class="better">') == 2, "in the table of arms and of differences"
    assert "published 0.5" in page


def test_claims_are_confirmed_or_refuted_by_the_paired_rule(made: tuple[Path, str]) -> None:
    folder, page = made
    assert [one["Verdict"] for one in records(folder, "claims")] == ["confirmed", "refuted"]
    assert 'class="chip confirmed">confirmed</b> Text helps in the middle.' in page
    (one,) = [r for r in records(folder, "differences") if r["Metric"].startswith("Retrieval")]
    assert float(one["Difference"]) == pytest.approx(0.204)
    assert (one["Outcome"], one["Seeds"]) == ("better", "3")


def test_results_are_written_as_markdown_too(made: tuple[Path, str]) -> None:
    text = (made[0] / "report/results.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| middle | 3 |")]
    assert "| 70.4 % ± 3.0 % ▲ |" in line
    widths = {line.count(" | ") for line in text.split("###")[1].splitlines() if "|" in line}
    assert len(widths) == 1


def test_captions_are_shown_with_the_images_of_all_arms(made: tuple[Path, str]) -> None:
    folder, page = made
    found = records(folder, "captions")
    assert [one["caption"] for one in found[::2]] == PROMPTS
    assert [Path(one["file"]).name for one in found] == [
        name for number in range(3) for name in 2 * [f"{number:05d}.png"]
    ]
    assert all("/seed1/" in one["file"] for one in found)
    assert page.count("data:image/png;base64") >= 3 * 2 + 1


def test_runs_that_are_missing_unfinished_or_of_another_recipe_are_named(tmp_path: Path) -> None:
    config = study(tmp_path)
    for run in plan_runs(config)[:5]:
        shape = dataclasses.replace(run.recipe.backbone, width=48 if run.seed == 2 else 96)
        write_training(Path(run.recipe.run), shape, run.seed)
    longer = study(tmp_path, seeds=(1,), steps=2400)
    arms, absent = read_arms(config, plan_runs(config))
    assert {arm.name: list(arm.runs) for arm in arms} == {"early": [1, 3], "middle": [1]}
    assert absent == [
        "early/seed2: trained with another recipe: backbone.width 48, in the study 96",
        "middle/seed2: trained with another recipe: backbone.width 48, in the study 96",
        "middle/seed3: not started",
    ]
    _, absent = read_arms(longer, plan_runs(longer))
    assert absent[0] == "early/seed1: at step 1,200 of 2,400"


def test_a_study_that_has_not_begun_names_its_runs(tmp_path: Path) -> None:
    report_study(study(tmp_path))
    page = (tmp_path / "report/index.html").read_text()
    assert "0 of 6 runs are finished." in page
    assert "<li>middle/seed3: not started</li>" in page
    assert "No run has been evaluated" in page
    assert "ifvit study run" in page


def test_only_evaluations_of_the_last_step_are_compared(tmp_path: Path) -> None:
    config = study(tmp_path, seeds=(1,))
    write_runs(config)
    for file in (tmp_path / "middle/seed1/evaluation/scenes/w2").glob("*.json"):
        file.unlink()
    write_evaluation(tmp_path / "middle/seed1", row_of("middle", 1, step=600))
    arms, _ = read_arms(config, plan_runs(config))
    selection = select(arms, at_end=True)
    assert selection.excluded == [
        "middle/seed1 has no evaluation scenes/w2 that can be compared at its last step, 1,200."
    ]
    assert not selection.evaluations(selection.series[0])["middle"]


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({}, []),
        ({"num_samples": 30_000}, ["num samples 30000, ours 500"]),
        ({"inception_sha256": "e" * 64}, ["inception hash eeeeeeeeeeee, ours none"]),
        ({"guidance_low": 0.3}, ["guidance low 0.3, ours 0.0"]),
        ({"shutter": 1}, ["shutter 1, ours none"]),
    ],
)
def test_a_difference_from_a_published_metric_needs_the_same_protocol(
    changes: Mapping[str, Any], unlike: list[str]
) -> None:
    quoted = dataclasses.replace(PAPER, protocol={**PAPER.protocol, **changes})
    published = PublishedNumbers([quoted], [build_row(0.6)])
    assert published.unlike == {"a paper": unlike}
    notes = published.notes("early", RETRIEVAL, 0.6)
    assert notes == ["published 0.5", *([] if unlike else ["ours +10.0 points"])]
    assert published.notes("middle", RETRIEVAL, 0.6) == []


def test_four_windows_of_one_mechanism_make_an_atlas(tmp_path: Path) -> None:
    maps = {
        "all": "7*adaln",
        "first": "2*adaln 5*image",
        "middle": "2*image 3*adaln 2*image",
        "last": "5*image 2*adaln",
        "two": "adaln 5*image adaln",
    }
    arms = {name: {"backbone.fusion": fusion} for name, fusion in maps.items()}
    config = study(tmp_path, arms=arms, seeds=(1,))
    for place, run in enumerate(plan_runs(config)):
        write_training(Path(run.recipe.run), run.recipe.backbone)
        write_evaluation(Path(run.recipe.run), build_row(0.1 * place))
    found, _ = read_arms(config, plan_runs(config))
    selection = select(found)
    evaluations = selection.evaluations(selection.series[0])
    (atlas,) = atlas_figures(selection, evaluations, [RETRIEVAL]).values()
    rows = {(one["first"], one["last"]): one["mean"] for one in atlas.records}
    assert rows == pytest.approx({(0, 6): 0.0, (0, 1): 10.0, (2, 4): 20.0, (5, 6): 30.0})
    fewer = dataclasses.replace(selection, arms=selection.arms[1:])
    assert not atlas_figures(fewer, evaluations, [RETRIEVAL])


def test_a_model_of_a_rating_study_has_the_colour_of_its_arm() -> None:
    found = PreferenceResults(
        num_rankings=40,
        mean_rank={},
        score={"mine": estimate(1.0), "text_in_the_middle": estimate(2.0)},
        win_rates=[],
        alpha=None,
        order_bias=OrderBias(mean_ranks=[], chi_square=0.0, p_value=1.0, num_answers=40),
        replies=Replies(num_shown=40, skips={}, num_repeats=0, consistency=None),
    )
    colours = {"text_in_the_middle": 9}
    ((_, svg),) = rating_figure(found, colours).svgs
    assert "var(--run0)" in svg
    assert "var(--run9)" in svg
    assert "text in the<" in svg
    assert not rating_figure(None, colours).plots
