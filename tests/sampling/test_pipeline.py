"""The exported pipeline, used as any diffusers pipeline."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ifvit import storage
from ifvit.conditions import tokens_of
from ifvit.diffusion.config import Prediction, SolverConfig
from ifvit.diffusion.guidance import Change, FunctionEvaluation
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import build_scheduler
from ifvit.errors import UserError
from ifvit.models import pretrained
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.text_encoders import default_settings, encode_captions
from ifvit.rng import Stream, normal
from ifvit.sampling.config import ExportConfig, GenerateConfig, SamplingConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.samples import read_images

PROMPTS = ["two red circles", "a blue square"]
STEPS = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def folder(weights: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("pipeline"))
    export(ExportConfig(weights=weights, output=folder))
    return folder


@pytest.fixture(scope="module")
def components(folder: str) -> dict[str, Any]:
    pipeline = FusionPipeline.from_pretrained(folder)
    return pipeline.components | {"scaling_factor": pipeline.config["scaling_factor"]}


@pytest.fixture
def pipeline(components: dict[str, Any]) -> FusionPipeline:
    pipeline = FusionPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_defaults_are_those_of_generate() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(FusionPipeline.__call__).parameters.items()
    }
    config = SamplingConfig()
    assert defaults["num_inference_steps"] == config.num_steps
    assert defaults["guidance_scale"] == config.guidance_scale
    assert defaults["guidance_interval"] == (config.guidance_low, config.guidance_high)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate_arrays(
    pipeline: FusionPipeline, prompt: Any = "a blue square", **options: Any
) -> np.ndarray:
    given = {"generator": torch.Generator().manual_seed(0)} | STEPS | options
    return pipeline(prompt, **given).images


LOADED = [
    ("epsilon", "dpm_solver_pp"),
    ("v", "dpm_solver_pp"),
    ("v", "euler"),
    ("flow", "dpm_solver_pp"),
    ("flow", "euler"),
    ("flow", "heun"),
]


def test_a_fresh_process_with_diffusers_samples_the_latents_of_our_sampler(
    components: dict[str, Any], tmp_path: Path
) -> None:
    batch = ConditionBatch(positions=torch.arange(2), condition=torch.randn(2, 16, 64))
    backbone, config = components["backbone"], SolverConfig(num_steps=5, guidance_scale=3.0)
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    null = encode_captions(encoder, tokenizer, [""], default_settings(encoder))
    noise = normal(0, 0, batch.positions, Stream.SAMPLING, (4, 8, 8))
    torch.save({"prompt_embeds": batch.condition, "latents": noise}, tmp_path / "given.pt")
    expected = []
    for number, (prediction, solver) in enumerate(LOADED):
        schedule = NoiseSchedule("cpu", prediction, shift=2.0)
        settings = dataclasses.replace(config, solver=solver)
        encoded = backbone.encode_condition(null)
        expected.append(sample_latents(backbone, schedule, batch, encoded, settings))
        parts = components | {"scheduler": build_scheduler(solver, schedule)}
        FusionPipeline(**parts, prediction=prediction).save_pretrained(tmp_path / str(number))
    program = (
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "assert 'ifvit' not in sys.modules\n"
        "given = torch.load('given.pt') | {'output_type': 'latent', 'guidance_scale': 3.0}\n"
        "for name in sys.argv[1:]:\n"
        "    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)\n"
        "    torch.save(pipe(**given, num_inference_steps=5).images, f'{name}.pt')\n"
    )
    names = [str(number) for number in range(len(LOADED))]
    subprocess.run(
        [sys.executable, "-c", program, *names],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    for name, latents in zip(names, expected, strict=True):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            FusionPipeline.from_pretrained(tmp_path / name)(
                prompt_embeds=batch.condition, latents=noise, num_inference_steps=5,
                guidance_scale=3.0, output_type="latent",
            ).images, latents, rtol=0, atol=1e-5,
        )  # fmt: skip


def test_the_pipeline_generates_the_images_of_generate(
    pipeline: FusionPipeline, weights: str, tmp_path: Path
) -> None:
    config = GenerateConfig(
        weights=weights, prompt=PROMPTS[0], num_images=2, num_steps=3, guidance_scale=3.0,
        seed=5, output=str(tmp_path), device="cpu",
    )  # fmt: skip
    generated = read_images(generate(config)).astype(int)
    shape = (pipeline.backbone.config.latent_channels, 8, 8)
    noise = normal(5, 0, torch.arange(2), Stream.SAMPLING, shape)
    found = generate_arrays(pipeline, [PROMPTS[0]] * 2, latents=noise, guidance_scale=3.0)
    assert np.abs(generated - (found * 255).round()).max() <= 1


def test_each_image_has_its_generator_and_images_are_ordered_by_prompt(
    pipeline: FusionPipeline,
) -> None:
    seeds = generators(3, 4, 3, 4)
    images = generate_arrays(pipeline, PROMPTS, num_images_per_prompt=2, generator=seeds)
    alone = generate_arrays(pipeline, PROMPTS[1], generator=generators(3))
    np.testing.assert_allclose(images[2:3], alone, atol=1e-4)
    assert np.abs(images[0] - images[1]).max() > 0.01
    assert np.abs(images[0] - images[2]).max() > 1e-3
    with pytest.raises(ValueError, match="2 generators for 1 images"):
        generate_arrays(pipeline, generator=generators(3, 4))


def embed(pipeline: FusionPipeline, text: str) -> Tensor:
    encoder = pipeline.text_encoder
    context = encode_captions(encoder, pipeline.tokenizer, [text], default_settings(encoder))
    return tokens_of(context)


def test_embeddings_replace_prompts(pipeline: FusionPipeline) -> None:
    contexts = {text: embed(pipeline, text) for text in ("a blue square", "stripes")}
    plain = generate_arrays(pipeline)
    given = generate_arrays(pipeline, None, prompt_embeds=contexts["a blue square"])
    np.testing.assert_array_equal(given, plain)
    np.testing.assert_array_equal(generate_arrays(pipeline, negative_prompt=""), plain)
    negative = generate_arrays(pipeline, negative_prompt="stripes")
    assert np.abs(negative - plain).max() > 1e-3
    embedded = generate_arrays(pipeline, negative_prompt_embeds=contexts["stripes"])
    np.testing.assert_array_equal(embedded, negative)


def test_each_prompt_may_have_its_own_negative_prompt(pipeline: FusionPipeline) -> None:
    noise = torch.randn(2, 4, 8, 8)
    both = generate_arrays(pipeline, PROMPTS, negative_prompt=["stripes", ""], latents=noise)
    second = generate_arrays(pipeline, PROMPTS[1], latents=noise[1:])
    np.testing.assert_allclose(both[1:], second, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": None}, "either prompt"),
        ({"prompt_embeds": torch.zeros(1, 16, 64)}, "either prompt"),
        ({"negative_prompt": ["a", "b"]}, "one negative prompt"),
        ({"negative_prompt": []}, "negative_prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ["x", "y"], "negative_prompt": ["a", "b", "c"]}, "one negative prompt"),
        ({"prompt": ["x", "y"], "latents": torch.zeros(4, 4, 8, 8)}, "latents have shape"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents have shape"),
        ({"latents": torch.zeros(4, 8, 8)}, "latents have shape"),
        ({"num_images_per_prompt": 0}, "0 images for each of 1 prompts"),
        ({"generator": generators(1, 2), "latents": torch.zeros(1, 4, 8, 8)}, "2 generators"),
        ({"prompt": None, "prompt_embeds": torch.zeros(16, 64)}, "context of shape"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 16, 64)}, "each of 0 prompts"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(1, 2, 64),
                "prompt_attention_mask": torch.tensor([[0, 1]]),
            },
            "prompt_attention_mask",
        ),
        ({"negative_prompt_embeds": torch.zeros(2, 16, 64)}, "one negative prompt"),
        ({"height": 512}, "height and width are 512 and None; leave them out or 64"),
        ({"height": 64, "width": 63}, "height and width"),
        ({"method": "both"}, "method is 'both'; give an object"),
        ({"eta": 0.5}, "eta is 0.5, which DPMSolverMultistepScheduler does not take"),
        ({"sigmas": [1.0, 0.5]}, "sigmas: DPMSolverMultistepScheduler takes"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [900, 300], "sigmas": [1.0, 0.5]}, "not both"),
        ({"negative_prompt_embeds": torch.zeros(16, 64)}, "one negative prompt"),
        ({"negative_prompt_embeds": torch.zeros(1, 64)}, "context of shape"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    pipeline: FusionPipeline, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        pipeline(**{"prompt": "x", **STEPS, **wrong})


def test_a_callback_cannot_change_the_number_of_prompts(pipeline: FusionPipeline) -> None:
    changed = {"prompt_embeds": torch.zeros(2, 16, 64)}
    with pytest.raises(ValueError, match="prompt_embeds: expected 1 rows"):
        pipeline("x", num_inference_steps=2, callback_on_step_end=lambda *call: changed)


def test_a_callback_sees_every_step_and_may_change_latents_and_prompt(
    pipeline: FusionPipeline,
) -> None:
    seen = []
    blue = embed(pipeline, "a blue square")

    def freeze(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    options = {"num_inference_steps": 3, "output_type": "latent"}
    assert not pipeline("x", **options, callback_on_step_end=freeze).images.any()
    times = pipeline.scheduler.timesteps.tolist()
    assert seen == [(step, t, ["latents"]) for step, t in enumerate(times)]
    switched = generate_arrays(
        pipeline, PROMPTS[0], callback_on_step_end=lambda *call: {"prompt_embeds": blue}
    )
    assert np.abs(switched - generate_arrays(pipeline, PROMPTS[0])).max() > 1e-4


def test_a_callback_can_interrupt_the_steps(pipeline: FusionPipeline) -> None:
    steps = []

    def stop(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    pipeline("x", num_inference_steps=9, callback_on_step_end=stop)
    assert steps == [0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "DDIM", "DDPM", "PNDM", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "UniPCMultistep",
    ],
)  # fmt: skip
def test_schedulers_of_diffusers_work_and_use_the_generator(
    pipeline: FusionPipeline, name: str
) -> None:
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(
        pipeline.scheduler.config
    )
    first, again = (generate_arrays(pipeline, num_inference_steps=5) for _ in range(2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def flow_pipeline(components: dict[str, Any], scheduler: Any) -> FusionPipeline:
    pipeline = FusionPipeline(**components | {"scheduler": scheduler}, prediction="flow")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "DPMSolverMultistep",
        "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
    ],
)  # fmt: skip
def test_schedulers_of_diffusers_for_flows_work(components: dict[str, Any], name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")
    made = scheduler() if name.startswith("FlowMatch") else scheduler(**FLOW)
    assert np.isfinite(generate_arrays(flow_pipeline(components, made))).all()


def test_a_list_of_sigmas_is_that_of_the_flows_scheduler(components: dict[str, Any]) -> None:
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    pipeline = flow_pipeline(components, euler)
    pipeline("x", sigmas=[1.0, 0.5, 0.25], output_type="latent")
    assert pipeline.scheduler.timesteps.tolist() == [1000.0, 500.0, 250.0]
    pipeline = flow_pipeline(components, diffusers.DPMSolverMultistepScheduler(**FLOW))
    with pytest.raises(ValueError, match="timesteps: DPMSolverMultistepScheduler takes no such"):
        pipeline("x", timesteps=[900, 500])


@pytest.mark.parametrize(
    ("prediction", "scheduler"),
    [
        ("flow", diffusers.DPMSolverMultistepScheduler()),
        ("flow", diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")),
        ("flow", diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)),
        ("flow", diffusers.EulerDiscreteScheduler.from_config(FLOW)),
        ("epsilon", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("epsilon", diffusers.FlowMatchHeunDiscreteScheduler.from_config(
            {"prediction_type": "epsilon", "use_flow_sigmas": False})),
        ("epsilon", diffusers.DDIMScheduler(prediction_type="v_prediction")),
        ("v", diffusers.UniPCMultistepScheduler()),
    ],
)  # fmt: skip
def test_schedulers_for_another_prediction_are_refused(
    components: dict[str, Any], prediction: Prediction, scheduler: Any
) -> None:
    named = f"scheduler: {type(scheduler).__name__} .* backbone that predicts {prediction}"
    with pytest.raises(ValueError, match=named) as error:
        FusionPipeline(**components | {"scheduler": scheduler}, prediction=prediction)
    assert "\n" not in str(error.value)
    fitting = build_scheduler("euler", NoiseSchedule("cpu", prediction))
    pipeline = FusionPipeline(**components | {"scheduler": fitting}, prediction=prediction)
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=named):
        pipeline("x")


def test_eta_timesteps_and_sigmas_are_those_of_the_scheduler(pipeline: FusionPipeline) -> None:
    plain = pipeline.scheduler
    timesteps = [900, 500, 100]
    pipeline("x", timesteps=timesteps, height=64, width=64, output_type="latent")
    assert pipeline.scheduler.timesteps.tolist() == timesteps
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(plain.config)
    pipeline("x", sigmas=[10.0, 3.0, 1.0, 0.0], output_type="latent")
    np.testing.assert_allclose(pipeline.scheduler.sigmas, [10.0, 3.0, 1.0, 0.0])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(plain.config)
    noisy, plain = generate_arrays(pipeline, eta=1.0), generate_arrays(pipeline)
    assert np.abs(noisy - plain).max() > 0.01
    np.testing.assert_array_equal(noisy, generate_arrays(pipeline, eta=1.0))


def test_code_in_a_folder_or_in_its_index_does_not_run(copy: Path) -> None:
    for name in ("stranger.py", "pipeline.py"):
        (copy / name).write_text("raise SystemExit('stranger code has run')")
    change_json(copy / "model_index.json", vae=["stranger", "Code"], backbone=["os", "system"])
    assert FusionPipeline.from_pretrained(copy).config["classes"] == []


def test_an_alignment_method_is_called_at_every_step(pipeline: FusionPipeline) -> None:
    indices = []

    class Watch:
        def before(self, evaluation: FunctionEvaluation) -> Change:
            indices.append(evaluation.index)
            return Change()

    watched = generate_arrays(pipeline, method=Watch())
    assert indices == [0, 1, 2]
    np.testing.assert_array_equal(watched, generate_arrays(pipeline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_backbone_and_changes_images_little(
    pipeline: FusionPipeline, folder: str, dtype: torch.dtype
) -> None:
    half = FusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    assert (half.backbone.dtype, half.vae.dtype) == (dtype, torch.float32)
    images = generate_arrays(half)
    assert np.abs(images - generate_arrays(pipeline)).mean() < 0.02
    # Diffusers' own ways cast all components, but float16 is not enough for the decoder.
    generate_arrays(half.to(torch.float16))
    assert half.vae.dtype == torch.float32


def test_a_hub_name_loads_the_requested_revision(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(repository: str, *, allow_patterns: list[str], revision: str) -> str:
        asked.append((repository, revision))
        return folder

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot)
    pipeline = FusionPipeline.from_pretrained("team/model", revision="v2")
    assert generate_arrays(pipeline).shape == (1, 64, 64, 3)
    assert asked == [("team/model", "v2")]


def test_the_documented_custom_backbone_works(pipeline: FusionPipeline) -> None:
    pages = (Path(__file__).parents[2] / "docs").glob("*.md")
    blocks = [
        code
        for page in pages
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    (code,) = (code for code in blocks if "class UNetBackbone" in code)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(code, names)
    own = {"backbone": names["UNetBackbone"](), "scaling_factor": 0.5}
    custom = FusionPipeline(**pipeline.components | own)
    custom.set_progress_bar_config(disable=True)
    images = generate_arrays(custom, PROMPTS)
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()


@pytest.mark.parametrize(
    ("factors", "named"),
    [
        ({"scaling_factor": None}, "scaling_factor: not stated"),
        ({"scaling_factor": (1.0, 2.0), "shift_factor": (0.0, 0.0)}, "2 numbers for 4 channels"),
        ({"scaling_factor": (1.0, 2.0)}, "both be numbers"),
    ],
)
def test_a_scaling_that_does_not_fit_is_refused(
    components: dict[str, Any], factors: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        FusionPipeline(**components | factors)


@pytest.fixture
def copy(folder: str, tmp_path: Path) -> Path:
    """A copy of the exported pipeline whose files may be changed."""
    shutil.copytree(folder, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheduler": ["os", "system"]}, "a scheduler of diffusers"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "a scheduler of diffusers"),
        ({"text_encoder": "CLIP"}, "text_encoder"),
        ({"../../outside": ["diffusers", "AutoencoderKL"]}, "outside"),
        ({"_class_name": ["code", "Pipeline"]}, "not the index"),
        ({"_class_name": "StableDiffusionPipeline"}, "not the index"),
        ({"classes": [3]}, "classes"),
        ({"text_settings": {"template": "no braces"}}, "template"),
        ({"text_settings": {"max_length": 10**9}}, "max_length"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
        ({"shift_factor": "0.1"}, "shift_factor"),
        ({"vae": [None, None], "scheduler": 3}, "scheduler"),
    ],
)
def test_an_index_that_names_other_classes_or_folders_is_one_line(
    copy: Path, changes: dict[str, object], named: str
) -> None:
    for name in ("code.py", "pipeline.py"):
        (copy / name).write_text("raise SystemExit('stranger code has run')")
    change_json(copy / "model_index.json", **changes)
    with pytest.raises(UserError, match=named) as error:
        FusionPipeline.from_pretrained(copy)
    assert "model_index.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("vae/config.json", {"layers_per_block": 10**9}),
        ("backbone/config.json", {"depth": 10**9}),
        ("backbone/config.json", {"width": 64}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", FLOW),
        ("tokenizer/tokenizer.json", {"model": 3}),
    ],
)
def test_a_component_with_an_impossible_configuration_is_one_line(
    copy: Path, file: str, changes: dict[str, object]
) -> None:
    change_json(copy / file, **changes)
    with pytest.raises(UserError) as error:
        FusionPipeline.from_pretrained(copy)
    assert str(copy / file.partition("/")[0]) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_encoder_that_names_code_of_a_stranger_is_loaded_without_it(copy: Path) -> None:
    change_json(copy / "text_encoder/config.json", attn_implementation="stranger/kernels")
    found = FusionPipeline.from_pretrained(copy).text_encoder
    assert found.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "backbone/config.json",
        "backbone/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"7", b"{}"])
def test_a_missing_or_broken_file_is_one_line(copy: Path, file: str, content: bytes | None) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        FusionPipeline.from_pretrained(copy)
    assert str(copy / file.rpartition("/")[0]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_folder_whose_scheduler_is_for_another_prediction_is_one_line(
    copy: Path, prediction: str
) -> None:
    change_json(copy / "model_index.json", prediction=prediction)
    with pytest.raises(UserError, match=r"scheduler_config.json.*prediction_type") as error:
        FusionPipeline.from_pretrained(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"flow_shift": 0}, {"shift": -1.0}, {"invert_sigmas": True}])
def test_a_flow_with_an_impossible_scheduler_is_one_line(
    components: dict[str, Any], tmp_path: Path, changes: dict[str, object]
) -> None:
    scheduler = build_scheduler("dpm_solver_pp", NoiseSchedule("cpu", "flow"))
    flow_pipeline(components, scheduler).save_pretrained(tmp_path)
    change_json(tmp_path / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(UserError, match=f"scheduler_config.json.*{next(iter(changes))}") as error:
        FusionPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_component_outside_the_folder_is_not_read(copy: Path) -> None:
    shutil.move(copy / "vae", copy.parent / "secret")
    (copy / "vae").symlink_to(copy.parent / "secret")
    with pytest.raises(UserError, match="does not lead inside"):
        FusionPipeline.from_pretrained(copy)


ModelMixin = diffusers.ModelMixin
"""diffusers looks for it in the module of a component's class."""


class OwnBackbone(FusionTransformer):
    """A class that only its author's program has."""


def test_a_component_of_the_callers_own_class_is_passed_as_an_argument(
    copy: Path, components: dict[str, Any]
) -> None:
    shutil.rmtree(copy / "backbone")
    own = OwnBackbone(components["backbone"].config)
    assert FusionPipeline.from_pretrained(copy, backbone=own).backbone is own


@pytest.mark.s3
def test_names_in_an_object_store_lead_to_no_other_folder(
    copy: Path, s3_bucket: str, tmp_path: Path
) -> None:
    change_json(copy / "model_index.json", **{"../../outside": ["diffusers", "AutoencoderKL"]})
    for path in copy.rglob("*"):
        if path.is_file():
            storage.upload(path, storage.join(s3_bucket, str(path.relative_to(copy))))
    storage.write_bytes(storage.join(s3_bucket, "../../outside/config.json"), b"{}")
    with pytest.raises(UserError, match="outside"):
        FusionPipeline.from_pretrained(s3_bucket)


@pytest.mark.s3
def test_export_and_load_go_through_an_object_store(weights: str, s3_bucket: str) -> None:
    export(ExportConfig(weights=weights, output=s3_bucket))
    pipeline = FusionPipeline.from_pretrained(s3_bucket)
    assert generate_arrays(pipeline).shape == (1, 64, 64, 3)
