"""Backbones that draw classes: `generate`, guidance, methods and the exported pipeline."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from made_backbone import SMALL_TOKENS, SMALL_UNET
from untrained import save_untrained

from ifvit.config import read_config
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedNoisePredictor
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.models.config import BackboneConfig
from ifvit.models.weights import build_backbone, load_weights, save_weights
from ifvit.sampling.config import ExportConfig, GenerateConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate
from ifvit.sampling.load import load_conditions
from ifvit.sampling.pipeline import FusionPipeline

NAMES = ("bird", "cat", "dog")
TOKENS = dataclasses.replace(SMALL_TOKENS, num_classes=3, init_std=0.2)
UNET = dataclasses.replace(SMALL_UNET, num_classes=3)


def save(folder: Path, text: str, backbone: BackboneConfig) -> str:
    """Untrained weights beside the encoders of those in `text`."""
    _, info = load_weights(text)
    if backbone.num_classes:
        info = dataclasses.replace(info, text_encoder=None, classes=NAMES)
    torch.manual_seed(0)
    save_weights(str(folder), build_backbone(backbone), info)
    return str(folder)


def test_the_number_behind_the_last_class_stands_for_none(weights: str) -> None:
    conditions = load_conditions(load_weights(weights)[1], "cpu")
    assert conditions.null.item() == len(NAMES)
    assert conditions.encode(["dog", "0"]).tolist() == [2, 0]


def test_each_process_of_a_node_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "6", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == "cuda:1"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_untrained(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=[TOKENS, UNET], ids=lambda config: config.architecture)
def weights(
    request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return save(tmp_path_factory.mktemp("classes"), text, request.param)


def config(weights: str, folder: Path, *words: str) -> GenerateConfig:
    given = ["--weights", weights, "--output", str(folder / "out"), "--num_steps", "2"]
    return read_config(GenerateConfig, [*given, *words], prog="ifvit generate")


def test_classes_are_drawn_by_name_and_number(weights: str, tmp_path: Path) -> None:
    urls = generate(config(weights, tmp_path, "--class", "dog", "0", "--class", "bird"))
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["dog", "0", "bird"]
    listed = tmp_path / "classes.txt"
    listed.write_text("2\nbird\n0\n")
    again = generate(config(weights, tmp_path / "again", "--prompts", str(listed)))
    for one, other in zip(urls, again, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_guidance_steers_away_from_the_null_class(weights: str) -> None:
    backbone, _ = load_weights(weights)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        latents, timesteps, numbers = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), [0, 2]
        null = backbone.encode_condition(torch.tensor([3]))
        denoiser = GuidedNoisePredictor(backbone, torch.tensor(numbers), null, Guidance(scale=3.0))
        guided = denoiser(latents, timesteps)
        conditional = backbone(latents, timesteps, torch.tensor(numbers))
        unconditional = backbone(latents, timesteps, torch.tensor([3, 3]))
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--class", "catt"],
            "class catt: .* such as cat, or a number below 3",
        ),
        (["--class", "3"], "class 3: expected one of the 3 class names, such as bird, cat, dog"),
        (["--prompt", "a cat"], "trained on classes; give --class, not --prompt, .* --class bird"),
        (
            ["--class", "cat", "--method", "date"],
            "the weights generate 3 classes",
        ),
        (["--class", "cat", "--method", "regulate"], "the weights generate 3 classes"),
    ],
)
def test_what_classes_cannot_do_is_one_clear_error(
    weights: str, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(config(weights, tmp_path, *words))
    assert not (tmp_path / "out").exists()


def test_captions_have_no_classes(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained on captions; give --prompt"):
        generate(config(text, tmp_path, "--class", "cat"))


def test_date_works_and_regulation_is_refused_for_another_transformer_on_captions(
    text: str, tmp_path: Path
) -> None:
    shape = load_weights(text)[0].config
    length, width = shape.context_shape
    captions = dataclasses.replace(
        TOKENS, num_classes=None, context_length=length, context_width=width
    )
    weights = save(tmp_path / "weights", text, captions)
    assert generate(config(weights, tmp_path, "--prompt", "a red circle", "--method", "date"))
    words = ["--prompt", "a red circle", "--method", "regulate"]
    with pytest.raises(UserError, match=r"not those of a TokenTransformer"):
        generate(config(weights, tmp_path / "again", *words))


def test_an_exported_pipeline_draws_classes_by_name(weights: str, tmp_path: Path) -> None:
    export(ExportConfig(weights=weights, output=str(tmp_path)))
    pipeline = FusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "latents": torch.randn(2, 4, 8, 8),
        "guidance_scale": 3.0,
    }
    by_name = pipeline(["dog", "0"], **options).images
    numbers = {"prompt_embeds": torch.tensor([2, 0]), "negative_prompt_embeds": torch.tensor([3])}
    assert torch.equal(by_name, pipeline(**numbers, **options).images)
    card = (tmp_path / "README.md").read_text()
    assert "| classes | bird, cat, dog |" in card
    assert 'pipeline("bird", guidance_scale=2.0)' in card
    assert "| architecture |" in card
