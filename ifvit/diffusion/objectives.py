"""The training objective: add noise to latents, predict, and weight the squared error.

Shapes: B batch, C latent channels, H, W latent, L image tokens, G x G patches of an image encoder,
F its channels. A condition is what the network takes: contexts of captions or class numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.conditions import Condition
from ifvit.diffusion.config import LatentScaling, ObjectiveConfig, RepresentationConfig
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.rng import Stream, normal, uniform

ConditionalPredictor = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, C, H, W), timesteps (B,), B conditions) => prediction (B, C, H, W)."""
TrainedPredictor = Callable[..., Any]
"""A ConditionalPredictor that, with `with_features=True`, returns a pair: its prediction and the
projected image tokens (B, L, F)."""
NormalSampler = Callable[[int, int, Tensor, Stream, tuple[int, ...]], Tensor]
"""`ifvit.rng.normal`, or the same function compiled."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of one batch."""

    total: Tensor
    """Mean loss, with that of representations, a scalar with gradient."""
    per_sample: Tensor
    """(B,) weighted squared errors alone, detached."""
    timesteps: Tensor
    """(B,) from 0 to 1000."""
    representation: Tensor | None = None
    """Loss of representations without its weight, a detached scalar; None in steps without it."""


class LatentScaler:
    """Converts latents z of an autoencoder to x_0 = (z - shift) * scale and back, on one device."""

    def __init__(self, scaling: LatentScaling, device: torch.device | str = "cpu") -> None:
        self._shift, self._scale = (
            torch.tensor(one, device=device)[:, None, None] if isinstance(one, tuple) else one
            for one in (scaling.shift, scaling.scale)
        )

    def scale(self, z: Tensor) -> Tensor:
        """Unscaled latents z (B, C, H, W) => x_0."""
        return (z - self._shift) * self._scale

    def unscale(self, x_0: Tensor) -> Tensor:
        """x_0 (B, C, H, W) => unscaled latents z, which the autoencoder decodes."""
        return x_0 / self._scale + self._shift


class Objective:
    """The mean of (target - predicted)², and the random numbers behind it.

    With `deterministic`, stored latents take the place of moments, and no posterior is sampled.
    With `representation`, the network also gives projected image tokens, whose loss is added.

    All random numbers are functions of (seed, step, position in the global batch), so the loss of a
    step depends neither on the number of processes nor on restarts. Objectives that differ in other
    fields see the same latents, noise and quantiles of the timesteps.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        scaling: LatentScaling,
        deterministic: bool = False,
        seed: int,
        device: torch.device | str = "cpu",
        sample_normal: NormalSampler = normal,
        representation: RepresentationConfig | None = None,
    ) -> None:
        self.config, self.scaling, self.seed = config, scaling, seed
        self.deterministic = deterministic
        self._scaler = LatentScaler(scaling, device)
        self.schedule = NoiseSchedule(device, config.prediction, config.shift)
        self._sample_normal = sample_normal
        self.representation = representation

    def __call__(
        self,
        predict: TrainedPredictor,
        moments: Tensor,
        condition: Condition,
        step: int,
        positions: Tensor,
        features: Tensor | None = None,
    ) -> Losses:
        """Moments (B, 2C, H, W), B conditions, positions (B,) int64 => losses.

        Steps that align representations also take the images' features (B, G * G, F).
        """
        x_0 = self.sample_posterior(moments, step, positions)
        shape = tuple(x_0.shape[1:])
        noise = self._sample_normal(self.seed, step, positions, Stream.NOISE, shape)
        timesteps = self.sample_timesteps(step, positions)
        inputs = self.schedule.add_noise(x_0, noise, timesteps), timesteps, condition
        if self.representation is None:
            predicted, tokens = predict(*inputs), None
        else:
            predicted, tokens = predict(*inputs, with_features=True)
        per_sample = self.schedule.squared_errors(predicted, x_0, noise, timesteps)
        if self.config.min_snr_gamma is not None:
            per_sample = self.schedule.weigh(per_sample, timesteps, self.config.min_snr_gamma)
        losses = Losses(
            total=per_sample.mean(), per_sample=per_sample.detach(), timesteps=timesteps
        )
        return losses if tokens is None else self._align(losses, tokens, features, step)

    def _align(self, losses: Losses, tokens: Tensor, features: Tensor | None, step: int) -> Losses:
        """Add the loss of projected tokens (B, L, F), if the step has one."""
        assert self.representation is not None
        if not self.representation.is_on(step):
            # Engines need a gradient of every parameter, also of the projector.
            return replace(losses, total=losses.total + 0.0 * tokens.float().mean())
        assert features is not None
        loss = representation_loss(tokens, features)
        total = losses.total + self.representation.weight * loss
        return replace(losses, total=total, representation=loss.detach())

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
        if self.deterministic:
            return self._scaler.scale(moments.float())
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = self._sample_normal(self.seed, step, positions, Stream.POSTERIOR, shape)
        return self._scaler.scale(sample_latents(moments, noise))


def representation_loss(tokens: Tensor, features: Tensor) -> Tensor:
    """1 - mean cosine of projected tokens (B, L, F) and features (B, G * G, F), a scalar.

    Features of another grid than the tokens' are resized to it: by area to a coarser one,
    bilinearly to a finer one.
    """
    side, grid = math.isqrt(tokens.shape[1]), math.isqrt(features.shape[1])
    features = features.float()
    if grid != side:
        maps = features.mT.reshape(len(features), -1, grid, grid)
        mode = "area" if grid > side else "bilinear"
        features = functional.interpolate(maps, (side, side), mode=mode).flatten(2).mT
    return 1 - functional.cosine_similarity(tokens.float(), features, dim=2).mean()


def sample_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents z (B, C, H, W) of posteriors (B, 2C, H, W) and standard normal noise (B, C, H, W)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return mean + std * noise
