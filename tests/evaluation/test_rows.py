"""Rows are found where they were written, and series are chosen by the stated rule."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_counts import made_row

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.metrics import estimate_mean
from ifvit.evaluation.object_count import read_object_counts
from ifvit.evaluation.rows import (
    MetricsRow,
    Protocol,
    differences,
    main_series,
    read_rows,
    row_url,
    samples_url,
)
from ifvit.sampling.config import SamplingConfig

SCORE = estimate_mean(np.array([0.2, 0.3]))


def build_row(name: str = "matched", scale: float = 2.0, step: int = 500) -> MetricsRow:
    protocol = Protocol(
        name=name,
        num_samples=2,
        prompts_sha256="b" * 64,
        caption_rule="first",
        score_caption="same",
        sampling=SamplingConfig(guidance_scale=scale).settings,
        image_size=64,
        resize="r",
        features="clip",
        features_sha256="c" * 64,
        paper_prefix="",
        inception=None,
        inception_sha256=None,
        num_reference_images=None,
        reference_sha256=None,
    )
    return MetricsRow(
        weights="run",
        weights_sha256="a" * 64,
        step=step,
        ema_decay=None,
        protocol=protocol,
        frechet_distance=None,
        clip_score=SCORE,
        clip_score_paper=SCORE,
        retrieval_at_16=None,
    )


def write(folder: Path, row: MetricsRow) -> str:
    url = row_url(str(folder), row.protocol.name, row.protocol.guidance_scale, row.step)
    storage.write_sealed(url, row)
    return url


def test_rows_are_read_in_order_and_other_files_are_ignored(tmp_path: Path) -> None:
    rows = [build_row(scale=10.0), build_row(scale=1.5, step=20), build_row(scale=1.5, step=7)]
    urls = [write(tmp_path, row) for row in rows]
    assert urls[1].endswith("matched/w1.5/step_00000020.json")
    assert urls[0].endswith("matched/w10/step_00000500.json")
    storage.write_bytes(f"{samples_url(urls[0])}/settings.json", b"{}")
    storage.write_bytes(str(tmp_path / "step_00000500.json"), b"{}")
    found = read_rows(str(tmp_path))
    assert list(found) == [urls[2], urls[1], urls[0]]
    assert list(found.values()) == [rows[2], rows[1], rows[0]]
    assert read_rows(str(tmp_path / "nowhere")) == {}


def test_metrics_and_object_counts_are_told_apart(tmp_path: Path) -> None:
    counts = [dataclasses.replace(made_row(), step=step) for step in (9, 5)]
    for row in counts:
        storage.write_sealed(row_url(str(tmp_path), "object_count", 4.0, row.step), row)
    write(tmp_path, build_row())
    assert list(read_rows(str(tmp_path)).values()) == [build_row()]
    assert read_object_counts(str(tmp_path)) == counts[::-1]


def test_a_file_that_is_not_a_row_is_named(tmp_path: Path) -> None:
    storage.write_bytes(row_url(str(tmp_path), "matched", 2.0, 5), b'{"value": 1}')
    with pytest.raises(UserError, match=r"w2/step_00000005\.json: damaged"):
        read_rows(str(tmp_path))


def test_a_row_in_the_place_of_another_is_named(tmp_path: Path) -> None:
    storage.write_sealed(row_url(str(tmp_path), "matched", 2.0, 7), build_row(step=500))
    with pytest.raises(UserError, match=r"step_00000007\.json: is the row of .*500\.json"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": -1}, "step"),
        ({"weights_sha256": "/etc/passwd"}, "weights_sha256"),
        ({"clip_score": None}, "clip_score"),
        ({"clip_score": {"value": math.nan}}, "clip_score"),
        ({"clip_score": vars(SCORE) | {"value": math.nan}}, "clip_score: value"),
        ({"clip_score": vars(SCORE) | {"low": 1e300}}, "clip_score: low"),
        ({"clip_score": vars(SCORE) | {"standard_error": -1.0}}, "clip_score: standard_error"),
        ({"clip_score": vars(SCORE) | {"num_samples": 10**30}}, "num_samples"),
        ({"protocol": []}, "protocol"),
        ({"protocol": {"name": "../x"}}, "protocol"),
        ({"protocol": {"sampling": {}}}, "sampling"),
        ({"protocol": {"sampling": {"guidance_scale": "x", "method": "plain"}}}, "guidance_scale"),
        ({"protocol": {"sampling": {"guidance_scale": 2.0, "method": "evil"}}}, "method"),
        ({"more": 1}, "more"),
    ],
)
def test_a_row_with_a_seal_but_impossible_values_is_one_line(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    stored = dataclasses.asdict(build_row())
    if isinstance(change.get("protocol"), dict):
        change = {"protocol": stored["protocol"] | change["protocol"]}
    url = row_url(str(tmp_path), "matched", 2.0, 500)
    storage.write_sealed(url, stored | change)
    for read in (partial(storage.read_sealed, MetricsRow), lambda url: read_rows(str(tmp_path))):
        with pytest.raises(UserError, match=rf"step_00000500\.json: .*{named}") as raised:
            read(url)
        assert str(raised.value).isprintable()


def test_a_row_of_counts_needs_two_images_of_each_object_and_count(tmp_path: Path) -> None:
    row = dataclasses.asdict(made_row())
    url = row_url(str(tmp_path), "object_count", 4.0, 5)
    for change in ({"scores": []}, {"images": []}, {"images": row["images"][1:]}, {"images": [3]}):
        storage.write_sealed(url, row | change)
        with pytest.raises(UserError, match=r"step_00000005\.json: .*(scores|images)"):
            read_object_counts(str(tmp_path))


def test_the_main_series_has_most_rows_then_the_first_name_and_scale() -> None:
    few, many = build_row("a"), [build_row("b", step=step) for step in (1, 2)]
    assert main_series([few, *many]) == many
    assert main_series([build_row("b"), few]) == [few]
    low, high = build_row("a", 1.5), build_row("a", 10.0)
    assert main_series([high, low]) == [low]
    assert main_series([]) == []


def test_protocols_differ_in_all_but_labels_and_say_so_in_words() -> None:
    one = build_row("a").protocol
    same = dataclasses.replace(one, name="b", features="/copies/clip", inception="here.pt")
    assert differences(one, same) == []
    sampling = SamplingConfig(solver="unipc", seed=7, method="regulate").settings
    other = dataclasses.replace(one, sampling=sampling, features_sha256="f" * 64)
    assert set(differences(one, other)) == {
        f"features hash {'c' * 12} against {'f' * 12}",
        "solver dpm_solver_pp against unipc",
        "method plain against regulate",
        "seed 0 against 7",
        f"regulation none against {sampling['regulation']}",
    }
