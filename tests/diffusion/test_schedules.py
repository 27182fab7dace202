"""The conversions of every prediction, against numbers and schedulers that others computed."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ifvit.diffusion.config import Prediction
from ifvit.diffusion.schedules import BETA_END, BETA_START, NoiseSchedule, alphas_cumprod

# Stable Diffusion's betas, float64 numpy; U-ViT counts its steps from 1, this schedule from 0.
GOLDEN = {
    1: 0.99915,
    2: 0.9982960278384514,
    250: 0.6754324137251241,
    500: 0.27766965045646763,
    750: 0.056623491598269717,
    1000: 0.004660098513077238,
}
# The same SNR on both schedules, s = sigma / (alpha + sigma), to three digits.
AS_NOISY = {0: 0.028, 250: 0.410, 500: 0.618, 750: 0.804, 999: 0.936}

X_0, NOISE, ERROR = torch.randn(3, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
STEPS = torch.tensor([0, 250, 500, 750, 999])
OTHERS = DDPMScheduler(beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear")
EVERY_PREDICTION = pytest.mark.parametrize("prediction", get_args(Prediction))


def timesteps_of(prediction: Prediction) -> Tensor:
    """STEPS, or for a flow the timesteps of the same SNR."""
    alpha, sigma = alphas_cumprod()[STEPS].sqrt(), (1 - alphas_cumprod()[STEPS]).sqrt()
    return (1000 * sigma / (alpha + sigma)).float() if prediction == "flow" else STEPS


def add_noise(prediction: Prediction) -> Tensor:
    return NoiseSchedule("cpu", prediction).add_noise(X_0, NOISE, timesteps_of(prediction))


@pytest.mark.parametrize(("n", "abar"), GOLDEN.items())
def test_alphas_are_stable_diffusions(n: int, abar: float) -> None:
    assert alphas_cumprod()[n - 1].item() == pytest.approx(abar, rel=1e-12)


def test_noise_is_added_as_by_diffusers() -> None:
    expected = OTHERS.add_noise(X_0, NOISE, STEPS)
    torch.testing.assert_close(add_noise("epsilon"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(add_noise("v"), expected, rtol=0, atol=1e-6)
    flow = FlowMatchEulerDiscreteScheduler()  # knows the timesteps 1, 2, ..., 1000
    times = torch.tensor([1.0, 28.0, 410.0, 804.0, 1000.0])
    found = NoiseSchedule("cpu", "flow").add_noise(X_0, NOISE, times)
    torch.testing.assert_close(found, flow.scale_noise(X_0, times, NOISE), rtol=0, atol=1e-6)


def test_the_target_of_v_is_that_of_diffusers() -> None:
    expected = OTHERS.get_velocity(X_0, NOISE, STEPS)
    found = NoiseSchedule("cpu", "v").target(X_0, NOISE, STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_flow_of_the_same_snr_is_the_same_latents_in_another_scale() -> None:
    times = timesteps_of("flow")
    assert (times / 1000).tolist() == pytest.approx(list(AS_NOISY.values()), abs=5e-4)
    abar = alphas_cumprod()[list(AS_NOISY)].view(-1, 1, 1, 1).float()
    expected = add_noise("epsilon") / (abar.sqrt() + (1 - abar).sqrt())
    torch.testing.assert_close(add_noise("flow"), expected, rtol=1e-5, atol=1e-6)


@EVERY_PREDICTION
def test_the_target_implies_the_latents(prediction: Prediction) -> None:
    schedule, times = NoiseSchedule("cpu", prediction), timesteps_of(prediction)
    target = schedule.target(X_0, NOISE, times)
    # An error of float32 in x_t grows by 1 / alpha, which is 15 at most.
    found = schedule.clean(add_noise(prediction), target, times)
    torch.testing.assert_close(found, X_0, rtol=0, atol=2e-5)


@pytest.mark.parametrize("t", [0.0, 0.25, 999.99994, 1000.0])
def test_a_flow_is_clean_at_its_start_and_pure_noise_at_its_end(t: float) -> None:
    schedule, times = NoiseSchedule("cpu", "flow"), torch.full((5,), t)
    x_t = schedule.add_noise(X_0, NOISE, times)
    torch.testing.assert_close(x_t, (1 - t / 1000) * X_0 + t / 1000 * NOISE, rtol=0, atol=1e-6)
    found = schedule.clean(x_t, schedule.target(X_0, NOISE, times), times)
    torch.testing.assert_close(found, X_0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_between_integers_sigma_over_alpha_is_interpolated(prediction: Prediction) -> None:
    times = torch.tensor([0.25, 500.5, 998.75], dtype=torch.float64)
    low = times.long()
    ratios = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()
    ratio = ratios[low] + (times - low) * (ratios[low + 1] - ratios[low])
    alpha = (1 + ratio**2) ** -0.5
    x_t, predicted = torch.tensor([[0.3], [-1.0], [2.0]]), torch.ones(3, 1)
    found = NoiseSchedule("cpu", prediction).clean(x_t, predicted, times)[:, 0].double()
    expected = {
        "epsilon": x_t[:, 0] / alpha - ratio,
        "v": alpha * x_t[:, 0] - ratio * alpha,
    }[prediction]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@EVERY_PREDICTION
def test_the_weighed_error_is_that_of_x_0_for_every_prediction(
    prediction: Prediction, gamma: float
) -> None:
    schedule, times = NoiseSchedule("cpu", prediction), timesteps_of(prediction)
    x_t, ones = add_noise(prediction), torch.ones_like(X_0)
    alpha, sigma = (
        schedule.add_noise(ones, 0 * ones, times),
        schedule.add_noise(0 * ones, ones, times),
    )
    # What a network says that takes x_0 for x_0 + ERROR.
    wrong = X_0 + ERROR
    noise = (x_t - alpha * wrong) / sigma
    predicted = {
        "epsilon": noise, "v": alpha * noise - sigma * wrong, "flow": noise - wrong
    }[prediction]  # fmt: skip
    errors = (predicted - schedule.target(X_0, NOISE, times)).square().flatten(1).sum(dim=1)
    snr = alphas_cumprod()[STEPS] / (1 - alphas_cumprod()[STEPS])
    expected = snr.clamp(max=gamma) * ERROR.double().square().flatten(1).sum(dim=1)
    found = schedule.weigh(errors, times, gamma).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("prediction", "plus"), [("epsilon", 0), ("v", 1)])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(
    prediction: Prediction, plus: int
) -> None:
    snr = compute_snr(OTHERS, STEPS)
    expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + plus)
    found = NoiseSchedule("cpu", prediction).weigh(torch.ones(5), STEPS, 5.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_min_snr_weights_of_a_flow_are_finite_at_both_ends() -> None:
    times = torch.tensor([0.0, 500.0, 1000.0])
    found = NoiseSchedule("cpu", "flow").weigh(torch.ones(3), times, 5.0)
    assert found.tolist() == [0.0, 0.25, 0.0]
