"""Every solver integrates a Gaussian, whose probability-flow ODE has a closed solution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ifvit.diffusion.config import SolverConfig, SolverName
from ifvit.diffusion.schedules import BETA_END, BETA_START, NoiseSchedule, alphas_cumprod
from ifvit.diffusion.solvers import build_scheduler, solve, solvers_for

MEAN, STD = 0.5, 0.7
SOLVERS = solvers_for("epsilon")
NOISE = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# Relative error of the standard deviation after 50 steps. First-order solvers contract too much.
TOLERANCE = {
    "dpm_solver_pp": 0.01,
    "dpm_solver_pp_fast": 0.01,
    "unipc": 0.01,
    "ddim": 0.05,
    "euler": 0.05,
}
# UniPC's corrector adds one to its order 2 (Zhao et al. 2023, theorem 3.1).
ORDER = {"dpm_solver_pp": 2, "dpm_solver_pp_fast": 3, "unipc": 3, "ddim": 1, "euler": 1}


def alpha_sigma(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) each; between integers sigma / alpha is interpolated, as in the Euler solver."""
    abar = alphas_cumprod()
    low = timesteps.floor().long().clamp(0, 998)
    weight = timesteps.double() - low
    ratio = ((1 - abar) / abar).sqrt()
    ratio = (1 - weight) * ratio[low] + weight * ratio[low + 1]
    alpha = (1 / (1 + ratio**2)).sqrt()
    return alpha, ratio * alpha


def exact_noise(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """eps(x_t, t) = sigma_t (x_t - alpha_t mu) / (alpha_t^2 s^2 + sigma_t^2), data N(mu, s^2)."""
    alpha, sigma = (value.view(-1, 1) for value in alpha_sigma(timesteps))
    return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def exact_flow(noise: Tensor, t: float) -> Tensor:
    """The exact solution at t from x_999 = noise: the flow keeps quantiles."""
    (first, last), (sigma, sigma_last) = alpha_sigma(torch.tensor([t, 999.0]))
    quantile = (noise - last * MEAN) / (last**2 * STD**2 + sigma_last**2).sqrt()
    return first * MEAN + (first**2 * STD**2 + sigma**2).sqrt() * quantile


def exact_sample(noise: Tensor) -> Tensor:
    """The data with the quantiles of `noise`."""
    alpha, sigma = alpha_sigma(torch.tensor([999.0]))
    return MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def integrate(solver: SolverName, num_steps: int) -> Tensor:
    """Samples by a solver that gets the exact noise."""
    return solve(exact_noise, NOISE, build_scheduler(solver, NoiseSchedule()), num_steps)


def error_halfway(solver: SolverName, num_steps: int) -> float:
    """Mean distance from the exact solution after half of the steps, before the stiff end."""
    scheduler = build_scheduler(solver, NoiseSchedule())
    scheduler.set_timesteps(num_steps)
    x_t = NOISE
    if solver == "euler":  # its x is x_t / alpha_t
        x_t = NOISE / alpha_sigma(torch.tensor([999.0]))[0]
    for t in scheduler.timesteps[: num_steps // 2]:
        predicted = exact_noise(scheduler.scale_model_input(x_t, t), t.expand(len(x_t)))
        x_t = scheduler.step(predicted, t, x_t).prev_sample
    t = scheduler.timesteps[num_steps // 2]
    exact = exact_flow(NOISE, float(t))
    return float((scheduler.scale_model_input(x_t, t) - exact).abs().mean())


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_falls_with_the_order_of_the_solver(solver: SolverName) -> None:
    # Multiples of 6, so that half of the steps are whole steps of three evaluations.
    coarse, fine = error_halfway(solver, 24), error_halfway(solver, 96)
    assert math.log(coarse / fine, 4) == pytest.approx(ORDER[solver], abs=0.25)


def sample_like_uvit(noise: Tensor, num_steps: int) -> Tensor:
    """U-ViT's dpm_solver_pp.py, singlestep "fast", for num_steps = 2 (mod 3).

    Their continuous time 0.001 ... 1 is (t + 1) / 1000 here, not rounded.
    """
    times = torch.linspace(999, 0, num_steps + 1, dtype=torch.float64)
    alpha, sigma = alpha_sigma(times)
    rate = (alpha / sigma).log()

    def clean(x_t: Tensor, i: int) -> Tensor:
        return (x_t - sigma[i] * exact_noise(x_t, times[i : i + 1])) / alpha[i]

    x_t = noise
    for s in range(0, num_steps, 3):
        first = clean(x_t, s)
        end = min(s + 3, num_steps)
        h, h1 = float(rate[end] - rate[s]), float(rate[s + 1] - rate[s])
        x_1 = sigma[s + 1] / sigma[s] * x_t - alpha[s + 1] * math.expm1(-h1) * first
        second = clean(x_1, s + 1) - first
        plain = sigma[end] / sigma[s] * x_t - alpha[end] * math.expm1(-h) * first
        if end == s + 2:
            return plain - 0.5 * h / h1 * alpha[end] * math.expm1(-h) * second
        h2 = float(rate[s + 2] - rate[s])
        x_2 = sigma[s + 2] / sigma[s] * x_t - alpha[s + 2] * math.expm1(-h2) * first
        x_2 = x_2 + h2 / h1 * alpha[s + 2] * (math.expm1(-h2) / h2 + 1) * second
        third = clean(x_2, s + 2) - first
        x_t = plain + h / h2 * alpha[end] * (math.expm1(-h) / h + 1) * third
    raise AssertionError("num_steps is not 2 (mod 3)")


def test_the_fast_solver_equals_u_vits_up_to_rounding_and_one_coefficient() -> None:
    ours, theirs = integrate("dpm_solver_pp_fast", 50), sample_like_uvit(NOISE, 50)
    spread, error = (ours - theirs).abs().mean(), (theirs - exact_flow(NOISE, 0)).abs().mean()
    assert spread < 0.05 * error


@pytest.mark.parametrize(("num_steps", "orders"), [(6, (3, 2, 1)), (7, (3, 3, 1)), (8, (3, 3, 2))])
def test_the_fast_solver_takes_steps_of_u_vits_orders(
    num_steps: int, orders: tuple[int, ...]
) -> None:
    scheduler = build_scheduler("dpm_solver_pp_fast", NoiseSchedule())
    scheduler.set_timesteps(num_steps)
    assert scheduler.order_list == [k for order in orders for k in range(1, order + 1)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_reduce_the_distance_from_the_exact_solution(solver: str) -> None:
    errors = [
        float((integrate(solver, steps) - exact_sample(NOISE)).square().mean())
        for steps in (5, 20, 100)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (TOLERANCE[solver] / 2) ** 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_fifty_steps_reproduce_the_moments_of_the_data(solver: SolverName) -> None:
    samples, expected = integrate(solver, 50), exact_sample(NOISE)
    assert float(samples.mean() - expected.mean()) == pytest.approx(0, abs=0.01)
    assert float(samples.std() / expected.std()) == pytest.approx(1, abs=TOLERANCE[solver])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [2, 61, 103])
def test_num_steps_is_the_number_of_function_evaluations(solver: str, num_steps: int) -> None:
    times = []

    def count(x_t: Tensor, timesteps: Tensor) -> Tensor:
        times.append(float(timesteps[0]))
        return exact_noise(x_t, timesteps)

    samples = solve(count, NOISE[:2], build_scheduler(solver, NoiseSchedule()), num_steps)
    assert len(times) == num_steps
    assert times[0] == 999
    assert samples.isfinite().all()


def test_ddim_equals_diffusers_own_scheduler_for_equal_strides() -> None:
    original = DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    original.set_timesteps(1000 // 37)
    ours = build_scheduler("ddim", NoiseSchedule())
    # 999 = 37 * 27, and diffusers' scheduler steps from t to t - 37.
    times = list(range(999, -1, -37))
    ours.set_timesteps(timesteps=times)
    original.timesteps = torch.tensor(times)
    first, second = NOISE, NOISE
    for t in ours.timesteps:
        first = ours.step(exact_noise(first, t.expand(1)), t, first).prev_sample
        second = original.step(exact_noise(second, t.expand(1)), t, second).prev_sample
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 1000])
def test_numbers_of_steps_that_no_solver_can_use_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
        SolverConfig(num_steps=num_steps)
