"""The report of run folders made of real files; what is missing must show as missing."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ifvit import storage
from ifvit.analysis.config import ReportConfig
from ifvit.analysis.curves import smooth
from ifvit.analysis.report import report
from ifvit.analysis.runs import read_run, read_runs
from ifvit.analysis.verdicts import METRICS, best_run, compare
from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate, MetricsRow, write_row
from ifvit.evaluation.protocol import Protocol
from ifvit.evaluation.rows import FOLDER, row_url, samples_url
from ifvit.images import encode_png
from ifvit.models.presets import PRESETS
from ifvit.sampling.grid import make_grid

PROMPTS = ["two red circles", "a blue square", "<script>alert(1)</script>"]


def build_row(retrieval: float, step: int = 1200, **changes: object) -> MetricsRow:
    def estimate(value: float) -> Estimate:
        return Estimate(
            value=value, standard_error=0.02, num_samples=500, low=value - 0.04, high=value + 0.04
        )

    protocol = Protocol(
        name="scenes",
        num_samples=500,
        caption_rule="first",
        score_caption="same",
        solver="dpm_solver_pp",
        num_steps=25,
        guidance_scale=2.0,
        guidance_low=0.0,
        guidance_high=999.0,
        method="plain",
        seed=0,
        image_size=64,
        resize="center_crop+lanczos",
        prompts_sha256="a" * 64,
        features="scenes/clip",
        features_sha256="b" * 64,
        paper_prefix="",
        inception=None,
        inception_sha256=None,
        num_reference_images=500,
        reference_sha256="c" * 64,
    )
    return MetricsRow(
        weights="run",
        weights_sha256="d" * 64,
        step=step,
        ema_decay=0.999,
        protocol=dataclasses.replace(protocol, **changes),
        frechet_distance=estimate(0.12),
        clip_score=estimate(0.61),
        clip_score_paper=estimate(1.52),
        retrieval_at_16=estimate(retrieval),
        count_accuracy=estimate(0.5),
    )


def write_run(folder: Path, row: MetricsRow, num_image_blocks: int) -> str:
    """A complete run folder; its pictures are noise."""
    draw = np.random.default_rng(num_image_blocks)
    pixels = draw.integers(0, 256, (len(PROMPTS), 16, 16, 3), dtype=np.uint8)
    shape = dataclasses.asdict(PRESETS["tiny"]) | {"num_image_blocks": num_image_blocks}
    curve = [
        {"step": step, "samples_seen": 64 * step, "loss": 1 / step, "grad_norm": 1.0,
         "learning_rate": 2e-4, "samples_per_s": 400.0, "data_wait": 0.01, "seconds": step / 8}
        for step in range(10, 1201, 10)
    ]  # fmt: skip
    protocol = row.protocol
    url = row_url(str(folder / FOLDER), protocol.name, protocol.guidance_scale, row.step)
    evaluation = Path(samples_url(url))
    samples = [
        {"file": f"{n:05d}.png", "prompt": prompt, "position": n, "image_id": n,
         "real": f"real_{n:05d}.png" if n == 0 else None,
         "scores": {"count": False, "colour": True, "kind": True, "relation": None}}
        for n, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    files = {
        folder / "config.yaml": f"seed: 1\nbackbone:\n  num_image_blocks: {num_image_blocks}\n",
        folder / "metrics.jsonl": "".join(json.dumps(entry) + "\n" for entry in curve),
        folder / "weights/step_00001200/ema/config.json": json.dumps(shape),
        evaluation / "samples.jsonl": "".join(json.dumps(entry) + "\n" for entry in samples),
    }
    for path, text in files.items():
        storage.write_bytes(str(path), text.encode())
    for n, image in enumerate(pixels):
        storage.write_bytes(str(evaluation / f"{n:05d}.png"), encode_png(image))
    storage.write_bytes(str(evaluation / "real_00000.png"), encode_png(pixels[0]))
    grid = encode_png(make_grid(pixels, 3))
    storage.write_bytes(str(folder / "samples/step_00001200.png"), grid)
    write_row(url, row)
    return str(folder)


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
    within, beyond = compare(early, close), compare(early, far)
    assert within is not None
    assert beyond is not None
    assert within.verdicts[0].outcome == "same"
    assert "smaller than the noise of 5.7 points" in within.verdicts[0].sentence
    assert "no difference beyond the noise in Retrieval" in within.summary
    assert beyond.verdicts[0].outcome == "worse"
    assert "by 20.0 points" in beyond.verdicts[0].sentence
    assert best_run(METRICS[0], [early, close]) is None
    assert best_run(METRICS[0], [far, close]) is close


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
    comparison = compare(*runs)
    assert comparison is not None
    outcomes = {verdict.metric: verdict.outcome for verdict in comparison.verdicts}
    assert outcomes["Fréchet distance"] == "better"


def test_evaluations_done_differently_are_marked(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", build_row(0.5), 0),
        write_run(tmp_path / "b", build_row(0.5, guidance_scale=4.0), 3),
    ]
    assert "not done alike (guidance scale" in render(runs, tmp_path / "report.html")


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "run").mkdir(parents=True)
    runs = read_runs([str(tmp_path / "one/run"), str(tmp_path / "two/run")])
    assert [run.name for run in runs] == ["one/run", "two/run"]


def test_smoothing_keeps_a_constant_and_its_ends() -> None:
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 4), 3.0)
