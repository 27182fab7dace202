"""Batches of conditions => latents => images, and the solvers that turn noise into latents.

An image is a function of weights, condition, settings and position; it depends neither on the batch
size nor on the number of processes. The solvers integrate the probability-flow ODE. They are
diffusers' schedulers, set to Stable Diffusion's noise schedule and to steps uniform in time.

Shapes: B batch, C latent channels, S latent size, H, W image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ifvit.diffusion.config import SolverConfig, SolverName
from ifvit.diffusion.guidance import (
    AlignmentMethod,
    ConditionalBackbone,
    EncodedCondition,
    GuidedNoisePredictor,
)
from ifvit.diffusion.schedules import BETA_END, BETA_START, NUM_TIMESTEPS
from ifvit.errors import UserError
from ifvit.images import Pixels, to_pixels
from ifvit.rng import Stream, normal

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents x_t (B, …), timesteps (B,) in 0 … 999) => predicted noise (B, …)."""

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
# "trailing" gives one step too many for some counts (61, 103, …); "leading" skips t = 999.
_SPACED = _SCHEDULE | {"timestep_spacing": "linspace"}
# The last step goes to t = 0, as in U-ViT, and not to sigma = 0. On a Gaussian, this halves the
# error at 20 to 100 steps. The last step is long in log-SNR, too long for DPM-Solver++ of order 2,
# which therefore ends with an Euler step.
_MULTISTEP = _SPACED | {"final_sigmas_type": "sigma_min"}

SOLVERS: dict[SolverName, Callable[[], Any]] = {
    # Lu et al. 2022, "DPM-Solver++", algorithm 2M.
    "dpm_solver_pp": partial(
        DPMSolverMultistepScheduler, solver_order=2, euler_at_final=True, **_MULTISTEP
    ),
    # Lu et al. 2022, algorithm 3S in steps of three evaluations: U-ViT's "fast" sampler, for
    # comparison with published numbers. Two details differ. diffusers rounds the times to integers,
    # and it reaches the second of the three evaluations by algorithm 2S with its own coefficient,
    # (1 - e^-h) / 2 instead of 1 - (1 - e^-h) / h. The two agree to first order in h.
    "dpm_solver_pp_fast": partial(
        DPMSolverSinglestepScheduler,
        solver_order=3,
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        **_SCHEDULE,
    ),
    # DDIM (Song et al. 2021, eta = 0) is DPM-Solver-1 (Lu et al. 2022, section 4.1). diffusers'
    # DDIMScheduler assumes equal integer strides and is wrong for other numbers of steps.
    "ddim": partial(DPMSolverMultistepScheduler, solver_order=1, **_MULTISTEP),
    # Karras et al. 2022, algorithm 1.
    "euler": partial(EulerDiscreteScheduler, **_SPACED),
    # Zhao et al. 2023, UniPC-2 with B(h) = e^h - 1.
    "unipc": partial(UniPCMultistepScheduler, solver_order=2, **_MULTISTEP),
}


@dataclass(frozen=True, kw_only=True)
class ConditionBatch:
    """The conditions of B images that are generated together."""

    positions: Tensor
    """(B,) int64: each position selects the initial noise of its image."""
    condition: Tensor
    """Contexts (B, M, D) of captions or class numbers (B,)."""
    prompts: Sequence[str] = ()
    """B captions or class names, which alignment methods read."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The frozen models that generate images."""

    backbone: ConditionalBackbone
    decode: Callable[[Tensor], Tensor]
    """Scaled latents (B, C, S, S) => images (B, 3, H, W), nominally in [-1, 1] but not clamped.

    Differentiable, so that DATE can follow the gradient of a score of the images.
    """
    null_condition: Tensor
    """The condition of no prompt, without batch dimension: (M, D) or ()."""


BuildMethods = Callable[[Sequence[str]], Sequence[AlignmentMethod]]
"""B prompts => alignment methods that have not seen any function evaluation yet."""


@torch.no_grad()
def generate_images(
    sampler: Sampler,
    batches: Iterable[ConditionBatch],
    config: SolverConfig,
    build_methods: BuildMethods | None = None,
) -> Iterator[Pixels]:
    """Generate the images of each batch, uint8 (B, H, W, 3).

    The null condition is encoded once, every other condition once for all steps. `build_methods`
    makes the alignment methods of a batch. Raises UserError if an image is not finite.
    """
    backbone = sampler.backbone
    null = backbone.encode_condition(sampler.null_condition[None].to(backbone.device))
    # A thread decodes each batch while the next one is sampled. On a GPU, this hides the time to
    # copy the images to the host and to round them.
    with ThreadPoolExecutor(1) as thread:
        pending: Future[Pixels] | None = None
        for batch in batches:
            methods = build_methods(batch.prompts) if build_methods else ()
            latents = sample_latents(backbone, batch, null, config, methods)
            if pending:
                yield pending.result()
            pending = thread.submit(_decode, sampler, latents)
        if pending:
            yield pending.result()


@torch.no_grad()
def sample_latents(
    backbone: ConditionalBackbone,
    batch: ConditionBatch,
    null_condition: EncodedCondition,
    config: SolverConfig,
    methods: Sequence[AlignmentMethod] = (),
) -> Tensor:
    """Sample the scaled latents (B, C, S, S) of a batch; `null_condition` has one row."""
    size = backbone.config.latent_size
    shape = (backbone.config.latent_channels, size, size)
    noise = normal(config.seed, 0, batch.positions, Stream.SAMPLING, shape).to(backbone.device)
    condition = batch.condition.to(backbone.device)
    predictor = GuidedNoisePredictor(backbone, condition, null_condition, config.guidance, methods)
    return solve(predictor, noise, config.solver, config.num_steps)


@torch.no_grad()  # no_grad holds for one thread only
def _decode(sampler: Sampler, latents: Tensor) -> Pixels:
    images = sampler.decode(latents).clamp(-1.0, 1.0)
    if not images.isfinite().all():  # such pixels would become black
        raise UserError(
            "generated images are not finite numbers; lower guidance_scale or use other weights"
        )
    return to_pixels(images)


@torch.no_grad()
def solve(
    predict_noise: NoisePredictor, noise: Tensor, solver: SolverName, num_steps: int
) -> Tensor:
    """Standard normal noise (B, …) => x_0 (B, …) with `num_steps` function evaluations."""
    scheduler = SOLVERS[solver]()
    scheduler.set_timesteps(num_steps, device=noise.device)
    # Without a begin index, the scheduler searches t in a list on the device and waits for it.
    scheduler.set_begin_index(0)
    x_t: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        predicted = predict_noise(scheduler.scale_model_input(x_t, t), t.expand(len(x_t)))
        x_t = scheduler.step(predicted, t, x_t).prev_sample
    return x_t
