"""The training objective: noise the latents, ask the backbone for the noise, weigh the error.

Shapes: B batch, C latent channels, H, W latent; a condition is whatever the
denoiser takes, contexts (B, M, D) of captions or class numbers (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ifvit.diffusion.schedules import NUM_TIMESTEPS, NoiseSchedule
from ifvit.rng import Stream, normal, uniform

NoisePredictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), timesteps (B,), condition (B, ...)) => predicted noise (B, C, H, W)."""
NormalDraw = Callable[[int, int, Tensor, Stream, tuple[int, ...]], Tensor]
"""`ifvit.rng.normal`, or the same compiled."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """`total`: scalar to differentiate; `per_sample` (B,): what it is the mean of, detached."""

    total: Tensor
    per_sample: Tensor
    timesteps: Tensor
    """(B,) in 0 ... 999, those of the samples."""


@dataclass(frozen=True, kw_only=True)
class NoisePrediction:
    """Epsilon prediction, mean of (noise - predicted)^2 (Ho et al. 2020, Eq. 14).

    With `min_snr_gamma` each sample weighs min(SNR, gamma) / SNR (Hang et al. 2023, Eq. 8), which
    takes weight from the nearly clean latents, whose error is large and teaches little.
    Every draw is a function of (seed, step, position in the global batch) alone, so the loss of a
    step does not depend on the number of processes or on restarts.
    """

    schedule: NoiseSchedule
    scaling_factor: float
    seed: int
    min_snr_gamma: float | None = None
    draw: NormalDraw = normal

    def __call__(
        self,
        denoiser: NoisePredictor,
        moments: Tensor,
        condition: Tensor,
        step: int,
        positions: Tensor,
    ) -> Losses:
        """Moments (B, 2C, H, W), condition (B, ...), positions (B,) int64 => losses."""
        x_0 = self.draw_latents(moments, step, positions)
        noise = self.draw(self.seed, step, positions, Stream.NOISE, tuple(x_0.shape[1:]))
        u = uniform(self.seed, step, positions, Stream.TIMESTEP, 1)[:, 0]
        timesteps = (u * NUM_TIMESTEPS).long()
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        error = (denoiser(x_t, timesteps, condition).float() - noise).square()
        per_sample = error.flatten(1).mean(dim=1)
        if self.min_snr_gamma is not None:
            snr = self.schedule.snr(timesteps)
            per_sample = per_sample * snr.clamp(max=self.min_snr_gamma) / snr
        detached = per_sample.detach()
        return Losses(total=per_sample.mean(), per_sample=detached, timesteps=timesteps)

    def draw_latents(self, moments: Tensor, step: int, positions: Tensor) -> Tensor:
        """A fresh draw from the VAE posterior, scaled: (B, 2C, H, W) => x_0 (B, C, H, W)."""
        mean, logvar = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        noise = self.draw(self.seed, step, positions, Stream.POSTERIOR, tuple(mean.shape[1:]))
        return (mean + std * noise) * self.scaling_factor
