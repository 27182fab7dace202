"""Every solver integrates a Gaussian, whose probability-flow ODE has a closed solution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

from ifvit.diffusion.config import Prediction, SolverConfig, SolverName
from ifvit.diffusion.schedules import BETA_END, BETA_START, NoiseSchedule, alphas_cumprod
from ifvit.diffusion.solvers import (
    Predictor,
    build_scheduler,
    initial_latents,
    network_input,
    set_steps,
    solve,
    solvers_for,
)
from ifvit.errors import UserError

MEAN, STD = 0.5, 0.7
CPU = torch.device("cpu")
CASES = [
    (prediction, solver)
    for prediction in ("epsilon", "v", "flow")
    for solver in solvers_for(prediction)
]
EVERY_CASE = pytest.mark.parametrize(("prediction", "solver"), CASES)
EVERY_FLOW_SOLVER = pytest.mark.parametrize("solver", solvers_for("flow"))
NOISE = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# Relative error of the standard deviation after 50 steps. First-order solvers contract too much.
TOLERANCE = {
    "dpm_solver_pp": 0.01,
    "dpm_solver_pp_fast": 0.01,
    "unipc": 0.01,
    "heun": 0.01,
    "ddim": 0.05,
    "euler": 0.05,
}
# UniPC's corrector adds one to its order 2 (Zhao et al. 2023, theorem 3.1).
ORDER = {
    "dpm_solver_pp": 2, "dpm_solver_pp_fast": 3, "unipc": 3, "heun": 2, "ddim": 1, "euler": 1,
}  # fmt: skip


def alpha_sigma(timesteps: Tensor, prediction: Prediction = "epsilon") -> tuple[Tensor, Tensor]:
    """(N,) each; between integers sigma / alpha is interpolated, as in the Euler solver."""
    if prediction == "flow":
        return 1 - timesteps.double() / 1000, timesteps.double() / 1000
    abar = alphas_cumprod()
    low = timesteps.floor().long().clamp(0, 998)
    weight = timesteps.double() - low
    ratio = ((1 - abar) / abar).sqrt()
    ratio = (1 - weight) * ratio[low] + weight * ratio[low + 1]
    alpha = (1 / (1 + ratio**2)).sqrt()
    return alpha, ratio * alpha


def exact(prediction: Prediction) -> Predictor:
    """The prediction for data N(mu, s^2), from E[x_0 | x_t] and E[noise | x_t]."""

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (value.view(-1, 1) for value in alpha_sigma(timesteps, prediction))
        distance = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_0, noise = MEAN + alpha * STD**2 * distance, sigma * distance
        return {"epsilon": noise, "v": alpha * noise - sigma * x_0, "flow": noise - x_0}[prediction]

    return predict


exact_noise = exact("epsilon")


def exact_flow(noise: Tensor, t: float, prediction: Prediction = "epsilon") -> Tensor:
    """The exact solution at t from the first timestep's noise: the flow keeps quantiles."""
    start = 1000.0 if prediction == "flow" else 999.0
    (first, last), (sigma, sigma_last) = alpha_sigma(torch.tensor([t, start]), prediction)
    quantile = (noise - last * MEAN) / (last**2 * STD**2 + sigma_last**2).sqrt()
    return first * MEAN + (first**2 * STD**2 + sigma**2).sqrt() * quantile


def exact_sample(noise: Tensor, prediction: Prediction = "epsilon") -> Tensor:
    """The data with the quantiles of `noise`."""
    x = exact_flow(noise, 0, prediction)
    alpha, sigma = alpha_sigma(torch.zeros(1), prediction)
    return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def integrate(
    solver: SolverName, num_steps: int, prediction: Prediction = "epsilon", shift: float = 1.0
) -> Tensor:
    """Samples by a solver that gets the exact prediction."""
    scheduler = build_scheduler(solver, NoiseSchedule(CPU, prediction, shift))
    return solve(exact(prediction), NOISE, scheduler, num_steps)


def error_halfway(prediction: Prediction, solver: SolverName, num_steps: int) -> float:
    """Mean distance from the exact solution after half of the steps, before the stiff end."""
    scheduler = build_scheduler(solver, NoiseSchedule(CPU, prediction))
    set_steps(scheduler, num_steps, CPU)
    x_t = initial_latents(scheduler, NOISE)
    if prediction != "flow" and solver == "euler":  # its x is x_t / alpha_t
        x_t = NOISE / alpha_sigma(torch.tensor([999.0]))[0]
    for t in scheduler.timesteps[: num_steps // 2]:
        predicted = exact(prediction)(network_input(scheduler, x_t, t), t.expand(len(x_t)))
        x_t = scheduler.step(predicted, t, x_t).prev_sample
    t = scheduler.timesteps[num_steps // 2]
    expected = exact_flow(NOISE, float(t), prediction)
    return float((network_input(scheduler, x_t, t) - expected).abs().mean())


@EVERY_CASE
def test_the_error_falls_with_the_order_of_the_solver(
    prediction: Prediction, solver: SolverName
) -> None:
    # Multiples of 12, so that half of the steps are whole steps of two or three evaluations.
    coarse, fine = (error_halfway(prediction, solver, num_steps) for num_steps in (24, 96))
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


@EVERY_CASE
def test_more_steps_reduce_the_distance_from_the_exact_solution(
    prediction: Prediction, solver: SolverName
) -> None:
    errors = [
        float((integrate(solver, n, prediction) - exact_sample(NOISE, prediction)).square().mean())
        for n in (5, 20, 100)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (TOLERANCE[solver] / 2) ** 2


@pytest.mark.parametrize(
    ("prediction", "solver", "shift"),
    [(*case, 1.0) for case in CASES] + [("flow", "heun", 3.0), ("flow", "dpm_solver_pp", 3.0)],
)
def test_fifty_steps_reproduce_the_moments_of_the_data(
    prediction: Prediction, solver: SolverName, shift: float
) -> None:
    expected = exact_sample(NOISE, prediction)
    samples = integrate(solver, 50, prediction, shift)
    tolerance = TOLERANCE[solver] * (2 if shift > 1 else 1)  # few steps are left for little noise
    assert float(samples.mean() - expected.mean()) == pytest.approx(0, abs=0.01)
    assert float(samples.std() / expected.std()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("solver", solvers_for("v"))
def test_predictions_of_v_lead_to_the_samples_of_epsilon(solver: SolverName) -> None:
    samples = (integrate(solver, 20, prediction) for prediction in ("v", "epsilon"))
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


@EVERY_CASE
@pytest.mark.parametrize("num_steps", [2, 61, 103])
def test_num_steps_is_the_number_of_function_evaluations(
    prediction: Prediction, solver: SolverName, num_steps: int
) -> None:
    times = []

    def count(x_t: Tensor, timesteps: Tensor) -> Tensor:
        times.append(float(timesteps[0]))
        return exact(prediction)(x_t, timesteps)

    scheduler = build_scheduler(solver, NoiseSchedule(CPU, prediction))
    samples = solve(count, NOISE[:2], scheduler, num_steps)
    assert len(times) == (num_steps - (num_steps + 1) % 2 if solver == "heun" else num_steps)
    assert times[0] == (1000 if prediction == "flow" else 999)
    assert samples.isfinite().all()


@EVERY_FLOW_SOLVER
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_evaluated_at_the_shifted_grid_from_pure_noise_on(
    solver: SolverName, shift: float
) -> None:
    times = []

    def watch(x_t: Tensor, timesteps: Tensor) -> Tensor:
        times.append(timesteps[0])
        return exact("flow")(x_t, timesteps)

    # The shift of one command replaces that of the training.
    scheduler = build_scheduler(solver, NoiseSchedule(CPU, "flow", 0.5), shift)
    solve(watch, NOISE[:2], scheduler, 7)
    num_steps = 4 if solver == "heun" else 7
    even = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    grid = shift * even / (1 + (shift - 1) * even)
    if solver == "heun":
        grid = torch.cat([grid[:1], grid[1:].repeat_interleave(2)])
    torch.testing.assert_close(torch.stack(times).double(), 1000 * grid, rtol=1e-6, atol=0)
    # The steps have the sigmas that the network saw, and the last of them leaves no noise.
    assert (1000 * scheduler.sigmas[:-1]).tolist() == pytest.approx(torch.stack(times).tolist())
    assert scheduler.sigmas[-1] == 0


@EVERY_FLOW_SOLVER
def test_a_straight_flow_is_exact_in_two_steps(solver: SolverName) -> None:
    # A data set of one point: the velocity noise - x_0 is constant along each path.
    samples = solve(
        lambda x_t, timesteps: (x_t - MEAN) * 1000 / timesteps[:, None],
        NOISE,
        build_scheduler(solver, NoiseSchedule(CPU, "flow", 3.0)),
        2,
    )
    torch.testing.assert_close(samples, torch.full_like(samples, MEAN), rtol=0, atol=1e-6)


def test_flow_schedulers_of_diffusers_that_round_timesteps_get_those_of_their_sigmas() -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    samples = solve(exact("flow"), NOISE, scheduler, 50)
    assert not scheduler.timesteps.eq(scheduler.timesteps.round()).all()
    error = samples.double() - exact_sample(NOISE, "flow")
    assert float(error.abs().mean()) < 0.005


def test_solvers_and_shifts_that_do_not_fit_the_prediction_are_one_line() -> None:
    for prediction, solver, shift, named in (
        ("flow", "ddim", None, "solver ddim does not take flow predictions; use dpm_solver_pp, eu"),
        ("v", "heun", None, "solver heun does not take v predictions; use dpm_solver_pp, dpm"),
        ("epsilon", "euler", 3.0, "shift 3.0 spaces the steps of flows; weights predict epsilon"),
    ):
        with pytest.raises(UserError, match=named):
            build_scheduler(solver, NoiseSchedule(CPU, prediction), shift)


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
