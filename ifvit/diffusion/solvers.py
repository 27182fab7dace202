"""Solvers of the probability-flow ODE: noise => latents, deterministic given the noise.

The sampler calls `solve`. All solvers are diffusers' schedulers, set to Stable Diffusion's noise
schedule and to steps uniform in time. B is the batch.
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
