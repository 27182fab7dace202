"""Losses of perfect and ignorant noise predictors, and the random numbers behind them."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ifvit.diffusion.config import ObjectiveConfig
from ifvit.diffusion.objectives import Objective
from ifvit.diffusion.schedules import alphas_cumprod
from ifvit.records import parse_value
from ifvit.rng import Stream, normal, uniform

POSITIONS = torch.arange(64)
CONTEXT = torch.zeros(64, 3, 5)
MEAN = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def objective(scaling_factor: float = 1.0, **settings: object) -> Objective:
    config = parse_value(ObjectiveConfig, settings, "objective")
    return Objective(config, scaling_factor=scaling_factor, seed=11)


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
