"""Stable Diffusion's noise schedule: alpha_t and sigma_t for t = 0 ... 999."""

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


def alphas_cumprod() -> Tensor:
    """Cumulative products abar_t of 1 - beta_t, (1000,) float64.

    The betas are Stable Diffusion's scaled-linear ones: from 0.00085 to 0.012, linear in their
    square root (Rombach et al. 2022).
    """
    roots = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - roots**2, dim=0)


class NoiseSchedule:
    """Variance-preserving forward process with discrete timesteps, on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        abar = alphas_cumprod()
        self._alpha = abar.sqrt().float().to(device)
        self._sigma = (1.0 - abar).sqrt().float().to(device)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2 at timesteps (B,) => (B,)."""
        return (self._alpha[timesteps] / self._sigma[timesteps]).square()

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise (Ho et al. 2020, Eq. 4); timesteps (B,) int64."""
        shape = (-1,) + (1,) * (x_0.ndim - 1)
        alpha, sigma = self._alpha[timesteps].view(shape), self._sigma[timesteps].view(shape)
        return alpha * x_0 + sigma * noise

    def remove_noise(self, x_t: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 = (x_t - sigma_t noise) / alpha_t; timesteps (B,) may be fractional.

        Between integers, sigma_t / alpha_t is interpolated as in diffusers' solvers.
        """
        low = timesteps.long().clamp(max=NUM_TIMESTEPS - 2)
        ratios = self._sigma / self._alpha
        ratio = torch.lerp(ratios[low], ratios[low + 1], timesteps.float() - low)
        ratio = ratio.view((-1,) + (1,) * (x_t.ndim - 1))
        return x_t * (1 + ratio.square()).sqrt() - ratio * noise
