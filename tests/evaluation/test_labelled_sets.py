"""A labelled set is evaluated by the names of its classes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.models.config import CLASS_PRESETS
from ifvit.models.weights import WeightsInfo, build_backbone, save_weights
from ifvit.scenes.image_sets import class_scenes, render_class_set
from ifvit.shards import Manifest, read_manifest

NUM_IMAGES = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scenes in classes, and their shards."""
    folder = tmp_path_factory.mktemp("classes")
    render_class_set(folder, "val2014", NUM_IMAGES)
    images, shards = str(folder / "val2014"), str(folder / "shards")
    encode(
        EncodeConfig(
            source="folder",
            images=images,
            output=shards,
            vae="scenes/vae",
            image_size=64,
            device="cpu",
            num_workers=1,
        )
    )
    return folder


def save_run(folder: Path, manifest: Manifest, classes: tuple[str, ...]) -> str:
    info = WeightsInfo(
        step=7,
        ema_decay=0.99,
        scaling_factor=manifest.scaling_factor,
        vae=manifest.vae,
        text_encoder=None,
        classes=classes,
        recipe_sha256="0" * 64,
    )
    shape = dataclasses.replace(CLASS_PRESETS["unet_tiny"], num_classes=len(classes))
    torch.manual_seed(0)
    backbone = build_backbone(shape)
    save_weights(str(folder / "run/weights/step_00000007/ema"), backbone, info)
    return str(folder / "run")


def test_a_row_scores_the_classes_of_the_held_out_images(
    folder: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    shards = str(folder / "shards")
    manifest = read_manifest(shards)
    assert manifest.classes == tuple(sorted(class_scenes()))
    run = save_run(tmp_path, manifest, manifest.classes)
    given = dataclasses.replace(config, weights=run, shards=shards, images=str(folder / "val2014"))
    (row,) = evaluate(given)
    assert row.frechet_distance is not None
    assert row.kind_accuracy is not None
    assert row.relation_accuracy is None
    (listed,) = Path(run).rglob("samples.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    for number, shown in enumerate(rows):
        assert shown["prompt"] == manifest.classes[number].replace("_", " ")
        assert shown["image_id"].startswith(f"{manifest.classes[number]}/")
        assert shown["real"] is not None


def test_classes_and_captions_do_not_mix(
    folder: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    shards = str(folder / "shards")
    manifest = read_manifest(shards)
    with pytest.raises(UserError, match=r"holds 75 classes, such as .*, but the weights draw capt"):
        evaluate(dataclasses.replace(config, shards=shards, images=None))
    run = save_run(tmp_path, manifest, ("cat", "dog"))
    with pytest.raises(UserError, match="but the weights draw 2 classes, such as cat"):
        evaluate(dataclasses.replace(config, weights=run, shards=shards, images=None))
    with pytest.raises(UserError, match="holds captions, but the weights draw 2 classes"):
        evaluate(dataclasses.replace(config, weights=run, images=None))
