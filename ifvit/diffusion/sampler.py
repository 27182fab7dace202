"""Batches of conditions => latents => images.

An image is a function of weights, condition, settings and position; it depends neither on the batch
size nor on the number of processes.

Shapes: B batch, C latent channels, S latent size, H, W image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ifvit.conditions import Condition, move
from ifvit.diffusion.config import Precision, SolverConfig
from ifvit.diffusion.guidance import (
    AlignmentMethod,
    ConditionalBackbone,
    EncodedCondition,
    GuidedPredictor,
)
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import build_scheduler, solve
from ifvit.errors import UserError
from ifvit.images import Pixels, to_pixels
from ifvit.rng import Stream, normal


@dataclass(frozen=True, kw_only=True)
class ConditionBatch:
    """The conditions of B images that are generated together."""

    positions: Tensor
    """(B,) int64: each position selects the initial noise of its image."""
    condition: Condition
    """B contexts of captions or class numbers."""
    prompts: Sequence[str] = ()
    """B captions or class names, which alignment methods read."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The frozen models that generate images."""

    backbone: ConditionalBackbone
    schedule: NoiseSchedule
    """The forward process of the training, on the backbone's device."""
    decode: Callable[[Tensor], Tensor]
    """Scaled latents (B, C, S, S) => images (B, 3, H, W), nominally in [-1, 1] but not clamped.

    Differentiable, so that DATE can follow the gradient of a score of the images.
    """
    null_condition: Condition
    """The condition of no prompt, one row."""


BuildMethods = Callable[[Sequence[str]], Sequence[AlignmentMethod]]
"""B prompts => alignment methods that have not seen any function evaluation yet."""


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def sampling_precision(backbone: ConditionalBackbone, precision: Precision) -> Iterator[None]:
    """Cast the weights of the backbone, and use TF32 if it is asked for, within this block.

    A decoder that runs in the block keeps its type; Stable Diffusion's overflows in float16.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        with _cast_weights(backbone, _DTYPES.get(precision, torch.float32)):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _cast_weights(backbone: ConditionalBackbone, dtype: torch.dtype) -> Iterator[None]:
    """Give the backbone rounded copies of its weights in this block; it keeps the exact ones."""
    if backbone.dtype == dtype:
        yield
        return
    assert isinstance(backbone, nn.Module)
    parameters = list(backbone.parameters())
    exact = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, exact, strict=True):
            parameter.data = data


@torch.no_grad()
def generate_images(
    sampler: Sampler,
    batches: Iterable[ConditionBatch],
    config: SolverConfig,
    build_methods: BuildMethods | None = None,
) -> Iterator[Pixels]:
    """Generate the images of each batch, uint8 (B, H, W, 3).

    The null condition is encoded once, every other condition once for all steps. `build_methods`
    makes the alignment methods of a batch. The weights of the sampler's backbone are cast to the
    configured precision until the last image. Raises UserError if an image is not finite.
    """
    backbone = sampler.backbone
    # A thread decodes each batch while the next one is sampled. On a GPU, this hides the time to
    # copy the images to the host and to round them.
    with (
        _cast_weights(backbone, _DTYPES.get(config.precision, torch.float32)),
        ThreadPoolExecutor(1) as thread,
    ):
        with sampling_precision(backbone, config.precision):
            null = backbone.encode_condition(move(sampler.null_condition, backbone.device))
        pending: Future[Pixels] | None = None
        for batch in batches:
            methods = build_methods(batch.prompts) if build_methods else ()
            with sampling_precision(backbone, config.precision):
                latents = sample_latents(backbone, sampler.schedule, batch, null, config, methods)
            if pending:
                yield pending.result()
            pending = thread.submit(_decode, sampler, latents)
        if pending:
            yield pending.result()


@torch.no_grad()
def sample_latents(
    backbone: ConditionalBackbone,
    schedule: NoiseSchedule,
    batch: ConditionBatch,
    null_condition: EncodedCondition,
    config: SolverConfig,
    methods: Sequence[AlignmentMethod] = (),
) -> Tensor:
    """Sample the scaled latents (B, C, S, S) of a batch; `null_condition` has one row.

    Raises UserError for a solver that does not take the weights' prediction.
    """
    size = backbone.config.latent_size
    shape = (backbone.config.latent_channels, size, size)
    noise = normal(config.seed, 0, batch.positions, Stream.SAMPLING, shape).to(backbone.device)
    condition = move(batch.condition, backbone.device)
    predictor = GuidedPredictor(
        backbone, schedule, condition, null_condition, config.guidance, methods
    )
    scheduler = build_scheduler(config.solver, schedule, config.shift)
    return solve(predictor, noise, scheduler, config.num_steps)


@torch.no_grad()  # no_grad holds for one thread only
def _decode(sampler: Sampler, latents: Tensor) -> Pixels:
    images = sampler.decode(latents).clamp(-1.0, 1.0)
    if not images.isfinite().all():  # such pixels would become black
        raise UserError(
            "generated images are not finite numbers; lower guidance_scale, use precision fp32 or "
            "bf16, or other weights"
        )
    return to_pixels(images)
