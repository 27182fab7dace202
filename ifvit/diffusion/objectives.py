"""The training objective: add noise to latents, predict, and weight the squared error.

Shapes: B batch, C latent channels, H, W latent. A condition is what the network takes: contexts
(B, M, D) of captions or class numbers (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ifvit.diffusion.config import ObjectiveConfig
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.rng import Stream, normal, uniform

ConditionalPredictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), timesteps (B,), condition (B, ...)) => prediction (B, C, H, W)."""
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
    """(B,) from 0 to 1000."""


class Objective:
    """The mean of (target - predicted)², and the random numbers behind it.

    All random numbers are functions of (seed, step, position in the global batch), so the loss of a
    step depends neither on the number of processes nor on restarts. Objectives that differ in other
    fields see the same latents, noise and quantiles of the timesteps.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        scaling_factor: float,
        seed: int,
        device: torch.device | str = "cpu",
        sample_normal: NormalSampler = normal,
    ) -> None:
        self.config, self.scaling_factor, self.seed = config, scaling_factor, seed
        self.schedule = NoiseSchedule(device, config.prediction, config.shift)
        self._sample_normal = sample_normal

    def __call__(
        self,
        predict: ConditionalPredictor,
        moments: Tensor,
        condition: Tensor,
        step: int,
        positions: Tensor,
    ) -> Losses:
        """Moments (B, 2C, H, W), condition (B, ...), positions (B,) int64 => losses."""
        x_0 = self.sample_posterior(moments, step, positions)
        shape = tuple(x_0.shape[1:])
        noise = self._sample_normal(self.seed, step, positions, Stream.NOISE, shape)
        timesteps = self.sample_timesteps(step, positions)
        per_sample = self.errors(predict, x_0, noise, timesteps, condition)
        detached = per_sample.detach()
        return Losses(total=per_sample.mean(), per_sample=detached, timesteps=timesteps)

    def errors(
        self,
        predict: ConditionalPredictor,
        x_0: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """Weighted mean squared error of each sample, (B,), at given noise and timesteps."""
        per_sample = squared_errors(self.schedule, predict, x_0, noise, timesteps, condition)
        if self.config.min_snr_gamma is None:
            return per_sample
        return self.schedule.weigh(per_sample, timesteps, self.config.min_snr_gamma)

    def sample_timesteps(self, step: int, positions: Tensor) -> Tensor:
        """Timesteps (B,) of the configured density; a quantile of it is a uniform number."""
        config = self.config
        u = uniform(self.seed, step, positions, Stream.TIMESTEP, 1)[:, 0]
        if config.timesteps == "logit_normal":
            u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
        if config.shift != 1.0:
            u = config.shift * u / (1 + (config.shift - 1) * u)
        return self.schedule.timesteps(u.clamp(max=1 - 2**-24))

    def sample_posterior(self, moments: Tensor, step: int, positions: Tensor) -> Tensor:
        """Sample scaled latents x_0 (B, C, H, W) from the VAE posterior (B, 2C, H, W)."""
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = self._sample_normal(self.seed, step, positions, Stream.POSTERIOR, shape)
        return scaled_latents(moments, noise, self.scaling_factor)


def scaled_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """x_0 (B, C, H, W) of VAE posteriors (B, 2C, H, W) and standard normal noise (B, C, H, W)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return (mean + std * noise) * scaling_factor


def squared_errors(
    schedule: NoiseSchedule,
    predict: ConditionalPredictor,
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Tensor,
) -> Tensor:
    """Mean over C, H, W of (target - predicted)², (B,), without a weight."""
    x_t = schedule.add_noise(x_0, noise, timesteps)
    target = schedule.target(x_0, noise, timesteps)
    error = (predict(x_t, timesteps, condition).float() - target).square()
    return error.flatten(1).mean(dim=1)
