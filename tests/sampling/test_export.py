"""The model card of `ifvit export`, and the order and place in which it writes its files."""

import ast
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from made_text_encoders import KINDS, make_text_encoder
from untrained import save_untrained

from ifvit import storage
from ifvit.cli import main
from ifvit.conditions import PaddedContext, is_visible, tokens_of
from ifvit.diffusion.config import SolverConfig
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.errors import UserError
from ifvit.models import pretrained
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.config import TextOptions
from ifvit.models.presets import CLASS_PRESETS
from ifvit.models.weights import (
    WeightsInfo,
    build_backbone,
    find_weights,
    read_stored_weights,
    save_weights,
)
from ifvit.rng import Stream, normal
from ifvit.sampling.config import ExportConfig
from ifvit.sampling.export import export
from ifvit.sampling.load import load_conditions, load_model, schedule_of
from ifvit.sampling.pipeline import FusionPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with its recipe."""
    run = tmp_path_factory.mktemp("run")
    save_untrained(run / "weights/step_00000003/ema")
    (run / "config.yaml").write_text("run: here\nshards: gone/shards\nseed: 17\n")
    return run


def read_card(run: Path, folder: Path, evaluated: str) -> str:
    """Export after an evaluation of the weights with hash `evaluated`."""
    estimate = {"value": 0.25, "standard_error": 0.0125, "num_samples": 64}
    protocol = {"sampling": {"num_steps": 50}}
    row = {"weights_sha256": evaluated, "protocol": protocol, "clip_score": estimate}
    url = str(run / "evaluation/scenes/w2/step_00000003.json")
    storage.write_sealed(url, row)
    export(ExportConfig(weights=str(run), output=str(folder)))
    return (folder / "README.md").read_text()


def test_the_card_describes_weights_map_and_recipe(run: Path, tmp_path: Path) -> None:
    card = read_card(run, tmp_path, evaluated="other weights")
    assert "| weights | raw |" in card
    assert "| prediction | epsilon |" in card
    assert "seed: 17" in card
    assert "| fusion | image 3\\*cross_attention image |" in card
    assert "have not been evaluated" in card
    # The exported autoencoder has the scaling factor of the training, not Stable Diffusion's.
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == 0.5


def test_a_flow_is_exported_with_its_prediction_and_shift(tmp_path: Path) -> None:
    weights = save_untrained(tmp_path / "weights", prediction="flow", shift=3.0)
    export(ExportConfig(weights=weights, output=str(tmp_path / "out")))
    card = (tmp_path / "out/README.md").read_text()
    assert "| prediction | flow |" in card
    assert "| shift | 3.0 |" in card
    stored = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (stored["prediction_type"], stored["flow_shift"]) == ("flow_prediction", 3.0)
    assert FusionPipeline.from_pretrained(tmp_path / "out").config["prediction"] == "flow"


def test_the_card_shows_metrics_of_the_exported_weights(run: Path, tmp_path: Path) -> None:
    digest = read_stored_weights(find_weights(str(run))).tensors_sha256
    card = read_card(run, tmp_path, evaluated=digest)
    assert "| clip_score | 0.2500 ± 0.0125 |" in card
    assert "| num_steps | 50 |" in card
    assert digest in card


HOSTILE = "x')\n```\n__import__('os').system('touch hacked')\n| [a](http://b) <img src=c> \x1b[2J"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose class names, recipe and evaluations hold Markdown, HTML and code."""
    folder = tmp_path / "run/weights/step_00000003/ema"
    config = dataclasses.replace(CLASS_PRESETS["class_tiny"], num_classes=2, width=32, num_heads=2)
    info = WeightsInfo(
        step=3,
        ema_decay=None,
        scaling_factor=0.5,
        vae=load_autoencoder("scenes/vae").identity,
        text_encoder=None,
        classes=(HOSTILE, "b"),
        recipe_sha256="0" * 64,
    )
    save_weights(str(folder), build_backbone(config), info)
    recipe = {"shards": HOSTILE, "note": "````\n# Heading"}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(recipe, default_style="|"))
    estimate = {"value": 0.25, "standard_error": 0.0125, "num_samples": 64}
    digest = read_stored_weights(str(folder)).tensors_sha256
    row = {
        "weights_sha256": digest,
        "protocol": {"name": HOSTILE, "sampling": {HOSTILE: 1}},
        HOSTILE: estimate,
    }
    url = str(tmp_path / "run/evaluation/scenes/w2/step_00000003.json")
    storage.write_sealed(url, row)
    return tmp_path / "run"


def test_text_of_files_stays_text_in_the_card(hostile: Path, tmp_path: Path) -> None:
    export(ExportConfig(weights=str(hostile), output=str(tmp_path / "out")))
    card = (tmp_path / "out/README.md").read_text()
    assert "\x1b" not in card
    block = re.compile(r"^(`{3,})(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
    (_, python, code), (_, yaml_, _) = block.findall(card)
    assert (python, yaml_) == ("python", "yaml")
    assert ast.unparse(ast.parse(code)).count("\n") == 2  # the import and two statements
    prose = block.sub("", card)
    assert "<img" not in prose
    assert "\n# Heading" not in prose
    assert not re.search(r"(?<!\\)[\[`]", prose.partition("---\n#")[2])
    assert {line.count(" | ") for line in prose.splitlines() if line.startswith("| ")} <= {1, 2}


@pytest.mark.parametrize("num_bytes", [0, 4096])
def test_a_full_temporary_folder_is_one_line(
    run: Path,
    num_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, unlimited[1]))
    try:
        with pytest.raises(SystemExit, match="2"):
            main(["export", "--weights", str(run), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: .*(No usable temporary directory|set TMPDIR to a folder)", error)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("keep")
    output = ["--weights", str(run), "--output", str(tmp_path / "out")]
    for verb in (["export"], ["generate", "--prompt", "x", "--num_steps", "2"]):
        with pytest.raises(SystemExit, match="2"):
            main([*verb, *output])
        assert re.match(rf"error: .*{tmp_path}/out", capsys.readouterr().err.splitlines()[-1])
    assert (tmp_path / "out").read_text() == "keep"


def test_the_index_is_written_last(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "upload", lambda path, url: written.append(url))
    export(ExportConfig(weights=str(run), output="s3://bucket/pipeline"))
    assert written[-1] == "s3://bucket/pipeline/model_index.json"
    assert "s3://bucket/pipeline/backbone/config.json" in written


def test_the_hub_gets_the_whole_folder_or_its_refusal_is_a_user_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, list[str]] = {}

    class Hub:
        def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
            if "/" not in repo_id:
                raise HFValidationError("no such name\nand more")
            uploaded[repo_id] = []

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    export(ExportConfig(weights=str(run), output=str(tmp_path), hub="team/model"))
    assert uploaded == {"team/model": sorted(path.name for path in tmp_path.iterdir())}
    with pytest.raises(UserError, match=r"model: the upload .* failed \(.*no such name\)"):
        pretrained.upload_pretrained(tmp_path, "model")


def test_a_fresh_process_with_diffusers_encodes_prompts_as_ifvit_does(tmp_path: Path) -> None:
    solver, expected = SolverConfig(num_steps=2, guidance_scale=3.0), {}
    for kind in KINDS:
        folder = make_text_encoder(kind, tmp_path / "encoders" / kind)
        options = TextOptions(state="penultimate", template="a photo: {}!", max_length=40)
        weights = save_untrained(tmp_path / "weights" / kind, clip=folder, text=options)
        export(ExportConfig(weights=weights, output=str(tmp_path / kind)))
        model = load_model(weights, "cpu")
        conditions = load_conditions(model.info, "cpu")
        batch = ConditionBatch(
            positions=torch.arange(2), condition=conditions.encode(["two red circles", "a dog"])
        )
        null = model.backbone.encode_condition(conditions.null)
        latents = sample_latents(model.backbone, schedule_of(model.info), batch, null, solver)
        given = {"prompt_embeds": tokens_of(batch.condition)}
        if isinstance(batch.condition, PaddedContext):
            mask = is_visible(batch.condition.lengths, len(given["prompt_embeds"][0]))
            given["prompt_attention_mask"] = mask.long()
        torch.save(given, tmp_path / kind / "given.pt")
        expected[kind] = latents
    noise = normal(0, 0, torch.arange(2), Stream.SAMPLING, (4, 8, 8))
    torch.save({"latents": noise, "output_type": "latent"}, tmp_path / "noise.pt")
    program = (
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "options = torch.load('noise.pt') | {'guidance_scale': 3.0, 'num_inference_steps': 2}\n"
        "for name in sys.argv[1:]:\n"
        "    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)\n"
        "    prompts = pipe(['two red circles', 'a dog'], **options).images\n"
        "    given = pipe(**torch.load(f'{name}/given.pt'), **options).images\n"
        "    torch.save((prompts, given), f'{name}/latents.pt')\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, *KINDS],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    for kind, latents in expected.items():
        for found in torch.load(tmp_path / kind / "latents.pt"):
            torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)
        own = FusionPipeline.from_pretrained(tmp_path / kind)
        settings = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "latent"}
        found = own(["two red circles", "a dog"], latents=noise, **settings).images
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)
