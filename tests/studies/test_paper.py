"""`report paper` of made run folders shows the right numbers and names the missing ones."""

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_counts import made_row
from made_runs import build_row, estimate, write_evaluation, write_training
from made_training_rows import made_training_row
from PIL import Image

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow
from ifvit.evaluation.runs import read_runs
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.presets import PRESETS, with_setting
from ifvit.rating.agreement import OrderBias
from ifvit.rating.results import PreferenceResults, Replies
from ifvit.storage import write_sealed
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import mean_score, read_counts
from ifvit.studies.paper import (
    GFLOPS,
    SPEED,
    measure,
    report_paper,
    table_1,
    table_2,
    table_further,
    unlike_the_paper,
)
from ifvit.studies.paper_figures import figure_3, figure_6, figure_7
from ifvit.studies.quantities import COUNT_ERROR, FRECHET
from ifvit.studies.variants import PAPER_VARIANTS, Sheet, make_sheet, title_of

PAPER_PROTOCOL = {
    "name": "coco2014_fid30k",
    "num_samples": 30_000,
    "caption_rule": "random",
    "num_steps": 50,
    "score_caption": "first",
    "paper_prefix": "A photo depicts ",
    "features": "openai/clip-vit-large-patch14",
}
VARIANTS = (
    *PAPER_VARIANTS,
    "cross_attention_image_blocks_only",
    "cross_attention_text_branch_only",
)
COUNTS = "evaluation/object_count/w2/step_00002000.json"

PREFERENCE = PreferenceResults(
    num_rankings=40,
    mean_rank={},
    score={},
    win_rates=[],
    alpha=None,
    order_bias=OrderBias(mean_ranks=[], chi_square=0.0, p_value=1.0, num_answers=40),
    replies=Replies(num_shown=40, skips={}, num_repeats=0, consistency=None),
)


def backbone_of(variant: str, preset: str = "tiny") -> FusionTransformerConfig:
    return with_setting(PRESETS[preset], variant)


def row_of(distance: float, **changes: object) -> MetricsRow:
    """Build a row whose CLIP Score rises as the distance falls."""
    row = build_row(0.9 - distance, **changes)  # type: ignore[arg-type]
    numbers = {
        "frechet_distance": estimate(distance, 0.001),
        "clip_score_paper": estimate(1.0 - distance, 0.001),
    }
    return dataclasses.replace(row, **numbers)


def write_runs(folder: Path, variants: Sequence[int] = range(6), num_seeds: int = 2) -> list[str]:
    """Write runs with two steps and two guidance scales; later VARIANTS are better."""
    paths = []
    for number in variants:
        for seed in range(num_seeds):
            run = folder / VARIANTS[number] / f"seed{seed}"
            write_training(run, backbone_of(VARIANTS[number]), seed)
            distance = 0.2 - 0.04 * number + 0.002 * seed
            write_evaluation(run, row_of(distance + 0.1, step=600))
            write_evaluation(run, row_of(distance))
            write_evaluation(run, row_of(distance + 0.05, guidance_scale=4.0))
            paths.append(str(run))
    return paths


def sheet_of(runs: list[str], series: str | None = None) -> Sheet:
    return make_sheet(read_runs(runs), series)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two seeds of six variants; tests only read them."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def sheet(runs: list[str]) -> Sheet:
    return sheet_of(runs)


def render(runs: list[str], output: Path, **flags: str) -> str:
    report_paper(PaperConfig(runs=runs, output=str(output), **flags))
    return (output / "paper.html").read_text()


def records(output: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((output / f"{name}.csv").read_text().splitlines()))


def test_the_page_and_its_files_are_complete_and_need_no_network(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs")
    for run, number in zip(runs, [0, 0, 1, 1], strict=False):
        write_sealed(f"{run}/{COUNTS}", made_row((number,) * 2))
    page = render(runs, tmp_path / "sheet")
    files = {path.name for path in (tmp_path / "sheet").iterdir()}
    tables = {"table1.csv", "table1_further.csv", "table2.csv"}
    figures = {f"figure{n}.{end}" for n in (3, 4, 5, 7) for end in ("png", "csv")}
    assert files == {"paper.html", *tables, *figures}
    for figure in figures:
        if figure.endswith("png"):
            Image.open(tmp_path / "sheet" / figure).verify()
    assert not re.search(r"""src=["'](?!data:)""", page)
    assert set(re.findall(r'href="([^#"]+)"', page)) == {
        "https://arxiv.org/abs/2403.16530",
        *(files - {"paper.html"}),
    }
    assert "<script" not in page
    assert "url(http" not in page
    for missing in ("Figure 6: no study", "Figure 8: no run has an analysis"):
        assert page.count(missing) == 2
    (pair, *_) = records(tmp_path / "sheet", "figure4")
    assert "concat_early/seed0" in pair["top"]
    assert "cross_attention_intermediate/seed0" in pair["bottom"]
    assert Path(pair["top"]).name == Path(pair["bottom"]).name


def test_pairs_are_of_the_series_that_is_shown(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", variants=(0, 3), num_seeds=1)
    page = render(runs, tmp_path / "sheet", series="scenes/w4")
    for pair in records(tmp_path / "sheet", "figure4"):
        assert "/w4/" in pair["top"]
        assert "/w4/" in pair["bottom"]
    assert page == render(runs, tmp_path / "again", series="scenes/w4"), "the page is reproducible"


def test_what_is_missing_is_named_and_never_invented(tmp_path: Path) -> None:
    write_training(tmp_path / "run", PRESETS["tiny"])
    page = render([str(tmp_path / "run")], tmp_path / "sheet")
    for number in range(3, 9):
        assert f"Figure {number}: no " in page
    for variant in ("Concat, early", "Concat, intermediate", "Cross-attention, early"):
        assert f"{variant}: no run was given" in page
    assert "No run was evaluated" in page
    ours = {
        (line["variant"], line["quantity"]): line["value"]
        for line in records(tmp_path / "sheet", "table1")
    }
    assert ours["cross_attention_intermediate", "fid"] == ""
    assert float(ours["cross_attention_intermediate", "mparams"]) > 0
    assert ours["concat_early", "mparams"] == ""
    files = {path.name for path in (tmp_path / "sheet").iterdir()}
    assert files == {"paper.html", "table1.csv", "table2.csv"}


def test_table_1_has_means_over_seeds_and_no_distance_under_fid(sheet: Sheet) -> None:
    table = table_1(sheet)
    assert [line.title for line in table.lines] == [title_of(variant) for variant in PAPER_VARIANTS]
    first = dict(zip(table.heads[1:], table.lines[0].cells, strict=True))
    assert (first["Runs"].text, first["Runs"].note) == ("2", "")
    assert (first["FID ↓"].text, first["FID ↓"].note) == ("—", "paper 5.98")
    assert first["Fréchet distance on CLIP features ↓"].note == "± 0.0010"
    assert first["Training it/s ↑"].text == "12.50"
    assert first["Parameters, M ↓"].note == "paper 45"
    assert re.fullmatch(r"0\.0\d{2}", first["GFLOPs ↓"].text)
    (record,) = [
        one
        for one in table.records
        if (one["variant"], one["quantity"]) == ("concat_early", "frechet_distance")
    ]
    assert record["runs"] == 2
    assert (record["seed_error"], record["sample_error"]) == pytest.approx((0.001, 0.001))
    further = table_further(sheet)
    assert further is not None
    assert [line.title for line in further.lines] == [title_of(variant) for variant in VARIANTS]
    assert further.heads[2:] == ["Retrieval among 16 captions ↑", "Count right ↑"]


def test_training_speed_ignores_a_pause(sheet: Sheet) -> None:
    paused = [made_training_row(10, samples_per_s=rate) for rate in (400.0, 400.0, 4.0)]
    run = dataclasses.replace(sheet.variants[VARIANTS[0]][0], curve=paused)
    variants = {VARIANTS[0]: [run]}
    (speed,) = measure(dataclasses.replace(sheet, variants=variants), SPEED).values()
    assert speed.value == 12.5
    assert speed.error > 1, "the pause is part of the noise"


def test_what_differs_from_the_paper_is_named(tmp_path: Path) -> None:
    runs = []
    for variant in PAPER_VARIANTS:
        run = tmp_path / variant
        write_training(run, backbone_of(variant, "small"))
        write_evaluation(run, build_row(0.5, **PAPER_PROTOCOL))  # type: ignore[arg-type]
        runs.append(str(run))
    sheet = sheet_of(runs)
    table = table_1(sheet)
    cells = [dict(zip(table.heads[1:], line.cells, strict=True)) for line in table.lines]
    assert [cell["GFLOPs ↓"].note for cell in cells[:2]] == ["paper 29.56", "paper 25.84"]
    assert [cell["GFLOPs ↓"].text for cell in cells[:2]] == ["29.488", "25.774"]
    assert cells[1]["Parameters, M ↓"].text == "47.84"
    assert unlike_the_paper(sheet) == [
        "training: devices ['cpu'], the paper's ['NVIDIA GeForce RTX 4090']; batch [32], the "
        "paper's [256]"
    ]
    assert sheet.reference is not None
    fewer = dataclasses.replace(sheet.reference.protocol, num_samples=10_000)
    reference = dataclasses.replace(sheet.reference, protocol=fewer)
    others = unlike_the_paper(dataclasses.replace(sheet, reference=reference))
    assert others[0] == "evaluation: num samples 10000, the paper's 30000"


def test_another_backbone_than_the_papers_is_named_once(sheet: Sheet) -> None:
    (found,) = [one for one in unlike_the_paper(sheet) if "width" in one]
    assert found.startswith("Concat, early: ")
    assert "width 96, the paper's 512" in found


def test_table_2_has_both_scales_of_clip_score(sheet: Sheet) -> None:
    found = {str(r["Model"]): r for r in table_2(sheet, VARIANTS[3:4]).records}
    paper = found["IF-U-ViT, the paper's own"]
    assert (paper["CLIP Score ↑"], paper["Raw cosine ↑"]) == ("0.588", "0.235")
    foundation = found["SDXL, as the paper cites it"]
    assert foundation["Raw cosine ↑"] == foundation["CLIP Score ↑"] == "0.305"
    ours = found["ours: Cross-attention, intermediate"]
    assert ours["Raw cosine ↑"] == "0.610"
    assert ours["GFLOPs ↓"] == measure(sheet, GFLOPS)[VARIANTS[3]].value


def test_a_run_evaluated_in_another_way_is_left_out_and_the_page_says_why(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", variants=[0, 3])
    for seed, row in ((2, row_of(9.0, num_steps=50)), (3, row_of(9.0, step=600))):
        run = tmp_path / f"runs/concat_early/seed{seed}"
        write_training(run, backbone_of(VARIANTS[0]), seed)
        write_evaluation(run, row)
        runs.append(str(run))
    sheet = sheet_of(runs)
    assert sheet.excluded == [
        "concat_early/seed2 is left out at step 1,200: num steps 50 against 25",
        "concat_early/seed2 has no comparable scenes/w2 at step 1,200",
        "concat_early/seed3 has no comparable scenes/w2 at step 1,200",
    ]
    line = table_1(sheet).lines[0]
    assert (line.cells[0].text, line.cells[0].note) == ("4", "2 compared")
    assert line.cells[2].note == "± 0.0010"
    assert "num steps 50 against 25" in render(runs, tmp_path / "sheet")


def test_runs_that_failed_are_named_and_the_others_are_shown(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", variants=[0], num_seeds=1)
    failed, unmeasured = tmp_path / "runs/failed", tmp_path / "runs/unmeasured"
    (failed / "jobs").mkdir(parents=True)
    write_training(unmeasured, backbone_of(VARIANTS[0]))
    page = render([str(failed), *runs, str(unmeasured)], tmp_path / "sheet")
    assert ">failed is left out: it has no weights" in page
    assert "unmeasured has no comparable scenes/w2 at step 1,200" in page
    with pytest.raises(UserError, match="failed is left out: it has no weights; give runs"):
        render([str(failed)], tmp_path / "none")


def test_the_series_with_most_rows_then_the_papers_scale_is_shown(runs: list[str]) -> None:
    sheet = sheet_of(runs[:1])
    assert sheet.reference is not None
    assert sheet.reference.protocol.guidance_scale == 2.0
    mean = sheet_of(runs[:1], "scenes/w4").mean(VARIANTS[0], FRECHET)
    assert mean is not None
    assert mean.value == pytest.approx(0.25)
    with pytest.raises(UserError, match=r"scenes/w7: .*choose one of scenes/w2, "):
        sheet_of(runs[:1], "scenes/w7")


def test_steps_evaluated_in_another_way_are_left_out_of_the_curves(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, variants=[0], num_seeds=1)
    write_evaluation(Path(runs[0]), row_of(0.3, step=900, num_samples=64))
    sheet = sheet_of(runs)
    assert list(sheet.means(VARIANTS[0], FRECHET)) == [(600, 2.0), (1200, 2.0), (1200, 4.0)]
    (reason,) = sheet.excluded
    assert reason == "seed0 is left out at step 900: num samples 64 against 500"


def test_figure_3_shows_training_and_guidance(sheet: Sheet) -> None:
    panels = figure_3(sheet).panels
    assert [panel.title for panel in panels[:3]] == [
        "Fréchet distance on CLIP features during training",
        "CLIP Score (paper's scale) during training",
        "Fréchet distance on CLIP features over CLIP Score (paper's scale)",
    ]
    names = dict.fromkeys(point.name for point in panels[0].points)
    assert list(names) == [title_of(variant) for variant in PAPER_VARIANTS]
    points = [(point.x, round(point.y, 3)) for point in panels[0].points]
    assert points[:2] == [(600, 0.301), (1200, 0.201)]
    assert [point.label for point in panels[2].points[:2]] == ["w=2", "w=4"]


def test_figure_7_shows_each_half_between_none_and_both(sheet: Sheet, runs: list[str]) -> None:
    panel = figure_7(sheet).panels[0]
    assert [(point.x, point.name.split(", ")[1]) for point in panel.points] == [
        (0, "early"),
        (1, "image blocks only"),
        (2, "text branch only"),
        (3, "intermediate"),
    ]
    assert not figure_7(sheet_of(runs[:8])).panels


def test_counts_are_means_over_seeds_of_rows_with_one_protocol(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, variants=[0, 1])
    for run, errors in zip(runs, ((2, 2), (1, 1), (0, 1), (0, 1)), strict=True):
        write_sealed(f"{run}/{COUNTS}", made_row(errors))
    sheet = sheet_of(runs)
    counts, _ = read_counts(sheet.variants)
    means = [mean_score(rows, COUNT_ERROR, None, None) for rows in counts.values()]
    assert [mean and mean.value for mean in means] == [1.5, 0.5]

    other = dataclasses.replace(made_row((0, 0)).protocol, num_images=7)
    row = dataclasses.replace(made_row((0, 0)), protocol=other)
    write_sealed(f"{runs[1]}/{COUNTS}", row)
    counts, excluded = read_counts(sheet.variants)
    assert excluded == ["concat_early/seed1 was counted with another num_images."]
    assert [len(rows) for rows in counts.values()] == [1, 2]


def test_a_model_of_a_rating_study_has_the_colour_of_its_variant() -> None:
    score = {"mine": estimate(1.0), "concat_intermediate": estimate(2.0)}
    (panel,) = figure_6(dataclasses.replace(PREFERENCE, score=score)).panels
    assert [point.colour for point in panel.points] == [0, 9]
    assert panel.places == ("mine", "Concat,\nintermediate")


def test_a_run_of_another_map_is_named_and_left_out(runs: list[str], tmp_path: Path) -> None:
    shape = dataclasses.replace(PRESETS["tiny"], fusion="3*image 4*adaln", num_text_blocks=0)
    write_training(tmp_path / "other", shape)
    page = render([*runs[:1], str(tmp_path / "other")], tmp_path / "sheet")
    reason = "other is left out: 3*image 4*adaln is none of the paper&#39;s settings"
    assert reason in page


def test_recipes_that_differ_in_more_than_variant_and_seed_are_named(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", variants=[0, 3], num_seeds=1)
    config = Path(runs[1], "config.yaml")
    config.write_text(config.read_text() + "max_steps: 7\n")
    page = render(runs, tmp_path / "sheet")
    assert "differ in more than variant and seed: max_steps." in page
