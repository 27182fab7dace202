"""The verb `generate` with the shipped encoders and untrained backbones."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from made_backbone import SMALL_CLASSES, SMALL_UNET
from untrained import save_untrained

from ifvit.config import read_config
from ifvit.diffusion.config import Precision, Prediction
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.images import decode_png
from ifvit.models.config import BackboneConfig
from ifvit.models.weights import build_backbone, load_weights, save_weights
from ifvit.sampling.config import DateConfig, ExportConfig, GenerateConfig, SamplingConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate, read_prompt_file
from ifvit.sampling.load import load_conditions
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.samples import read_settings

CAPTIONS = "two red circles\na blue square\na green triangle\n"


def build_config(weights: str, folder: Path, **changes: object) -> GenerateConfig:
    """Two steps for three captions in a file, images in FOLDER/out."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text(CAPTIONS)
    given = {
        "weights": weights,
        "prompts": str(folder / "prompts.txt"),
        "output": str(folder / "out"),
        "num_steps": 2,
        "device": "cpu",
    }
    return GenerateConfig(**{**given, **changes})


def read_rows(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "out/samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_picture(one: bytes, other: bytes) -> None:
    """Allow one unit per pixel: another batch size may round a value differently."""
    assert abs(decode_png(one).astype(int) - decode_png(other)).max() <= 1


def test_three_lines_of_prompts_are_three_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    prompts = ["a red\u2028circle", "two\x85squares", "a\x0cstar"]
    path.write_bytes("\r\n".join(prompts).encode("utf-8-sig"))
    assert read_prompt_file(str(path)) == prompts


def test_prompts_become_files_rows_and_a_grid(weights: str, tmp_path: Path) -> None:
    config = build_config(weights, tmp_path, num_images=2)
    (tmp_path / "prompts.txt").write_text("\ufefftwo red circles\r\n\r\na blue square\n")
    files = generate(config)
    rows = read_rows(tmp_path)
    assert [row["prompt"] for row in rows] == ["two red circles", "a blue square"] * 2
    assert [f"{tmp_path}/out/{row['file']}" for row in rows] == files
    settings = read_settings(config.output)
    assert settings["num_steps"] == 2
    assert len(settings["weights_sha256"]) == 64
    assert decode_png(Path(files[0]).read_bytes()).shape == (64, 64, 3)
    assert decode_png((tmp_path / "out/grid.png").read_bytes()).shape == (130, 130, 3)

    once = dataclasses.replace(config, num_images=1, output=str(tmp_path / "once"), batch_size=1)
    for first, again in zip(files, generate(once), strict=False):
        assert_same_picture(Path(first).read_bytes(), Path(again).read_bytes())


def test_existing_images_are_kept_and_missing_ones_generated(weights: str, tmp_path: Path) -> None:
    urls = [Path(url) for url in generate(build_config(weights, tmp_path))]
    urls[0].write_bytes(urls[2].read_bytes())
    before = urls[1].read_bytes()
    urls[1].unlink()
    more = generate(build_config(weights, tmp_path, num_images=2))
    assert urls[0].read_bytes() == urls[2].read_bytes()
    for broken in (before[:-30], b""):
        urls[1].write_bytes(broken)
        generate(build_config(weights, tmp_path, num_images=2))
        assert_same_picture(urls[1].read_bytes(), before)
    assert_same_picture(urls[1].read_bytes(), before)
    assert len(read_rows(tmp_path)) == len(more) == 6


def test_each_process_generates_its_partition_and_the_last_one_lists_all(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(weights, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("1", "0"):
        assert not (tmp_path / "out/samples.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        generate(config)
        found.append(sorted(path.name for path in (tmp_path / "out").glob("0*.png")))
    assert found == [["00001.png"], ["00000.png", "00001.png", "00002.png"]]
    assert len(read_rows(tmp_path)) == 3


def test_each_process_of_a_node_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "6", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == "cuda:1"


def test_images_of_other_settings_or_prompts_are_not_mixed(weights: str, tmp_path: Path) -> None:
    generate(build_config(weights, tmp_path))
    with pytest.raises(UserError, match="holds samples of another seed"):
        generate(build_config(weights, tmp_path, seed=1))
    config = build_config(weights, tmp_path)
    (tmp_path / "prompts.txt").write_text(CAPTIONS.replace("green", "red"))
    with pytest.raises(UserError, match="holds samples of another prompts_sha256"):
        generate(config)
    # Neither the batch size nor the settings of an unused method change an image.
    generate(build_config(weights, tmp_path, batch_size=1, date=DateConfig(radius=9.0)))


@pytest.mark.parametrize(
    ("prediction", "solver"), [("flow", "heun"), ("flow", "dpm_solver_pp"), ("v", "unipc")]
)
def test_weights_of_every_prediction_generate_with_their_solvers(
    prediction: Prediction, solver: str, tmp_path: Path
) -> None:
    weights = save_untrained(tmp_path / "weights", prediction=prediction, shift=2.0)
    urls = generate(build_config(weights, tmp_path, solver=solver, num_steps=3))
    before = [Path(url).read_bytes() for url in urls]
    # The shift of the training is the default of flows.
    same = build_config(weights, tmp_path / "same", solver=solver, num_steps=3, shift=2.0)
    if prediction == "v":
        with pytest.raises(UserError, match="spaces the steps of flows"):
            generate(same)
    else:
        assert [Path(url).read_bytes() for url in generate(same)] == before
        assert read_settings(same.output)["shift"] == 2.0
    wrong = build_config(
        weights, tmp_path / "wrong", solver="ddim" if prediction == "flow" else "heun"
    )
    with pytest.raises(UserError, match=f"does not take {prediction} predictions; use dpm"):
        generate(wrong)
    assert not Path(wrong.output).exists()


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_precision_changes_images_little_and_is_stored(
    precision: Precision, weights: str, tmp_path: Path
) -> None:
    full = generate(build_config(weights, tmp_path / "full"))
    config = build_config(weights, tmp_path, precision=precision)
    for one, other in zip(full, generate(config), strict=True):
        pictures = [decode_png(Path(url).read_bytes()).astype(int) for url in (one, other)]
        assert abs(pictures[0] - pictures[1]).mean() < 2
    assert read_settings(config.output)["precision"] == precision
    for precise in (build_config(weights, tmp_path), dataclasses.replace(config, precision="bf16")):
        if precise.precision != precision:
            with pytest.raises(UserError, match="holds samples of another precision"):
                generate(precise)


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("plain", set()),
        ("date", {"date"}),
        ("regulate", {"regulation"}),
        ("both", {"date", "regulation"}),
    ],
)
def test_stored_settings_are_those_that_decide_an_image(method: str, used: set[str]) -> None:
    config = SamplingConfig(
        seed=3, batch_size=7, method=method, date=DateConfig(evaluations=(0, 4))
    )
    assert config.settings.keys() & {"date", "regulation"} == used
    assert config.settings["seed"] == 3
    assert "batch_size" not in config.settings
    assert json.loads(json.dumps(config.settings)) == config.settings
    assert GenerateConfig(**vars(config), weights="run", prompt="x").settings == config.settings
    # Images of earlier versions have neither, and are continued.
    assert not config.settings.keys() & {"shift", "precision"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "prompts": "y"}, "prompt"),
        ({"prompt": "x", "num_images": 0}, "num_images is 0"),
        ({"prompt": "x", "batch_size": 0}, "batch_size is 0"),
        ({"prompt": "x", "method": "date", "precision": "bf16"}, "precision bf16 .* fp32 or tf32"),
        ({"prompt": "x", "method": "both", "precision": "fp16"}, "precision fp16 .* fp32 or tf32"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GenerateConfig(weights="run", **wrong)


def test_a_file_without_prompts_is_a_user_error(weights: str, tmp_path: Path) -> None:
    config = build_config(weights, tmp_path)
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no prompts"):
        generate(config)


# Backbones trained on classes.

NAMES = ("bird", "cat", "dog")
TOKENS = dataclasses.replace(SMALL_CLASSES, num_classes=3, init_std=0.2)
UNET = dataclasses.replace(SMALL_UNET, num_classes=3)


def save(folder: Path, captioned: str, backbone: BackboneConfig) -> str:
    """Save an untrained backbone with the encoders of the weights `captioned`."""
    _, info = load_weights(captioned)
    if backbone.num_classes:
        info = dataclasses.replace(info, text_encoder=None, classes=NAMES)
    torch.manual_seed(0)
    save_weights(str(folder), build_backbone(backbone), info)
    return str(folder)


@pytest.fixture(scope="module", params=[TOKENS, UNET], ids=lambda config: config.architecture)
def classes(
    request: pytest.FixtureRequest, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return save(tmp_path_factory.mktemp("classes"), weights, request.param)


def read_flags(weights: str, folder: Path, *words: str) -> GenerateConfig:
    given = ["--weights", weights, "--output", str(folder / "out"), "--num_steps", "2"]
    return read_config(GenerateConfig, [*given, *words], prog="ifvit generate")


def test_the_number_after_the_last_class_means_no_class(classes: str) -> None:
    conditions = load_conditions(load_weights(classes)[1], "cpu")
    assert conditions.null.item() == len(NAMES)
    assert conditions.encode(["dog", "0"]).tolist() == [2, 0]


def test_classes_are_given_by_name_or_number_as_flags_or_in_a_file(
    classes: str, tmp_path: Path
) -> None:
    urls = generate(read_flags(classes, tmp_path, "--class", "dog", "0", "--class", "bird"))
    assert [row["prompt"] for row in read_rows(tmp_path)] == ["dog", "0", "bird"]
    (tmp_path / "classes.txt").write_text("2\nbird\n0\n")
    file = str(tmp_path / "classes.txt")
    again = generate(read_flags(classes, tmp_path / "again", "--prompts", file))
    for one, other in zip(urls, again, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class", "catt"], "class catt: .* such as cat, or a number below 3"),
        (["--class", "3"], "class 3: .* such as bird, cat, dog"),
        (["--prompt", "a cat"], "trained on classes; give --class, not --prompt, .* --class bird"),
        (["--class", "cat", "--method", "date"], "need weights trained on captions"),
        (["--class", "cat", "--method", "regulate"], "need weights trained on captions"),
    ],
)
def test_captions_and_methods_are_refused_for_classes(
    classes: str, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(read_flags(classes, tmp_path, *words))
    assert not (tmp_path / "out").exists()


def test_a_huge_prompt_is_refused_before_it_is_tokenised(weights: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n" + "circle " * 10**6)
    with pytest.raises(UserError, match="prompt 2 has 6999999 characters; give at most 10000"):
        generate(read_flags(weights, tmp_path, "--prompts", str(tmp_path / "prompts.txt")))


def test_classes_are_refused_for_captions(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained on captions; give --prompt"):
        generate(read_flags(weights, tmp_path, "--class", "cat"))


def test_date_works_without_attention_to_text_and_regulation_is_refused(
    weights: str, tmp_path: Path
) -> None:
    adaln = dataclasses.replace(load_weights(weights)[0].config, fusion="image 2*adaln")
    other = save(tmp_path / "weights", weights, adaln)
    words = ["--prompt", "a red circle", "--method"]
    assert generate(read_flags(other, tmp_path, *words, "date"))
    with pytest.raises(UserError, match="the image tokens of this backbone attend to no text"):
        generate(read_flags(other, tmp_path / "again", *words, "regulate"))


MIXED = "image concat cross_attention separate_cross_attention dual_stream adaln"


@pytest.mark.parametrize("condition", ["captions", "classes"])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "num_registers": 2, "mlp": "swiglu"}])
def test_an_exported_map_of_all_mechanisms_predicts_the_same_noise(
    condition: str, options: dict[str, object], weights: str, tmp_path: Path
) -> None:
    config = TOKENS if condition == "classes" else load_weights(weights)[0].config
    config = dataclasses.replace(config, fusion=MIXED, modulation="shared", **options)
    url = save(tmp_path / "weights", weights, config)
    export(ExportConfig(weights=url, output=str(tmp_path / "pipeline")))
    found = FusionPipeline.from_pretrained(tmp_path / "pipeline").backbone
    expected, _ = load_weights(url)
    assert found.config == config
    shape = config.context_shape
    given = torch.tensor([2, 0]) if shape is None else torch.randn(2, *shape)
    x_t, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(found(x_t, timesteps, given), expected(x_t, timesteps, given))
    card = (tmp_path / "pipeline/README.md").read_text()
    assert f"| fusion | {MIXED} |" in card


def test_an_exported_pipeline_takes_class_names_and_numbers(classes: str, tmp_path: Path) -> None:
    export(ExportConfig(weights=classes, output=str(tmp_path)))
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
    assert "pipeline('bird', guidance_scale=2.0)" in card
