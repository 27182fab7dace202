"""Shipped recipes are accepted by their verbs, found by name, and mistakes in recipes are named."""

import dataclasses
import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from data_pipeline.config import EncodeConfig
from ifvit.config import FLAG_ONLY, dump_config, read_config
from ifvit.diffusion.config import ObjectiveConfig
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.models.config import FusionTransformerConfig, restore_config
from ifvit.models.cost import count_cost
from ifvit.models.presets import CLASS_PRESETS, PRESETS, SETTINGS, setting_of, with_setting
from ifvit.records import PositiveFloat, PositiveInt, parse_yaml, record
from ifvit.studies.config import StudyConfig
from ifvit.studies.recipes import arm_recipes, list_runs, with_length
from ifvit.training.config import OptimConfig, TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [
    *((EncodeConfig, path) for path in sorted(CONFIGS.glob("data/*.yaml"))),
    *((TrainConfig, path) for path in sorted(CONFIGS.glob("train/*.yaml"))),
    *((StudyConfig, path) for path in sorted(CONFIGS.glob("study/*.yaml"))),
]


@pytest.mark.parametrize(("cls", "path"), RECIPES, ids=lambda value: getattr(value, "stem", ""))
def test_a_recipe_is_accepted_and_survives_a_round_trip(
    cls: type, path: Path, tmp_path: Path
) -> None:
    config = read_config(cls, ["--config", str(path)], prog="test")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert read_config(cls, ["--config", str(copy)], prog="test") == config


@pytest.mark.parametrize(
    ("cls", "name"),
    [(TrainConfig, "train/coco256_early"), (TrainConfig, "train/coco256_intermediate")],
)
def test_the_papers_recipes_are_its_table_3(cls: type[TrainConfig], name: str) -> None:
    config = read_config(cls, ["--config", str(CONFIGS / f"{name}.yaml")], prog="test")
    setting = "cross_attention_intermediate" if "intermediate" in name else "concat_early"
    assert config.backbone == with_setting(PRESETS["small"], setting)
    assert config.optim == OptimConfig(
        learning_rate=2e-4,
        weight_decay=0.03,
        decay_norms=True,
        betas=(0.9, 0.9),
        warmup_steps=5000,
        cooldown_steps=0,
        max_grad_norm=None,
    )
    assert (config.seed, config.max_steps, config.global_batch_size) == (1234, 1_000_000, 256)
    assert (config.scaling_factor, config.caption_dropout) == (0.23010, 0.1)
    # The paper takes these values from U-ViT without stating them.
    assert (config.ema_decays, config.random_flip) == ((0.9999,), False)
    assert config.objective == ObjectiveConfig()


def test_the_papers_recipe_on_scenes_keeps_its_objective_beside_todays() -> None:
    paper, modern = (
        read_config(TrainConfig, ["--recipe", name], prog="ifvit train")
        for name in ("scenes_paper", "scenes")
    )
    assert paper.backbone == PRESETS["tiny"]
    assert paper.objective == ObjectiveConfig(min_snr_gamma=1.0)
    assert paper.optim == OptimConfig(
        learning_rate=4e-3,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        warmup_steps=200,
        cooldown_steps=1333,
        max_grad_norm=1.0,
    )
    assert (paper.max_steps, paper.global_batch_size, paper.ema_decays) == (2000, 32, (0.99,))
    assert (modern.objective.prediction, modern.objective.timesteps) == ("flow", "logit_normal")
    assert (modern.optim.optimizer, paper.optim.optimizer) == ("muon", "adamw")
    assert isinstance(modern.backbone, FusionTransformerConfig)
    assert modern.backbone.fusion == paper.backbone.fusion


STUDIES = sorted(path.stem for path in CONFIGS.glob("study/*.yaml"))


@cache
def read_study(name: str) -> StudyConfig:
    path = CONFIGS / "study" / f"{name}.yaml"
    return read_config(StudyConfig, ["--config", str(path)], prog="ifvit study")


@cache
def recipes_of(name: str) -> dict[str, TrainConfig]:
    return arm_recipes(read_study(name))


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_shipped_study_has_a_valid_recipe_of_its_own(name: str) -> None:
    study = read_study(name)
    runs = list_runs(study, step_seconds=dict.fromkeys(study.arms, 1.0))
    assert len({run.recipe.run for run in runs}) == len(study.arms) * len(study.seeds)
    backbones = {dump_config(run.recipe.backbone) for run in runs}
    assert len(backbones) == len(study.arms)


def test_the_study_of_the_documentation_is_a_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    page = (CONFIGS.parent / "docs" / "evaluation.md").read_text()
    (text,) = re.findall(r"```yaml\n(title: .*?)```", page, re.DOTALL)
    study = read_config(StudyConfig, ["--config", text], prog="ifvit study")
    lengths = {run.arm: run.recipe.max_steps for run in list_runs(study)}
    assert (lengths[study.reference_arm], len(lengths)) == (240, 3)


@pytest.mark.parametrize("name", ["paper", "scenes_modern", "scenes_paper"])
def test_the_papers_study_has_its_four_settings_and_both_halves_of_its_ablation(name: str) -> None:
    study = read_study(name)
    for arm, recipe in recipes_of(name).items():
        assert isinstance(recipe.backbone, FusionTransformerConfig)
        assert setting_of(recipe.backbone) == arm
    best = next(claim for claim in study.claims if "best" in claim.text)
    assert {best.arm, *best.against} == set(SETTINGS[:4])


def test_the_papers_study_samples_every_figure_as_the_paper() -> None:
    study = read_study("paper")
    assert study.attention
    samplings = [study.attention.sampling, *(each.protocol.sampling for each in study.evaluate)]
    assert {(each.solver, each.num_steps) for each in samplings} == {("dpm_solver_pp_fast", 50)}
    recipe = recipes_of("paper")[study.reference_arm]
    exported = range(recipe.export_every or 1, recipe.max_steps + 1, recipe.export_every or 1)
    evaluated = {step for each in study.evaluate for step in each.steps or () if step != "all"}
    assert evaluated <= set(exported[-recipe.keep_exports :])
    assert all(one.protocol.get("step", recipe.max_steps) in evaluated for one in study.published)


def test_the_published_costs_are_those_of_the_papers_arms() -> None:
    (costs,) = (each.values for each in read_study("paper").published if not each.protocol)
    for arm, published in costs.items():
        cost = count_cost(recipes_of("paper")[arm].backbone)
        assert round(cost.params / 1e6) == published["mparams"]
        # The paper also counts norms and activations, 0.064 to 0.071 GFLOPs by arm.
        assert published["gflops"] - cost.layer_flops / 1e9 == pytest.approx(0.067, abs=0.005)


@pytest.mark.parametrize("max_steps", [1, 7, 333, 200_003, 2_000_000])
def test_a_recipe_of_any_length_validates_when_it_logs_and_exports_its_checkpoints(
    max_steps: int,
) -> None:
    base = recipes_of("paper")["concat_early"]
    recipe = with_length(base, max_steps)
    assert recipe.max_steps == max_steps
    assert recipe.validation.every % recipe.log_every == 0
    assert (recipe.export_every or 0) % recipe.checkpoint_every == 0
    assert recipe.optim.warmup_steps == max(1, max_steps * 5000 // 1_000_000)


@pytest.mark.parametrize("name", ["coco2014_fid30k", "paper_compat", "object_count"])
def test_the_papers_protocols_use_the_only_solver_of_its_scripts(name: str) -> None:
    words = ["--weights", "w", "--shards", "s", "--protocol", name]
    sampling = read_config(EvaluateConfig, words, prog="test").protocol.sampling
    assert (sampling.solver, sampling.num_steps) == ("dpm_solver_pp_fast", 50)


@pytest.mark.parametrize("name", ["coco2014_fid30k", "paper_compat"])
def test_the_papers_protocols_draw_30_000_random_captions_at_its_scale_of_1(name: str) -> None:
    words = ["--weights", "w", "--shards", "s", "--protocol", name]
    protocol = read_config(EvaluateConfig, words, prog="test").protocol
    sampling = protocol.sampling
    assert (protocol.num_samples, protocol.caption_rule) == (30_000, "random")
    assert (sampling.solver, sampling.num_steps) == ("dpm_solver_pp_fast", 50)
    assert (sampling.guidance_scale, sampling.method) == (1.0 + 1.0, "plain")
    assert (protocol.clip, protocol.paper_prefix) == (
        "openai/clip-vit-large-patch14",
        "A photo depicts ",
    )
    # The paper's script scores an image against the first caption, whichever was sampled.
    assert (protocol.score_caption == "first") == (name == "paper_compat")


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("protocol/*.yaml")])
def test_a_protocol_is_found_by_name_and_called_by_it(name: str) -> None:
    words = ["--weights", "w", "--shards", "s", "--protocol", name]
    config = read_config(EvaluateConfig, [*words, "--protocol.num_samples", "7"], prog="test")
    assert (config.protocol.name, config.protocol.num_samples) == (name, 7)
    words[-1] = str(CONFIGS / "protocol" / f"{name}.yaml")
    by_path = read_config(EvaluateConfig, words, prog="test")
    assert dataclasses.replace(by_path.protocol, num_samples=7) == config.protocol


def test_a_recipe_is_found_by_the_name_of_its_verb() -> None:
    path = str(CONFIGS / "train" / "coco256_early.yaml")
    by_name = ["--recipe", "coco256_early", "--seed", "5"]
    by_path = ["--config", path, "--seed", "5"]
    assert read_config(TrainConfig, by_name, prog="ifvit train") == read_config(
        TrainConfig, by_path, prog="ifvit train"
    )
    with pytest.raises(UserError, match=r"--recipe early: no such file; shipped names are coco2"):
        read_config(TrainConfig, ["--recipe", "early"], prog="ifvit train")


def test_an_unknown_recipe_name_is_one_line_with_the_shipped_names() -> None:
    with pytest.raises(UserError, match=r"--protocol coco: no such file; shipped names are coco2"):
        read_config(EvaluateConfig, ["--protocol=coco"], prog="test")


def test_a_local_file_takes_precedence_over_a_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenes").write_text("name: mine\n")
    words = ["--weights", "w", "--shards", "s", "--protocol", "scenes"]
    assert read_config(EvaluateConfig, words, prog="test").protocol.name == "mine"


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("backbone/*.yaml")])
def test_a_backbone_is_found_by_name_and_by_path(name: str) -> None:
    words = ["--config", str(CONFIGS / "train" / "coco256_early.yaml"), "--optim.betas", "[0,0.5]"]
    path = str(CONFIGS / "backbone" / f"{name}.yaml")
    for backbone in (name, path):
        config = read_config(TrainConfig, [*words, "--backbone", backbone], prog="test")
        assert config.backbone == restore_config(parse_yaml(Path(path).read_text(), name))
        assert (config.optim.learning_rate, config.optim.betas) == (2e-4, (0, 0.5))


def test_a_backbone_that_states_its_architecture_replaces_that_of_the_recipe() -> None:
    early, classes = (
        str(CONFIGS / "train" / f"{name}.yaml") for name in ("coco256_early", "scenes_classes")
    )
    config = read_config(
        TrainConfig,
        [
            "--config",
            early,
            "--backbone.num_heads=4",
            "--backbone=unet_tiny",
            "--backbone.head_width=16",
        ],
        prog="test",
    )
    assert config.backbone == dataclasses.replace(CLASS_PRESETS["unet_tiny"], head_width=16)
    config = read_config(TrainConfig, ["--config", early, "--config", classes], prog="test")
    assert config.backbone == CLASS_PRESETS["class_tiny"]
    assert config.text_encoder == "openai/clip-vit-large-patch14"
    config = read_config(TrainConfig, ["--config", classes, "--backbone.width", "96"], prog="test")
    assert config.backbone == dataclasses.replace(CLASS_PRESETS["class_tiny"], width=96)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["fusion", "4*image 5*cros_attention"],
            r"5\*cros_attention is not an entry like .*adaln$",
        ),
        (["fusion", "300*image"], "300 blocks; give 1 to 256"),
        (["fusion", ""], "0 blocks; give 1 to 256"),
        (
            ["fusion", "13*image", "num_text_blocks", "1"],
            "num_text_blocks: no block .* set it to 0",
        ),
        (["rotary", "true", "num_heads", "256"], "heads have 2 channels; choose num_heads so that"),
        (["num_heads", "7"], "width 512 must be even and divisible by num_heads 7"),
        (["modulation", "adaln"], "backbone.modulation is adaln; expected 'none' or 'adaln_zero'"),
        (["num_registers", "-1"], "backbone.num_registers is -1; it must be from 0 to 256"),
        (["init_std", "narrow"], "backbone.init_std is narrow; expected float above 0 or 'auto'"),
        (["conditioning", "concat"], "backbone.conditioning"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_one_line(flags: list[str], message: str) -> None:
    words = [
        f"--backbone.{name}={value}" for name, value in zip(flags[::2], flags[1::2], strict=True)
    ]
    with pytest.raises(UserError, match=f"^ifvit train: .*{message}") as error:
        read_config(TrainConfig, ["--recipe", "coco256_early", *words], prog="ifvit train")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 220


def test_help_shows_the_architecture_before_the_fields_that_depend_on_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        read_config(TrainConfig, ["--help"], prog="ifvit train")
    shown = capsys.readouterr().out.partition("\n  --backbone CONFIG")[2]
    fields = re.findall(r"^  --backbone\.(\w+)", shown, re.MULTILINE)
    assert fields[:2] == ["architecture", "latent_size"]
    assert fields.index("fusion") < fields.index("width") < fields.index("mlp")


BROKEN = {
    "unknown key": ("max_stepz: 3", "max_stepz"),
    "key of a section": ("min_snr_gamma: 5.0", "use objective.min_snr_gamma"),
    "unknown nested key": ("optim: {learning_rat: 1}", "learning_rat"),
    "wrong type": ("max_steps: many", "max_steps"),
    "wrong choice": ("engine: {precision: fp64}", "precision"),
    "refused value": ("caption_dropout: 2.0", "caption_dropout"),
    "refused nested value": ("optim: {warmup_steps: -1}", "warmup_steps"),
    "unknown architecture": (
        "backbone: {architecture: unett}",
        "expected one of fusion_transformer, .* not unett",
    ),
    "another architecture's key": ("backbone: {architecture: unet, patch_size: 2}", "patch_size"),
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


PAGES = [*CONFIGS.parent.glob("*.md"), *CONFIGS.parent.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(
        r"(?:configs|tests|tools|docs)/[\w/]+\.(?:yaml|py|sh|md)", page.read_text()
    ):
        assert (CONFIGS.parent / name).is_file(), name


@record
class Part:
    """Part of the whole."""

    rate: PositiveFloat | None = None
    """Rate."""
    size: PositiveInt = 3
    """Size."""


@record
class Whole:
    """Whole of parts."""

    kind: Literal["a", "b"] = "a"
    """Kind."""
    part: Part = dataclasses.field(default_factory=Part)
    """The part."""
    parts: list[Part] = dataclasses.field(default_factory=list)
    """More parts."""
    named: dict[str, Part] = dataclasses.field(default_factory=dict)
    """Parts with names."""
    scales: list[float] | None = None
    """Scales."""
    code: str | None = dataclasses.field(default=None, metadata=FLAG_ONLY)
    """Code to run."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part.rate", "0"], "part.rate is 0.0; it must be above 0"),
        (["--part.rate", "x"], "part.rate is x; expected float above 0 or null"),
        (["--part.rate", "-.inf"], "part.rate is NaN or beyond"),
        (["--part.rate", "9" * 400], "part.rate is 999"),
        (["--part.size", "1e30"], r"part.size is 1e\+30; expected int"),
        (["--parts", "[{size: 1}, {size: 0}]"], r"parts\[1\].size is 0"),
        (["--named", "{a: {size: 1}, b: {size: 0}}"], r"named\.b\.size is 0"),
        (["--named", "{a: {sizes: 1}}"], "unknown key sizes; known keys are rate, size"),
        (["--named", "{a: 1}"], "1 in place of the keys rate, size"),
        (["--scales", "1.5,2"], r"scales is 1.5,2; expected .*, such as '\[1.5,2\]'"),
        (["--kind", "c"], "kind is c; expected 'a' or 'b'"),
        (["--part", "{sizes: 1}"], "unknown key sizes; known keys are rate, size"),
        (["--part", "[1]"], "in place of the keys"),
        (["--parts", "[{class_path: antigravity.X}]"], "unknown key class_path"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^verb: .*{message}") as raised:
        read_config(Whole, flags, prog="verb")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


def test_help_shows_the_rule_of_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_config(Whole, ["--help"], prog="verb")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Size. (type: int, at least 1, default: 3)" in shown
    assert "Annotated" not in shown


RECIPE_FILES = {
    "empty": b"",
    "list": b"[1]",
    "tag": b"part: !!python/object/apply:os.getcwd []",
    "not UTF-8": b"\xff\xfe\x00",
    "deep": b"part: " + b"[" * 20_000,
    "huge": b"part: {size: " + b"9" * 5000 + b"}",
    "itself": b"part: recipe.yaml",
    "pipe": b"part: pipe.yaml",
    "folder": b"part: .",
    "device": b"part: /dev/zero",
    "escape": b'"\\e[31mpart": 1',
    "number as key": b"{1: 2}",
}


@pytest.mark.parametrize("kind", RECIPE_FILES)
def test_a_hostile_recipe_is_one_line(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(RECIPE_FILES[kind])
    with pytest.raises(UserError, match=r"^verb: /.*(recipe|pipe|zero|test)") as raised:
        read_config(Whole, ["--config", str(recipe)], prog="verb")
    assert str(raised.value).isprintable()


def test_a_field_for_flags_only_is_refused_in_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("code: os:popen")
    with pytest.raises(UserError, match=r"recipe\.yaml: code is set by the flag --code only"):
        read_config(Whole, ["--config", str(recipe)], prog="verb")
    config = read_config(Whole, ["--code", "own:Source"], prog="verb")
    assert config.code == "own:Source"
    recipe.write_text(dump_config(Whole()))
    assert read_config(Whole, ["--config", str(recipe)], prog="verb") == Whole()
