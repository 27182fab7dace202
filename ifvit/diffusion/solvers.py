"""Solvers of the probability-flow ODE: diffusers' schedulers, set to the schedule of the weights.

`solve` and the diffusers pipeline take their steps here. diffusers' schedulers for flows are used
with these corrections:

- They space n steps from 1 to a smallest sigma that they shift twice, and DPM-Solver++ takes pure
  noise for x_s at s = 0.999. All get the sigmas 1, ..., 2/n, 1/n before the shift, as in Flux.
- DPM-Solver++ rounds its timesteps to integers; the network gets 1000 sigma instead.
- Some lack `scale_model_input` and `init_noise_sigma`, which flows do not need.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ifvit.diffusion.config import Prediction, SolverName
from ifvit.diffusion.schedules import BETA_END, BETA_START, NUM_TIMESTEPS, NoiseSchedule
from ifvit.errors import UserError

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents x_t (B, …), timesteps (B,) from 0 to 1000) => prediction (B, …)."""

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
}
# "trailing" gives one step too many for some counts (61, 103, …); "leading" skips t = 999.
_SPACED = _SCHEDULE | {"timestep_spacing": "linspace"}
# The last step goes to t = 0, as in U-ViT, and not to sigma = 0. On a Gaussian, this halves the
# error at 20 to 100 steps. The last step is long in log-SNR, too long for DPM-Solver++ of order 2,
# which therefore ends with an Euler step.
_MULTISTEP = _SPACED | {"final_sigmas_type": "sigma_min"}

_SOLVERS: dict[SolverName, Callable[..., Any]] = {
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
    # Zhao et al. 2023, UniPC-2 with B(h) = e^h - 1.
    "unipc": partial(UniPCMultistepScheduler, solver_order=2, **_MULTISTEP),
    # Karras et al. 2022, algorithm 1.
    "euler": partial(EulerDiscreteScheduler, **_SPACED),
}
_FLOW_SOLVERS: dict[SolverName, Callable[..., Any]] = {
    "dpm_solver_pp": partial(
        DPMSolverMultistepScheduler,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    ),
    "euler": FlowMatchEulerDiscreteScheduler,
    # Karras et al. 2022, algorithm 1 with its correction: two evaluations per step but the last.
    "heun": FlowMatchHeunDiscreteScheduler,
}


def solvers_for(prediction: Prediction) -> tuple[SolverName, ...]:
    """Names of the solvers that take this prediction."""
    return tuple(_FLOW_SOLVERS if prediction == "flow" else _SOLVERS)


def build_scheduler(solver: SolverName, schedule: NoiseSchedule, shift: float | None = None) -> Any:
    """Build the diffusers scheduler of a solver; `shift` replaces that of a flow's schedule.

    Raises UserError for a solver that does not take the prediction, and for a shift without a flow.
    """
    prediction = schedule.prediction
    if solver not in solvers_for(prediction):
        names = ", ".join(solvers_for(prediction))
        raise UserError(f"solver {solver} does not take {prediction} predictions; use {names}")
    if prediction == "flow":
        name = "flow_shift" if solver == "dpm_solver_pp" else "shift"
        return _FLOW_SOLVERS[solver](**{name: schedule.shift if shift is None else shift})
    if shift is not None:
        raise UserError(f"shift {shift} spaces the steps of flows; weights predict {prediction}")
    return _SOLVERS[solver](prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction])


def set_steps(scheduler: Any, num_evaluations: int, device: torch.device) -> None:
    """Prepare a scheduler for at most `num_evaluations` steps, each of one evaluation.

    `scheduler.timesteps` then holds what the network gets at each step, from 0 to 1000.
    """
    kind, config = type(scheduler), scheduler.config
    is_heun = kind is FlowMatchHeunDiscreteScheduler
    num_steps = (num_evaluations + 1) // 2 if is_heun else num_evaluations
    grid = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    if kind is FlowMatchEulerDiscreteScheduler:
        scheduler.set_timesteps(sigmas=grid.tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    if is_heun or (kind is DPMSolverMultistepScheduler and config.use_flow_sigmas):
        shift = config.shift if is_heun else config.flow_shift
        sigmas = (shift * grid / (1 + (shift - 1) * grid)).float()
        if is_heun:  # every sigma but the first is the end of one step and the start of the next
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])  # steps read them on the CPU
    if is_heun or config.get("use_flow_sigmas"):
        scheduler.timesteps = (scheduler.sigmas[:-1] * NUM_TIMESTEPS).to(device)
    # Without a begin index, the scheduler searches t in a list on the device and waits for it.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def initial_latents(scheduler: Any, noise: Tensor) -> Tensor:
    """Standard normal noise in the scale of the scheduler's latents."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def network_input(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """x_t (B, …), from latents in the scale of the scheduler."""
    scale = getattr(scheduler, "scale_model_input", None)
    x_t: Tensor = scale(latents, t) if scale else latents
    return x_t


@torch.no_grad()
def solve(predict: Predictor, noise: Tensor, scheduler: Any, num_evaluations: int) -> Tensor:
    """Standard normal noise (B, …) => x_0 (B, …), by a scheduler of `build_scheduler`."""
    set_steps(scheduler, num_evaluations, noise.device)
    latents = initial_latents(scheduler, noise)
    for t in scheduler.timesteps:
        predicted = predict(network_input(scheduler, latents, t), t.expand(len(noise)))
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents
