"""The forward process, and every conversion between noisy latents, x_0, noise and predictions.

x_t = alpha_t x_0 + sigma_t noise (Ho et al. 2020, Eq. 4). Loss, solvers, DATE and export convert
here and nowhere else:

| prediction | alpha_t, sigma_t at timestep t | the network predicts |
|---|---|---|
| epsilon | Stable Diffusion's, alpha² + sigma² = 1 | noise |
| v | the same | alpha noise - sigma x_0 (Salimans and Ho 2022) |
| flow | 1 - t / 1000, t / 1000 | noise - x_0 (Lipman et al. 2023, Liu et al. 2023) |

B is the batch size.
"""

import torch
from torch import Tensor

from ifvit.diffusion.config import Prediction

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
    """Forward process and prediction of one network, on one device."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        prediction: Prediction = "epsilon",
        shift: float = 1.0,
    ) -> None:
        """`shift` is the spacing of a flow's timesteps, which training and solvers share."""
        abar = alphas_cumprod()
        self._alpha = abar.sqrt().float().to(device)
        self._sigma = (1.0 - abar).sqrt().float().to(device)
        self.prediction: Prediction = prediction
        self.shift = shift

    def timesteps(self, u: Tensor) -> Tensor:
        """Numbers u in [0, 1) => timesteps: 1000 u for flows, else its integer part, int64."""
        return u * NUM_TIMESTEPS if self.prediction == "flow" else (u * NUM_TIMESTEPS).long()

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, at `timesteps` of this schedule (B,)."""
        alpha, sigma = self._coefficients(timesteps, x_0.ndim)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect network predicts, at `timesteps` of this schedule (B,)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x_0
        alpha, sigma = self._coefficients(timesteps, x_0.ndim)
        return alpha * noise - sigma * x_0

    def clean(self, x_t: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that a prediction implies; timesteps (B,) may lie between integers.

        Between them, sigma_t / alpha_t of epsilon and v is interpolated as in diffusers' solvers.
        """
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        if self.prediction == "flow":
            return x_t - (timesteps.to(x_t.dtype) / NUM_TIMESTEPS).view(shape) * predicted
        low = timesteps.long().clamp(max=NUM_TIMESTEPS - 2)
        ratios = self._sigma / self._alpha
        ratio = torch.lerp(ratios[low], ratios[low + 1], timesteps.float() - low).view(shape)
        inverse_alpha = (1 + ratio.square()).sqrt()
        if self.prediction == "epsilon":
            return x_t * inverse_alpha - ratio * predicted
        return (x_t - ratio * predicted) / inverse_alpha

    def squared_errors(
        self, predicted: Tensor, x_0: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Mean over C, H, W of (target - predicted)², (B,), without a weight."""
        error = predicted.float() - self.target(x_0, noise, timesteps)
        return error.square().flatten(1).mean(dim=1)

    def weigh(self, errors: Tensor, timesteps: Tensor, gamma: float) -> Tensor:
        """Squared errors (B,) of predictions => those of x_0, times min(SNR, gamma).

        SNR = (alpha / sigma)². An error of epsilon is SNR times that of x_0, one of v SNR + 1
        times, and one of a flow 1 / sigma² times (Hang et al. 2023, section 3.4).
        """
        alpha, sigma = self._coefficients(timesteps, 1)
        if self.prediction == "flow":  # in this form, t = 0 divides by no zero
            return errors * torch.minimum(alpha.square(), gamma * sigma.square())
        snr = (alpha / sigma).square()
        return errors * snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def _coefficients(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B, 1, ...) with `ndim` dimensions."""
        shape = (-1,) + (1,) * (ndim - 1)
        if self.prediction == "flow":
            sigma = (timesteps / NUM_TIMESTEPS).view(shape)
            return 1 - sigma, sigma
        return self._alpha[timesteps].view(shape), self._sigma[timesteps].view(shape)
