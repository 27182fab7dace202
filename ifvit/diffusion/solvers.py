"""Solvers of the probability-flow ODE: noise => latents, deterministic given the noise.

All come from diffusers, set to one noise schedule and to steps uniform in time. B is the batch.
"""

from collections.abc import Callable
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

from ifvit.diffusion.config import SolverName
from ifvit.diffusion.schedules import BETA_END, BETA_START, NUM_TIMESTEPS

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents x_t (B, …), timesteps (B,) in 0 … 999) => predicted noise (B, …)."""

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
# "trailing" yields one step too many for some counts (61, 103, …), "leading" skips t = 999.
_SPACED = _SCHEDULE | {"timestep_spacing": "linspace"}
# The last step goes to t = 0, as in U-ViT, not to sigma = 0: on a Gaussian that halves the error
# at 20 to 100 steps. It is a long step in log-SNR, for DPM-Solver++ too long for order 2.
_MULTISTEP = _SPACED | {"final_sigmas_type": "sigma_min"}

SOLVERS: dict[SolverName, Callable[[], Any]] = {
    # Lu et al. 2022, "DPM-Solver++", algorithm 2M.
    "dpm_solver_pp": partial(
        DPMSolverMultistepScheduler, solver_order=2, euler_at_final=True, **_MULTISTEP
    ),
    # Lu et al. 2022, algorithm 3S in steps of three evaluations: U-ViT's "fast" sampler, for
    # comparison with published numbers. Two things differ: diffusers rounds the times to integers,
    # and the second of the three evaluations is reached by algorithm 2S with its own coefficient,
    # (1 - e^-h) / 2 instead of 1 - (1 - e^-h) / h, which agree to first order in h.
    "dpm_solver_pp_fast": partial(
        DPMSolverSinglestepScheduler,
        solver_order=3,
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        **_SCHEDULE,
    ),
    # DDIM (Song et al. 2021, eta = 0) is DPM-Solver-1 (Lu et al. 2022, section 4.1). Diffusers'
    # own DDIM assumes equal integer strides and errs for every other number of steps.
    "ddim": partial(DPMSolverMultistepScheduler, solver_order=1, **_MULTISTEP),
    # Karras et al. 2022, algorithm 1.
    "euler": partial(EulerDiscreteScheduler, **_SPACED),
    # Zhao et al. 2023, UniPC-2 with B(h) = e^h - 1.
    "unipc": partial(UniPCMultistepScheduler, solver_order=2, **_MULTISTEP),
}


@torch.no_grad()
def solve(denoiser: NoisePredictor, noise: Tensor, solver: SolverName, num_steps: int) -> Tensor:
    """Standard normal noise (B, …) => x_0 (B, …) with `num_steps` calls of `denoiser`."""
    scheduler = SOLVERS[solver]()
    scheduler.set_timesteps(num_steps, device=noise.device)
    scheduler.set_begin_index(0)  # else it looks for t in a list on the device, and waits for it
    x_t: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = step_solver(scheduler, denoiser, x_t, t)
    return x_t


def step_solver(
    scheduler: Any, denoiser: NoisePredictor, x_t: Tensor, t: Tensor, **options: Any
) -> Tensor:
    """x_t (B, …), scaled as `scheduler` wants it => the x of its next time; `options` of `step`."""
    predicted = denoiser(scheduler.scale_model_input(x_t, t), t.expand(len(x_t)))
    stepped: Tensor = scheduler.step(predicted, t, x_t, **options).prev_sample
    return stepped
