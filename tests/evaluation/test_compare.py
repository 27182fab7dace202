"""Every alignment method on real shards and encoders; only the backbone is untrained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from held_out_scenes import HeldOut

from ifvit.errors import UserError
from ifvit.evaluation.config import CompareConfig, ProtocolConfig
from ifvit.evaluation.evaluate import compare_methods
from ifvit.images import decode_png
from ifvit.sampling.config import SamplingConfig


@pytest.fixture
def comparison(held_out: HeldOut, run: str, tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        runs=[run],
        output=str(tmp_path / "comparison"),
        shards=held_out.shards,
        protocol=ProtocolConfig(
            name="test",
            num_samples=16,
            sampling=SamplingConfig(num_steps=2, batch_size=16),
            clip="scenes/clip",
            paper_prefix="",
            scenes=True,
        ),
        device="cpu",
    )


def test_all_methods_are_measured_on_the_same_captions_and_noise(
    comparison: CompareConfig, tmp_path: Path
) -> None:
    compared = compare_methods(comparison)
    assert [one.method for one in compared] == ["plain", "plain_4", "date", "regulate", "both"]
    assert [one.evaluations for one in compared] == [2, 4, 4, 2, 4]
    assert compared[0].clip_gain.value == compared[0].change.value == 0
    assert len({one.row.protocol.prompts_sha256 for one in compared}) == 1
    assert all(one.row.seconds_per_image for one in compared)
    assert compared[2].clip_gain.value > 0
    for one in compared[1:]:
        assert one.change.value > 0
        assert one.clip_gain.value == pytest.approx(
            one.row.clip_score.value - compared[0].row.clip_score.value, abs=1e-5
        )

    folder = tmp_path / "comparison"
    settings = json.loads((folder / "run/both/test/w2/step_00000007/settings.json").read_text())
    assert (settings["method"], settings["date"]["radius"]) == ("both", 0.5)
    assert (folder / "table.md").read_text().count("\n") == 2 + 5
    grid = decode_png((folder / "grid.png").read_bytes())
    assert grid.shape == (8 * 66 - 2, 5 * 66 - 2, 3)
    first = decode_png((folder / "run/date/test/w2/step_00000007/00000.png").read_bytes())
    np.testing.assert_array_equal(grid[:64, 2 * 66 : 2 * 66 + 64], first)

    again = compare_methods(comparison)
    assert [one.row for one in again] == [one.row for one in compared]


def test_runs_of_one_name_would_overwrite_each_other(comparison: CompareConfig) -> None:
    twice = dataclasses.replace(comparison, runs=["here/run", "there/run"])
    with pytest.raises(UserError, match="two of one name"):
        compare_methods(twice)
