"""Every solver integrates a Gaussian, whose probability-flow ODE has a closed solution."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ifvit.diffusion.schedule import BETA_END, BETA_START, alphas_cumprod
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.solvers import SOLVERS, solve

MEAN, STD = 0.5, 0.7
NOISE = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Of the standard deviation after 50 steps; a first-order solver contracts too much, as 1 / steps.
TOLERANCE = {"dpm_solver_pp": 0.01, "unipc": 0.01, "ddim": 0.05, "euler": 0.05}


def exact_noise(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """eps(x_t, t) = sigma_t (x_t - alpha_t mu) / (alpha_t^2 s^2 + sigma_t^2), data N(mu, s^2)."""
    abar = alphas_cumprod()
    low = timesteps.floor().long().clamp(0, 998)
    weight = timesteps.double() - low
    # Euler's times may lie between two integers; there sigma/alpha is interpolated, as it does.
    ratio = ((1 - abar) / abar).sqrt()
    ratio = (1 - weight) * ratio[low] + weight * ratio[low + 1]
    alpha = (1 / (1 + ratio**2)).sqrt().view(-1, 1)
    sigma = ratio.view(-1, 1) * alpha
    return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def exact_sample(noise: Tensor) -> Tensor:
    """Where the exact flow carries `noise`, taken as x_t at t = 999: quantiles are kept."""
    abar = alphas_cumprod()[-1]
    std = (abar * STD**2 + 1 - abar).sqrt()
    return MEAN + STD * (noise - abar.sqrt() * MEAN) / std


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_bring_each_sample_closer_to_the_exact_flow(solver: str) -> None:
    errors = [
        float((solve(exact_noise, NOISE, solver, steps) - exact_sample(NOISE)).square().mean())
        for steps in (5, 20, 100)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (TOLERANCE[solver] / 2) ** 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_fifty_steps_reproduce_the_moments_of_the_data(solver: str) -> None:
    samples = solve(exact_noise, NOISE, solver, 50)
    expected = exact_sample(NOISE)
    assert float(samples.mean() - expected.mean()) == pytest.approx(0, abs=0.01)
    assert float(samples.std() / expected.std()) == pytest.approx(1, abs=TOLERANCE[solver])


def test_second_order_solvers_beat_first_order_ones() -> None:
    errors = {
        solver: float((solve(exact_noise, NOISE, solver, 20) - exact_sample(NOISE)).abs().mean())
        for solver in SOLVERS
    }
    assert max(errors["dpm_solver_pp"], errors["unipc"]) < min(errors["ddim"], errors["euler"])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [2, 61, 103])
def test_a_solver_calls_the_denoiser_as_often_as_it_was_told(solver: str, num_steps: int) -> None:
    times = []

    def count(x_t: Tensor, timesteps: Tensor) -> Tensor:
        times.append(float(timesteps[0]))
        return exact_noise(x_t, timesteps)

    samples = solve(count, NOISE[:2], solver, num_steps)
    assert len(times) == num_steps
    assert times[0] == 999
    assert samples.isfinite().all()


def test_ddim_equals_the_original_where_its_strides_are_equal() -> None:
    original = DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    original.set_timesteps(1000 // 37)
    ours = SOLVERS["ddim"]()
    # 999 = 37 * 27, and the original steps from t to t - 37.
    times = list(range(999, -1, -37))
    ours.set_timesteps(timesteps=times)
    original.timesteps = torch.tensor(times)
    first, second = NOISE, NOISE
    for t in ours.timesteps:
        first = ours.step(exact_noise(first, t.expand(1)), t, first).prev_sample
        second = original.step(exact_noise(second, t.expand(1)), t, second).prev_sample
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"num_steps": 1}, {"num_steps": 1000}, {"batch_size": 0}])
def test_impossible_sampling_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
