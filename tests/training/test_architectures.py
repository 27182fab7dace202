"""Every architecture, on captions and on classes, from shards to drawn images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_backbone import SMALL_TOKENS, SMALL_UNET
from made_shards import make_samples, write_shards
from run_files import CONTEXT_SHAPE, losses

from ifvit.errors import UserError
from ifvit.models.config import BackboneConfig
from ifvit.models.weights import load_weights
from ifvit.shards import ShardError
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
LENGTH, WIDTH = CONTEXT_SHAPE
TOKENS = replace(SMALL_TOKENS, long_skip=True)


def on_captions(backbone: BackboneConfig) -> BackboneConfig:
    return replace(backbone, num_classes=None, context_length=LENGTH, context_width=WIDTH)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """21 samples of the classes cat and dog."""
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder, make_samples(21, labelled=True), (12, 9))
    return str(folder)


@pytest.mark.parametrize("backbone", [TOKENS, SMALL_UNET], ids=lambda config: config.architecture)
def test_a_resumed_run_on_classes_repeats_the_unbroken_one(
    recipe: Recipe, labelled: str, backbone: BackboneConfig
) -> None:
    whole = recipe("whole", shards=labelled, backbone=backbone, max_steps=4)
    train(whole)
    broken = recipe("broken", shards=labelled, backbone=backbone, max_steps=2)
    train(broken)
    train(replace(broken, max_steps=4))
    assert losses(replace(broken, max_steps=4)) == losses(whole)
    loaded, info = load_weights(whole.run)
    assert loaded.config == backbone
    assert (info.text_encoder, info.classes) == (None, ("cat", "dog"))


@pytest.mark.parametrize("backbone", [TOKENS, SMALL_UNET], ids=lambda config: config.architecture)
def test_captions_train_them_too(recipe: Recipe, backbone: BackboneConfig) -> None:
    config = recipe(
        backbone=on_captions(backbone),
        max_steps=2,
        engine=EngineConfig(backend="plain", activation_checkpointing=True),
    )
    train(config)
    loaded, info = load_weights(config.run)
    assert loaded.config == config.backbone
    assert info.text_encoder is not None


def test_classes_for_a_backbone_of_captions_are_one_clear_error(
    recipe: Recipe, labelled: str
) -> None:
    with pytest.raises(ShardError, match="holds class labels, not captions"):
        train(recipe(shards=labelled))
    with pytest.raises(ShardError, match="holds class labels, not captions"):
        train(recipe(shards=labelled, backbone=on_captions(TOKENS)))


def test_captions_for_a_backbone_of_classes_are_one_clear_error(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"holds captions, not classes; give backbone\.context_len"):
        train(recipe(backbone=TOKENS))


def test_another_number_of_classes_is_one_clear_error(recipe: Recipe, labelled: str) -> None:
    with pytest.raises(
        UserError, match=r"has 2 classes, the backbone 3; set backbone\.num_classes"
    ):
        train(recipe(shards=labelled, backbone=replace(TOKENS, num_classes=3)))


def test_a_run_from_before_architectures_goes_on(recipe: Recipe) -> None:
    config = recipe(max_steps=2)
    train(config)
    for path in (*Path(config.run).rglob("config.json"), *Path(config.run).rglob("manifest.json")):
        stored = json.loads(path.read_text())
        stored.get("backbone", stored).pop("architecture", None)
        path.write_text(json.dumps(stored))
    recipe_file = Path(config.run, "config.yaml")
    recipe_file.write_text(recipe_file.read_text().replace("  architecture: fusion_uvit\n", ""))
    assert train(replace(config, max_steps=3)).step == 3
    assert load_weights(config.run)[0].config == config.backbone
