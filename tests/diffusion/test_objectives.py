"""Losses of perfect and ignorant networks, and the random numbers behind them."""

import math

import pytest
import scipy.stats
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ifvit.diffusion.config import LatentScaling, ObjectiveConfig, Prediction
from ifvit.diffusion.objectives import LatentScaler, Objective
from ifvit.diffusion.schedules import alphas_cumprod
from ifvit.errors import UserError
from ifvit.records import parse_value
from ifvit.rng import Stream, normal, uniform

POSITIONS = torch.arange(64)
CONTEXT = torch.zeros(64, 3, 5)
MEAN = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def objective(scaling_factor: float = 1.0, **settings: object) -> Objective:
    config = parse_value(ObjectiveConfig, settings, "objective")
    return Objective(config, scaling=LatentScaling(scale=scaling_factor), seed=11)


def alpha_sigma(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    abar = alphas_cumprod()[timesteps].float().view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


class Spy:
    """Predicts the noisy latents, and records them with their timesteps."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        self.seen.append((x_t, timesteps))
        return x_t


def test_a_predictor_that_knows_the_latents_has_no_loss() -> None:
    certain = torch.cat([MEAN, torch.full_like(MEAN, -30.0)], dim=1)

    def oracle(x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(timesteps)
        return (x_t - alpha * 0.5 * MEAN) / sigma

    losses = objective(scaling_factor=0.5)(oracle, certain, CONTEXT, 0, POSITIONS)
    assert losses.total.item() < 1e-6


@pytest.mark.parametrize("per_channel", [False, True])
def test_deterministic_latents_are_scaled_alone(per_channel: bool) -> None:
    scale, shift = [0.5, 2.0, 1.0, 0.1], [0.3, -1.0, 0.0, 5.0]
    scaling = LatentScaling(scale=0.5, shift=0.3)
    expected = (MEAN - 0.3) * 0.5
    if per_channel:
        scaling = LatentScaling(scale=tuple(scale), shift=tuple(shift))
        expected = torch.stack(
            [(MEAN[:, c] - shift[c]) * scale[c] for c in range(len(scale))], dim=1
        )
    tried = Objective(ObjectiveConfig(), scaling=scaling, deterministic=True, seed=11)
    for step in range(2):
        torch.testing.assert_close(tried.sample_posterior(MEAN, step, POSITIONS), expected)
    torch.testing.assert_close(LatentScaler(scaling).unscale(expected), MEAN)


def test_a_scaling_of_unequal_kinds_is_one_line() -> None:
    for scale, shift in (((1.0, 2.0), 0.0), ((1.0,), (1.0, 2.0)), (1.0, (0.0,)), ((), ())):
        with pytest.raises(UserError, match="scaling_factor and shift_factor must both be"):
            LatentScaling(scale=scale, shift=shift)


@pytest.mark.parametrize("prediction", ["v", "flow"])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_predictor_of_velocities_that_knows_the_latents_has_no_loss(
    prediction: Prediction, timesteps: str
) -> None:
    certain = torch.cat([MEAN, torch.full_like(MEAN, -30.0)], dim=1)

    def oracle(x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(timesteps.long())
        if prediction == "flow":
            sigma = (timesteps / 1000).view(-1, 1, 1, 1)
            alpha = 1 - sigma
        x_0 = 0.5 * MEAN
        noise = (x_t - alpha * x_0) / sigma
        return noise - x_0 if prediction == "flow" else alpha * noise - sigma * x_0

    tried = objective(scaling_factor=0.5, prediction=prediction, timesteps=timesteps)
    assert tried(oracle, certain, CONTEXT, 0, POSITIONS).total.item() < 1e-6


# Losses at commit c7c2ad1, before networks predicted anything but noise: gamma, step => 4 samples.
PAPER = {
    (None, 0): (0.9656224250793457, 0.5727996230125427, 0.6001478433609009, 0.8827739953994751),
    (None, 7): (0.5144975185394287, 0.4088674485683441, 0.716792643070221, 0.8620860576629639),
    (5.0, 0): (0.1756235957145691, 0.5727996230125427, 0.6001478433609009, 0.8827739953994751),
    (5.0, 7): (0.5144975185394287, 0.4088674485683441, 0.03137722238898277, 0.8620860576629639),
}


@pytest.mark.parametrize(("gamma", "step"), PAPER)
def test_the_papers_recipe_has_the_losses_of_earlier_versions(
    gamma: float | None, step: int
) -> None:
    moments = torch.linspace(-2, 2, 512).reshape(4, 8, 4, 4)
    losses = objective(0.5, min_snr_gamma=gamma)(
        lambda x_t, t, _: 0.5 * x_t + t.view(-1, 1, 1, 1) / 1000,
        moments, torch.zeros(4, 1, 1), step, torch.arange(4),
    )  # fmt: skip
    assert tuple(losses.per_sample.tolist()) == PAPER[gamma, step]


def test_predicting_zero_costs_the_variance_of_the_noise() -> None:
    zero = torch.zeros((), requires_grad=True)
    losses = objective()(lambda x, t, c: x * zero, torch.zeros(64, 8, 8, 8), CONTEXT, 0, POSITIONS)
    assert losses.total.item() == pytest.approx(1.0, abs=0.05)
    assert losses.per_sample.mean().item() == pytest.approx(losses.total.item(), rel=1e-6)
    assert losses.total.requires_grad
    assert not losses.per_sample.requires_grad


def test_every_visit_samples_the_posterior_anew() -> None:
    mean = torch.full((64, 4, 8, 8), 2.0)
    moments = torch.cat([mean, torch.full_like(mean, 2 * math.log(3.0))], dim=1)
    first = objective(0.5).sample_posterior(moments, 0, POSITIONS)
    assert not torch.equal(first, objective(0.5).sample_posterior(moments, 1, POSITIONS))
    assert first.mean().item() == pytest.approx(1.0, abs=0.05)
    assert first.std().item() == pytest.approx(1.5, rel=0.05)


def test_noise_timesteps_and_posterior_of_all_steps_are_independent() -> None:
    spy, moments, samples = Spy(), torch.zeros(64, 8, 8, 8), []
    for step in range(2):
        objective()(spy, moments, CONTEXT, step, POSITIONS)
        x_t, timesteps = spy.seen[step]
        alpha, sigma = alpha_sigma(timesteps)
        x_0 = objective().sample_posterior(moments, step, POSITIONS)
        samples += [x_0, (x_t - alpha * x_0) / sigma]
    correlations = torch.stack(samples).flatten(1).corrcoef()
    assert (correlations - torch.eye(4)).abs().max() < 4 / math.sqrt(moments.numel() / 2)
    assert not torch.equal(spy.seen[0][1], spy.seen[1][1])


def test_the_posterior_is_that_of_the_autoencoder() -> None:
    mean = torch.zeros(64, 4, 8, 8)
    logvar = torch.linspace(-100, 100, 64).view(-1, 1, 1, 1).expand_as(mean)
    moments = torch.cat([mean, logvar], dim=1)
    noise = normal(11, 0, POSITIONS, Stream.POSTERIOR, (4, 8, 8))
    expected = DiagonalGaussianDistribution(moments).std * noise
    sampled = objective().sample_posterior(moments, 0, POSITIONS)
    torch.testing.assert_close(sampled, expected, atol=0, rtol=1e-6)


def test_moments_in_half_precision_are_sampled_in_float32() -> None:
    moments = MEAN.repeat(1, 2, 1, 1).half()
    sampled = objective().sample_posterior(moments, 0, POSITIONS)
    assert torch.equal(sampled, objective().sample_posterior(moments.float(), 0, POSITIONS))


def test_timesteps_are_uniform() -> None:
    spy, count = Spy(), 20_000
    moments = torch.zeros(count, 2, 1, 1)
    objective()(spy, moments, torch.zeros(count, 1, 1), 0, torch.arange(count))
    timesteps = spy.seen[0][1]
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=8)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 1.5, 1.0), (0.3, 0.8, 3.0)]
)
def test_logit_normal_timesteps_are_the_quantiles_of_the_uniform_ones(
    prediction: Prediction, mean: float, std: float, shift: float
) -> None:
    positions = torch.arange(5000)
    u = uniform(11, 3, positions, Stream.TIMESTEP, 1)[:, 0].double().numpy()
    # A shift adds its logarithm to the logit.
    logits = scipy.stats.norm(mean + math.log(shift), std).ppf(u)
    expected = 1000 / (1 + torch.exp(-torch.from_numpy(logits)))
    found = objective(
        prediction=prediction, timesteps="logit_normal", logit_mean=mean, logit_std=std, shift=shift
    ).sample_timesteps(3, positions)
    if prediction == "flow":
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
    else:
        assert (found - expected.long()).abs().max() <= 1
        assert (found == expected.long()).float().mean() > 0.999


def test_timesteps_of_flows_are_shifted_and_reach_the_network_unrounded() -> None:
    spy = Spy()
    moments = MEAN.repeat(1, 2, 1, 1)
    losses = objective(prediction="flow", shift=3.0)(spy, moments, CONTEXT, 0, POSITIONS)
    u = uniform(11, 0, POSITIONS, Stream.TIMESTEP, 1)[:, 0]
    seen = spy.seen[0][1]
    torch.testing.assert_close(seen, 1000 * (3 * u / (1 + 2 * u)))
    assert not seen.eq(seen.round()).any()
    assert torch.equal(losses.timesteps, seen)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("mean", [-10.0, 10.0])
def test_the_ends_of_the_schedule_have_finite_losses(prediction: Prediction, mean: float) -> None:
    positions = torch.arange(4096)
    extreme = objective(
        prediction=prediction,
        timesteps="logit_normal",
        logit_mean=mean,
        logit_std=10.0,
        min_snr_gamma=5.0,
    )
    moments, contexts = torch.zeros(4096, 2, 1, 1), torch.zeros(4096, 1, 1)
    losses = extreme(lambda x_t, *_: x_t, moments, contexts, 0, positions)
    assert losses.per_sample.isfinite().all()
    assert 0 <= losses.timesteps.min() < 1
    assert 999 <= losses.timesteps.max() < 1000


@pytest.mark.parametrize("wrong", [{"logit_mean": 0.5}, {"logit_std": 0.5}])
def test_settings_of_another_density_are_one_line(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="belong to timesteps: logit_normal") as error:
        objective(prediction="flow", **wrong)
    assert "\n" not in str(error.value)


def test_min_snr_reduces_the_weight_of_nearly_clean_latents_only() -> None:
    moments = MEAN.repeat(1, 2, 1, 1)
    plain = objective()(Spy(), moments, CONTEXT, 0, POSITIONS)
    weighting = objective(min_snr_gamma=5.0)
    weighted = weighting(Spy(), moments, CONTEXT, 0, POSITIONS)
    timesteps = (uniform(11, 0, POSITIONS, Stream.TIMESTEP, 1)[:, 0] * 1000).long()
    abar = alphas_cumprod()[timesteps]
    snr = abar / (1 - abar)
    expected = torch.where(snr > 5, 5 / snr, 1.0).float()
    assert torch.allclose(weighted.per_sample / plain.per_sample, expected, rtol=1e-4)
    assert weighted.total.item() == pytest.approx(weighted.per_sample.mean().item(), rel=1e-6)
