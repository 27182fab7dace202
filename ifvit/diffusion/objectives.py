"""The training objective: add noise to latents, predict the noise, weight the squared error.

Shapes: B batch, C latent channels, H, W latent. A condition is what the noise predictor takes:
contexts (B, M, D) of captions or class numbers (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ifvit.diffusion.schedules import NUM_TIMESTEPS, NoiseSchedule
from ifvit.rng import Stream, normal, uniform

ConditionalNoisePredictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), timesteps (B,), condition (B, ...)) => predicted noise (B, C, H, W)."""
NormalSampler = Callable[[int, int, Tensor, Stream, tuple[int, ...]], Tensor]
"""`ifvit.rng.normal`, or the same function compiled."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of one batch."""

    total: Tensor
    """Mean loss, a scalar with gradient."""
    per_sample: Tensor
    """(B,), detached."""
    timesteps: Tensor
    """(B,) in 0 ... 999."""


@dataclass(frozen=True, kw_only=True)
class NoisePrediction:
    """Epsilon prediction: the mean of (noise - predicted)^2 (Ho et al. 2020, Eq. 14).

    `min_snr_gamma` weights each sample by min(SNR, gamma) / SNR (Hang et al. 2023, Eq. 8). This
    reduces the weight of nearly clean latents, whose error is large and teaches little.
    All random numbers are functions of (seed, step, position in the global batch), so the loss of a
    step depends neither on the number of processes nor on restarts.
    """

    schedule: NoiseSchedule
    scaling_factor: float
    seed: int
    min_snr_gamma: float | None = None
    sample_normal: NormalSampler = normal

    def __call__(
        self,
        predict_noise: ConditionalNoisePredictor,
        moments: Tensor,
        condition: Tensor,
        step: int,
        positions: Tensor,
    ) -> Losses:
        """Moments (B, 2C, H, W), condition (B, ...), positions (B,) int64 => losses."""
        x_0 = self.sample_posterior(moments, step, positions)
        shape = tuple(x_0.shape[1:])
        noise = self.sample_normal(self.seed, step, positions, Stream.NOISE, shape)
        u = uniform(self.seed, step, positions, Stream.TIMESTEP, 1)[:, 0]
        timesteps = (u * NUM_TIMESTEPS).long()
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        error = (predict_noise(x_t, timesteps, condition).float() - noise).square()
        per_sample = error.flatten(1).mean(dim=1)
        if self.min_snr_gamma is not None:
            snr = self.schedule.snr(timesteps)
            per_sample = per_sample * snr.clamp(max=self.min_snr_gamma) / snr
        detached = per_sample.detach()
        return Losses(total=per_sample.mean(), per_sample=detached, timesteps=timesteps)

    def sample_posterior(self, moments: Tensor, step: int, positions: Tensor) -> Tensor:
        """Sample scaled latents x_0 (B, C, H, W) from the VAE posterior (B, 2C, H, W)."""
        mean, logvar = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        shape = tuple(mean.shape[1:])
        noise = self.sample_normal(self.seed, step, positions, Stream.POSTERIOR, shape)
        return (mean + std * noise) * self.scaling_factor
