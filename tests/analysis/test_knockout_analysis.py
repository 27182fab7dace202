"""`ifvit analyze knockout`: weights and held-out shards => a file, a figure and a table."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_scenes import encode_scenes
from made_backbone import SMALL_CLASSES, SMALL_UNET, loud_backbone, small_shape
from made_shards import CLASSES, make_samples, write_shards
from PIL import Image
from uvit_oracle import random_weights, uvit_layout

from ifvit.analysis.knockout import KnockedOut, KnockoutAnalysis, read_knockout
from ifvit.cli import main
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import BackboneConfig
from ifvit.models.weights import WeightsInfo, load_weights, save_weights
from ifvit.sampling.samples import read_samples
from ifvit.shards.format import read_manifest
from ifvit.shards.reader import ShardReader

NUM_SAMPLES = 6
FAST = ["--protocol.clip", "scenes/clip", "--protocol.sampling.num_steps", "2", "--device", "cpu"]
NO_IMAGES = ["--num_images", "0"]
CONTEXT = {"context_length": 16, "context_width": 64}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encode_scenes(tmp_path_factory.mktemp("scenes"), "val2014", NUM_SAMPLES, seed=3)


def save_run(folder: Path, shards: str, shape: BackboneConfig) -> str:
    manifest = read_manifest(shards)
    info = WeightsInfo(
        step=3,
        ema_decay=0.9,
        scaling_factor=manifest.scaling_factor,
        vae=manifest.vae,
        text_encoder=None if shape.num_classes else manifest.text and manifest.text.encoder,
        classes=CLASSES if shape.num_classes else (),
        recipe_sha256="0" * 64,
    )
    save_weights(str(folder / "weights/step_00000003/ema"), loud_backbone(shape), info)
    return str(folder)


def analyze(runs: list[str], shards: str, *flags: str) -> list[KnockoutAnalysis]:
    main(["analyze", "knockout", *runs, "--shards", shards, "--num_samples", "4", *FAST, *flags])
    return [found for run in runs if (found := read_knockout(run)) is not None]


def test_changes_are_those_of_the_held_out_loss_and_of_the_images(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = small_shape(fusion="image 2*cross_attention image concat", **CONTEXT)
    run = save_run(tmp_path / "run", shards, shape)
    (found,) = analyze([run], shards, "--num_images", "3", "--protocol.scenes", "true")
    printed = capsys.readouterr().out.splitlines()

    backbone, info = load_weights(run)
    conditions = DatasetConditions(ShardReader(shards))
    loss = HeldOutLoss(conditions, 4, info, "cpu")
    unchanged = loss.measure(backbone)
    assert found.held_out_loss.value == unchanged.mean()
    assert [row.window for row in found.rows[:4]] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert len(found.rows) == 2 * 10
    off, only = found.changes("off"), found.changes("only")
    changes = loss.measure(KnockedOut(backbone, conditions.null, {2, 4})) - unchanged
    assert only[1, 1].held_out_loss.value == changes.mean()
    paired = changes.mean(axis=1).std(ddof=1) / 2
    assert only[1, 1].held_out_loss.standard_error == pytest.approx(paired)
    assert [one.value for one in only[1, 1].by_timestep] == changes.mean(axis=0).tolist()
    assert off[3, 3].held_out_loss.value == only[1, 4].held_out_loss.value == 0  # no text there
    assert off[1, 2].held_out_loss == only[3, 4].held_out_loss
    assert found.predictions[1, 4] == unchanged.mean()

    folder = tmp_path / "run/analysis/knockout"
    samples = {path.name: read_samples(str(path)) for path in (folder / "step_00000003").iterdir()}
    assert sorted(samples) == ["off_1", "off_2", "off_4", "unchanged"]
    cosines = {name: [one.clip_score for one in rows] for name, rows in samples.items()}
    gain = np.subtract(cosines["off_2"], cosines["unchanged"])
    assert off[2, 2].clip_score is not None
    assert off[2, 2].clip_score.value == pytest.approx(gain.mean())
    assert off[2, 2].clip_score.standard_error == pytest.approx(gain.std(ddof=1) / 3**0.5)
    assert off[3, 3].clip_score is not None
    assert off[3, 3].clip_score.value == 0
    assert (off[1, 2].clip_score, only[1, 1].clip_score) == (None, None)
    assert found.scene_accuracy is not None

    rows = list(csv.DictReader((folder / "knockout.csv").open()))
    assert [row["text"] for row in rows] == ["off"] * 10 + ["only"] * 10
    assert float(rows[10]["held_out_loss"]) == only[1, 1].held_out_loss.value
    assert len(printed) == 2 + 4
    assert printed[3].split()[:3] == ["2", "cross_attention", "held_out_loss"]
    with Image.open(folder / "knockout.png") as figure:
        assert figure.width > figure.height


def test_runs_are_analysed_once_and_shown_together(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        save_run(tmp_path / name, shards, small_shape(fusion=fusion, **CONTEXT))
        for name, fusion in (("one", "image adaln image"), ("two", "2*separate_cross_attention"))
    ]
    output = str(tmp_path / "both")
    flags = [*NO_IMAGES, "--output", output]
    for windows, num_existing in (("blocks", 0), ("blocks", 2), ("all", 0)):
        analyze(runs, shards, *flags, "--windows", windows)
        assert capsys.readouterr().out.count("exists") == num_existing
    names = sorted(path.name for path in Path(output).iterdir())
    assert names == ["knockout.csv", "knockout.png", "one", "two"]
    assert read_knockout(runs[0]) is None
    save_run(tmp_path / "one", shards, small_shape(fusion="image concat image", **CONTEXT))
    analyze(runs, shards, *flags)
    assert capsys.readouterr().out.count("exists") == 1


def test_imported_weights_are_analysed_too(shards: str, tmp_path: Path) -> None:
    weights = random_weights(uvit_layout(2), width=64, patch=2, num_patches=16, context=(16, 64))
    path, run = str(tmp_path / "uvit.pth"), str(tmp_path / "run")
    torch.save({name: torch.tensor(value).float() for name, value in weights.items()}, path)
    encoders = ["--vae", "scenes/vae", "--text_encoder", "scenes/clip"]
    main(["import", path, run, *encoders])
    (found,) = analyze([run], shards, *NO_IMAGES, "--windows", "blocks")
    assert found.fusion == "3*concat"
    assert [row.window for row in found.rows] == 2 * [(0, 0), (1, 1), (2, 2)]
    assert all(row.held_out_loss.value != 0 for row in found.rows)


def test_a_network_may_be_trained_on_classes(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", make_samples(4, labelled=True), [4])
    run = save_run(tmp_path / "run", str(tmp_path / "shards"), SMALL_CLASSES)
    (found,) = analyze([run], str(tmp_path / "shards"), *NO_IMAGES)
    assert [row.window for row in found.rows[:3]] == [(0, 0), (0, 1), (0, 2)]
    assert found.rows[0].held_out_loss.value != 0


@pytest.mark.parametrize(
    ("shape", "flags", "named"),
    [
        (small_shape(fusion="2*image", num_text_blocks=0, **CONTEXT), [], "no fusion map with"),
        (SMALL_UNET, [], "no fusion map with text"),
        (
            small_shape(**CONTEXT),
            ["--num_samples", "7", *NO_IMAGES],
            "has 6 samples, but num_samples is 7",
        ),
        (small_shape(**CONTEXT), ["--num_images", "7"], "6 images, but num_images is 7; lower"),
        (small_shape(**CONTEXT), ["--num_images", "1"], "num_images is 1; it must be 0, or at"),
        (small_shape(**CONTEXT), ["--protocol.sampling.method", "date"], "method date"),
        (small_shape(**CONTEXT), ["--protocol", "object_count"], "counts objects"),
        (small_shape(), NO_IMAGES, "context"),
    ],
    ids=["no text", "U-Net", "samples", "images", "one image", "method", "objects", "other shape"],
)
def test_a_mistake_is_one_line(
    shape: BackboneConfig,
    flags: list[str],
    named: str,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save_run(tmp_path / "run", shards, shape)
    with pytest.raises(SystemExit) as end:
        analyze([run], shards, *flags)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert named in lines[-1]
