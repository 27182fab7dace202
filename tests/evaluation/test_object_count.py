"""Object counts from prompts to rows, on a real run whose images give way to known ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ifvit.evaluation.object_prompts import read_count_prompts
from made_counts import made_row

from ifvit.errors import UserError
from ifvit.evaluation.config import ObjectCountConfig
from ifvit.evaluation.object_count import (
    CountedImage,
    differences,
    read_object_count,
    score_counts,
    write_object_count,
)
from ifvit.images import encode_png
from ifvit.sampling.config import SamplingConfig
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.drawings import Scene, render_scene
from ifvit.studies.object_counts import count_objects_of_runs

PROMPTS = read_count_prompts("scenes")


@pytest.fixture
def counting(run: str, tmp_path: Path) -> ObjectCountConfig:
    return ObjectCountConfig(
        runs=[run],
        detector="scenes",
        prompts="scenes",
        output=str(tmp_path / "counts"),
        num_images=2,
        sampling=SamplingConfig(num_steps=2, batch_size=30),
        device="cpu",
    )


def images(*counts: tuple[str, int, int]) -> list[CountedImage]:
    return [
        CountedImage(file="", prompt="", object=name, asked=asked, counted=counted)
        for name, asked, counted in counts
    ]


def plant_images(folder: Path) -> None:
    """The first image of a prompt shows what it asks for, the second one object more."""
    rng = np.random.default_rng(0)
    for position in range(2 * len(PROMPTS)):
        group = parse_caption(PROMPTS[position % len(PROMPTS)].prompt).first
        more = dataclasses.replace(group, count=group.count + position // len(PROMPTS))
        image = render_scene(Scene(first=more), rng).image
        (folder / f"{position:05d}.png").write_bytes(encode_png(image))


def test_scores_are_equations_9_and_10_of_every_group() -> None:
    buses = images(("bus", 2, 2), ("bus", 2, 5), ("bus", 1, 1), ("bus", 1, 1))
    scores = score_counts(buses + images(("cat", 2, 0), ("cat", 2, 1)))
    found = {
        (one.object, one.asked): (one.average_error.value, one.match_ratio.value) for one in scores
    }
    assert found == {
        (None, None): (1.0, 0.5),
        ("bus", None): (0.75, 0.75),
        ("cat", None): (1.5, 0.0),
        (None, 1): (0.0, 1.0),
        (None, 2): (1.5, 0.25),
        ("bus", 1): (0.0, 1.0),
        ("bus", 2): (1.5, 0.5),
        ("cat", 2): (1.5, 0.0),
    }
    assert all(one.average_error.low <= one.average_error.value for one in scores)
    assert scores[0].match_ratio.num_samples == 6


def test_known_images_give_known_counts_in_row_table_and_figure(
    counting: ObjectCountConfig, tmp_path: Path
) -> None:
    count_objects_of_runs(counting)
    folder = tmp_path / "counts" / "run"
    plant_images(folder / "step_00000007")
    (row,) = count_objects_of_runs(counting).values()  # the images are there, so none is drawn
    assert [(one.object, one.asked) for one in row.images[:15]] == [
        (one.object, one.count) for one in PROMPTS
    ]
    assert [one.counted - one.asked for one in row.images] == [0] * 15 + [1] * 15
    assert {one.average_error.value for one in row.scores} == {0.5}
    assert {one.match_ratio.value for one in row.scores} == {0.5}
    assert read_object_count(str(folder / "step_00000007.json")) == row

    assert row.step == 7
    assert row.backbone["num_image_blocks"] == 1
    assert row.protocol.sampling["num_steps"] == 2
    assert "batch_size" not in row.protocol.sampling
    lines = (tmp_path / "counts" / "object_count.csv").read_text().splitlines()
    assert len(lines) == 1 + 1 + 3 + 5 + 15
    assert (tmp_path / "counts" / "object_count.png").read_bytes().startswith(b"\x89PNG")


def test_processes_share_the_drawing_and_the_last_one_counts(
    counting: ObjectCountConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert count_objects_of_runs(counting) == {}
    folder = tmp_path / "counts" / "run" / "step_00000007"
    assert sum(1 for _ in folder.glob("*.png")) == 15
    assert not folder.with_suffix(".json").exists()
    monkeypatch.setenv("RANK", "1")
    (shared,) = count_objects_of_runs(counting).values()
    assert len(shared.images) == 30


def test_rows_lie_in_the_run_and_the_figure_beside_the_runs(
    counting: ObjectCountConfig, run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = f"{run}/weights/step_00000007"
    count_objects_of_runs(dataclasses.replace(counting, output=None, runs=[weights]))
    row = read_object_count(f"{run}/evaluation/object_count/step_00000007.json")
    assert row.weights == weights
    assert (tmp_path / "runs" / "object_count" / "object_count.png").exists()


def test_objects_that_cannot_be_counted_are_refused_before_anything_is_drawn(
    counting: ObjectCountConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match='detector scenes knows no "bus"'):
        count_objects_of_runs(dataclasses.replace(counting, prompts="paper"))
    assert not (tmp_path / "counts").exists()


def test_images_of_other_prompts_are_not_overwritten(
    counting: ObjectCountConfig, tmp_path: Path
) -> None:
    count_objects_of_runs(counting)
    (tmp_path / "mine.csv").write_text("prompt,object,count\none red circle,circle,1\n")
    other = dataclasses.replace(counting, prompts=str(tmp_path / "mine.csv"))
    with pytest.raises(UserError, match="samples of another prompts_sha256"):
        count_objects_of_runs(other)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: {}, []),
        (lambda row: {"num_images": 3}, ["num_images"]),
        (lambda row: {"sampling": row.sampling | {"seed": 5}}, ["seed"]),
        (lambda row: {"rule": dataclasses.replace(row.rule, threshold=0.1)}, ["threshold"]),
    ],
)
def test_protocols_differ_in_what_they_say(
    change: Callable[..., dict[str, object]], named: list[str]
) -> None:
    protocol = made_row().protocol
    assert differences(protocol, dataclasses.replace(protocol, **change(protocol))) == named


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    url = str(tmp_path / "row.json")
    write_object_count(url, made_row())
    assert read_object_count(url) == made_row()
    Path(url).write_text('{"weights": "x", "protocol": {}}')
    with pytest.raises(UserError, match=r"row\.json: not a row of object counts"):
        read_object_count(url)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_images": 1}, "num_images 1"),
        ({"threshold": 1.0}, "threshold 1.0"),
        ({"threshold": 0.5}, "exact analysis has no scores"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, float], named: str, counting: ObjectCountConfig
) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(counting, **changes)
