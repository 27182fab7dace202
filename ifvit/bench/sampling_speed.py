"""The verb `bench generate`: images per second of guided sampling, compared with plain guidance."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ifvit.bench.config import BenchGenerateConfig
from ifvit.bench.measurement import (
    median_ratio,
    print_result,
    seconds_on,
)
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedPredictor
from ifvit.diffusion.sampler import sampling_precision
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import Predictor
from ifvit.distributed import choose_device
from ifvit.models.backbone import Backbone
from ifvit.models.presets import PRESETS
from ifvit.models.weights import build_backbone
from ifvit.sampling.load import compile_backbone
from ifvit.studies.step_time import measure_rounds, random_condition
from ifvit.training.profiling import device_name

GUIDANCE_SCALE = 2.0


@torch.no_grad()
def bench_generate(config: BenchGenerateConfig) -> None:
    """Measure guided sampling and its peers in turn, and print the ratios."""
    torch.manual_seed(0)
    device = torch.device(choose_device("auto"))
    shape = config.backbone or PRESETS["small"]
    backbone = build_backbone(shape).eval()
    backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator
    if config.compile:
        compile_backbone(backbone)
    conditions = random_condition(shape, config.batch_size + 1, device)
    context, null_context = conditions[:-1], conditions[-1:]
    guidance = Guidance(scale=GUIDANCE_SCALE)
    with sampling_precision(backbone, config.precision):
        null_text = backbone.encode_condition(null_context)
        contenders: dict[str, Callable[[], Predictor]] = {
            "shared": partial(
                GuidedPredictor, backbone, NoiseSchedule(device), context, null_text, guidance
            ),
            "no_cache": partial(guide_plainly, backbone, context, null_context),
        }
        timers = {name: partial(_time, one, backbone, config) for name, one in contenders.items()}
        measure_rounds(timers, 1)  # first use of the device, and compilation
        seconds = measure_rounds(timers, config.rounds)
    result = {
        "images_per_s": 1 / statistics.median(seconds["shared"]),
        "vs_no_cache": median_ratio(seconds["no_cache"], seconds["shared"]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "fusion": shape.fusion,
        "width": shape.width,
        "num_steps": config.num_steps,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "compile": config.compile,
    }
    print_result(result, config.json)


def guide_plainly(backbone: Backbone, context: Tensor, null_context: Tensor) -> Predictor:
    """Guide as in U-ViT's code: two passes through the whole backbone, text branch included."""
    null_contexts = null_context.expand_as(context)

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        x_t = x_t.to(backbone.dtype)
        # `forward` stays eager even if the call of the module is compiled.
        conditional = backbone.forward(x_t, timesteps, context).float()
        unconditional = backbone.forward(x_t, timesteps, null_contexts).float()
        return unconditional + GUIDANCE_SCALE * (conditional - unconditional)

    return predict


def _time(build: Callable[[], Predictor], backbone: Backbone, config: BenchGenerateConfig) -> float:
    """Return the seconds per image: the setup and `num_steps` measured function evaluations."""
    shape = backbone.config
    size = (config.batch_size, shape.latent_channels, shape.latent_size, shape.latent_size)
    x_t = torch.randn(size, device=backbone.device)
    timesteps = torch.full((config.batch_size,), 500, device=backbone.device)
    predictors: list[Predictor] = []
    setup = seconds_on(backbone.device, lambda: predictors.append(build()))
    step = seconds_on(backbone.device, partial(predictors[0], x_t, timesteps))
    return (setup + config.num_steps * step) / config.batch_size
