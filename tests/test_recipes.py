"""Every shipped recipe is one that its verb accepts."""

import re
from pathlib import Path

import pytest

from data_pipeline.config import EncodeConfig
from ifvit.config import dump_config, read_config
from ifvit.errors import UserError
from ifvit.models.config import FusionUViTConfig
from ifvit.models.presets import PRESETS
from ifvit.training.config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [
    *((EncodeConfig, path) for path in sorted(CONFIGS.glob("data/*.yaml"))),
    *((TrainConfig, path) for path in sorted(CONFIGS.glob("train/*.yaml"))),
]


@pytest.mark.parametrize(("cls", "path"), RECIPES, ids=lambda value: getattr(value, "stem", ""))
def test_a_recipe_is_accepted_and_survives_a_round_trip(
    cls: type, path: Path, tmp_path: Path
) -> None:
    config = read_config(cls, ["--config", str(path)], prog="test")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert read_config(cls, ["--config", str(copy)], prog="test") == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_file_is_its_preset(name: str) -> None:
    path = CONFIGS / "model" / f"{name}.yaml"
    assert read_config(FusionUViTConfig, ["--config", str(path)], prog="test") == PRESETS[name]


def test_a_recipe_takes_its_backbone_from_a_model_file() -> None:
    recipe, model = CONFIGS / "train" / "coco256_early.yaml", CONFIGS / "model" / "large.yaml"
    words = ["--config", str(recipe), "--backbone", str(model), "--optim.learning_rate", "1e-4"]
    config = read_config(TrainConfig, words, prog="test")
    assert config.backbone == PRESETS["large"]
    assert config.optim.learning_rate == 1e-4
    assert config.optim.betas == (0.9, 0.9)


BROKEN = {
    "unknown key": ("max_stepz: 3", "max_stepz"),
    "unknown nested key": ("optim: {learning_rat: 1}", "learning_rat"),
    "wrong type": ("max_steps: many", "max_steps"),
    "wrong choice": ("engine: {precision: fp64}", "precision"),
    "refused value": ("caption_dropout: 2.0", "caption_dropout"),
    "refused nested value": ("optim: {warmup_steps: -1}", "warmup_steps"),
    "broken YAML": ("optim: [", "parsing"),
    "missing key": ("seed: 1", "run"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_in_a_recipe_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    text, named = BROKEN[case]
    path = tmp_path / "recipe.yaml"
    whole = (CONFIGS / "train" / "coco256_early.yaml").read_text()
    path.write_text(text if case == "missing key" else f"{whole}\n{text}\n")
    with pytest.raises(UserError, match=named) as error:
        read_config(TrainConfig, ["--config", str(path)], prog="ifvit train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "page", [*CONFIGS.parent.glob("*.md"), *CONFIGS.parent.glob("docs/*.md")], ids=lambda p: p.name
)
def test_a_recipe_that_a_page_names_is_shipped(page: Path) -> None:
    for name in re.findall(r"configs/[\w/]+\.yaml", page.read_text()):
        assert (CONFIGS.parent / name).is_file(), name
