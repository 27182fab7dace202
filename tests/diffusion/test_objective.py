"""Noise prediction: what a perfect denoiser and an ignorant one score."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NoiseSchedule, alphas_cumprod
from ifvit.rng import Stream, normal, uniform

POSITIONS = torch.arange(64)
CONTEXT = torch.zeros(64, 3, 5)


def objective(scaling_factor: float = 1.0) -> NoisePrediction:
    return NoisePrediction(schedule=NoiseSchedule(), scaling_factor=scaling_factor, seed=11)


def test_a_denoiser_that_knows_the_latents_has_no_loss() -> None:
    mean = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    certain = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
    abar = alphas_cumprod().float()

    def oracle(x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a = abar[timesteps].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * 0.5 * mean) / (1 - a).sqrt()

    losses = objective(scaling_factor=0.5)(oracle, certain, CONTEXT, 0, POSITIONS)
    assert losses.total.item() < 1e-6


def test_predicting_nothing_costs_the_variance_of_the_noise() -> None:
    moments = torch.zeros(64, 8, 8, 8)
    nothing = torch.zeros((), requires_grad=True)
    losses = objective()(lambda x, t, c: x * nothing, moments, CONTEXT, 0, POSITIONS)
    assert losses.total.item() == pytest.approx(1.0, abs=0.05)
    assert losses.per_sample.mean().item() == pytest.approx(losses.total.item(), rel=1e-6)
    assert losses.total.requires_grad
    assert not losses.per_sample.requires_grad


def test_every_visit_draws_the_posterior_anew_with_its_own_deviation() -> None:
    mean = torch.full((64, 4, 8, 8), 2.0)
    moments = torch.cat([mean, torch.full_like(mean, 2 * math.log(3.0))], dim=1)
    first = objective(0.5).sample_posterior(moments, 0, POSITIONS)
    second = objective(0.5).sample_posterior(moments, 1, POSITIONS)
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1.0, abs=0.05)
    assert first.std().item() == pytest.approx(1.5, rel=0.05)


def test_every_step_draws_time_and_noise_anew_apart_from_the_posterior() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append((x_t, timesteps))
        return x_t

    moments = torch.zeros(64, 8, 8, 8)
    draws = []
    for step in range(2):
        objective()(spy, moments, CONTEXT, step, POSITIONS)
        x_t, timesteps = seen[step]
        abar = alphas_cumprod()[timesteps].float().view(-1, 1, 1, 1)
        x_0 = objective().sample_posterior(moments, step, POSITIONS)
        draws += [x_0, (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()]
    correlations = torch.stack(draws).flatten(1).corrcoef()
    assert (correlations - torch.eye(4)).abs().max() < 4 / math.sqrt(moments.numel() / 2)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_the_posterior_is_that_of_the_autoencoder() -> None:
    mean = torch.zeros(64, 4, 8, 8)
    logvar = torch.linspace(-100, 100, 64).view(-1, 1, 1, 1).expand_as(mean)
    moments = torch.cat([mean, logvar], dim=1)
    noise = normal(11, 0, POSITIONS, Stream.POSTERIOR, (4, 8, 8))
    expected = DiagonalGaussianDistribution(moments).std * noise
    torch.testing.assert_close(
        objective().sample_posterior(moments, 0, POSITIONS), expected, atol=0, rtol=1e-6
    )


def test_moments_in_half_precision_lose_nothing_more() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(64, 8, 8, 8, generator=generator).half()
    drawn = objective().sample_posterior(moments, 0, POSITIONS)
    assert torch.equal(drawn, objective().sample_posterior(moments.float(), 0, POSITIONS))


def test_timesteps_cover_the_whole_range_evenly() -> None:
    seen: list[Tensor] = []

    def spy(x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append(timesteps)
        return x_t

    positions = torch.arange(20_000)
    moments = torch.zeros(20_000, 2, 1, 1)
    objective()(spy, moments, torch.zeros(20_000, 1, 1), 0, positions)
    assert seen[0].min() == 0
    assert seen[0].max() == 999
    assert seen[0].float().mean().item() == pytest.approx(499.5, abs=8)


def test_min_snr_takes_weight_from_nearly_clean_latents_only() -> None:
    moments = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = objective()(lambda x, t, c: x, moments, CONTEXT, 0, POSITIONS)
    weighted = replace(objective(), min_snr_gamma=5.0)(
        lambda x, t, c: x, moments, CONTEXT, 0, POSITIONS
    )
    timesteps = (uniform(11, 0, POSITIONS, Stream.TIMESTEP, 1)[:, 0] * 1000).long()
    abar = alphas_cumprod()[timesteps]
    snr = abar / (1 - abar)
    expected = torch.where(snr > 5, 5 / snr, 1.0).float()
    assert torch.allclose(weighted.per_sample / plain.per_sample, expected, rtol=1e-4)
    assert weighted.total.item() == pytest.approx(weighted.per_sample.mean().item(), rel=1e-6)
