"""The verb `bench generate`: images per second of guided sampling, and what sharing gives."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ifvit.bench.config import BenchGenerateConfig
from ifvit.bench.timing import median_of_rounds, print_result, seconds_on
from ifvit.models.backbone import Backbone
from ifvit.models.build import build_backbone
from ifvit.models.config import PRESETS
from ifvit.process_group import choose_device
from ifvit.sampling.config import Guidance
from ifvit.sampling.guidance import GuidedNoisePredictor, compile_backbone
from ifvit.sampling.solvers import NoisePredictor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE = 2.0


@torch.no_grad()
def bench_generate(config: BenchGenerateConfig) -> None:
    """Draw from noise in every way in turn, print the ratios."""
    torch.manual_seed(0)
    device = choose_device(config.device)
    shape = PRESETS[config.preset]
    backbone = build_backbone(shape).eval()
    backbone.to(device).to(_DTYPES[config.precision])  # type: ignore[arg-type]  # as generate
    if config.compile:
        compile_backbone(backbone)
    contexts = torch.randn(config.batch_size + 1, *shape.context_shape, device=device)
    context, null_context = contexts[:-1], contexts[-1:]
    null_text = backbone.encode_condition(null_context)
    contenders: dict[str, Callable[[], NoisePredictor]] = {
        "shared": partial(
            GuidedNoisePredictor, backbone, context, null_text, Guidance(scale=_SCALE)
        ),
        "no_cache": partial(_guide_plainly, backbone, context, null_context),
    }
    if device.startswith("cuda"):
        uvit = replace(shape, conditioning="concat", num_image_blocks=0, num_text_blocks=0)
        eager = build_backbone(uvit).eval()
        eager.to(device)  # type: ignore[arg-type]  # as above
        contenders["eager_fp16"] = partial(_guide_like_uvit, eager, context, null_context)
    else:
        sys.stderr.write("vs_eager_fp16: null, because half precision needs a CUDA device\n")
    timers = {name: partial(_time, build, backbone, config) for name, build in contenders.items()}
    median_of_rounds(timers, 1)  # first use of the device, and compilation
    seconds = median_of_rounds(timers, config.rounds)
    print_result(
        {
            "images_per_s": 1 / seconds["shared"],
            "vs_no_cache": seconds["no_cache"] / seconds["shared"],
            "vs_eager_fp16": (
                seconds["eager_fp16"] / seconds["shared"] if "eager_fp16" in seconds else None
            ),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "preset": config.preset,
            "num_steps": config.num_steps,
            "batch_size": config.batch_size,
            "precision": config.precision,
            "compile": config.compile,
        },
        config.json,
    )


def _guide_plainly(backbone: Backbone, context: Tensor, null_context: Tensor) -> NoisePredictor:
    """Guidance as U-ViT writes it: all of the model twice, from the text encoder's output on."""
    null_contexts = null_context.expand_as(context)

    def predict_noise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        x_t = x_t.to(backbone.dtype)
        # forward is not compiled, whatever calling the module is.
        conditional = backbone.forward(x_t, timesteps, context).float()
        unconditional = backbone.forward(x_t, timesteps, null_contexts).float()
        return unconditional + _SCALE * (conditional - unconditional)

    return predict_noise


def _guide_like_uvit(backbone: Backbone, context: Tensor, null_context: Tensor) -> NoisePredictor:
    """The same under autocast of fp32 weights to fp16, as U-ViT samples."""
    autocast = torch.autocast(backbone.device.type, torch.float16)
    predict_noise: NoisePredictor = autocast(_guide_plainly(backbone, context, null_context))
    return predict_noise


def _time(
    build: Callable[[], NoisePredictor], backbone: Backbone, config: BenchGenerateConfig
) -> float:
    """Seconds per image: of what is done once, and of `num_steps` evaluations."""
    shape = backbone.config
    size = (config.batch_size, shape.latent_channels, shape.latent_size, shape.latent_size)
    x_t = torch.randn(size, device=backbone.device)
    timesteps = torch.full((config.batch_size,), 500, device=backbone.device)
    denoisers: list[NoisePredictor] = []
    once = seconds_on(backbone.device, lambda: denoisers.append(build()))

    def evaluate() -> None:
        for _ in range(config.timed_steps):
            denoisers[0](x_t, timesteps)

    steps = seconds_on(backbone.device, evaluate) / config.timed_steps * config.num_steps
    return (once + steps) / config.batch_size
