"""Settings of the objective, of latents, and of what turns noise into them. Imports no torch."""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal, SupportsFloat

from ifvit.errors import UserError
from ifvit.records import PositiveFloat, PositiveInt, Rule, record

Prediction = Literal["epsilon", "v", "flow"]
"""What a network predicts: the noise, v (Salimans and Ho 2022), or the velocity of a flow."""
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Number format of a backbone's matrix products."""
SolverName = Literal["dpm_solver_pp", "dpm_solver_pp_fast", "ddim", "unipc", "euler", "heun"]
Shift = Annotated[float, Rule("from 0.01 to 100", lambda value: 0.01 <= value <= 100)]
Factor = Annotated[float, Rule("from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6)]
ScalingFactor = Factor | tuple[Factor, ...]
"""Factor on the latents: one number for all channels, or one for each."""
ShiftFactor = float | tuple[float, ...]
"""What is subtracted from the latents before: one number for all channels, or one for each."""
LogitMean = Annotated[float, Rule("from -10 to 10", lambda value: -10 <= value <= 10)]
LogitStd = Annotated[float, Rule("above 0 and at most 10", lambda value: 0 < value <= 10)]


@record
class LatentScaling:
    """Scaling of an autoencoder's latents z: x_0 = (z - shift) * scale."""

    scale: ScalingFactor
    shift: ShiftFactor = 0.0

    def __post_init__(self) -> None:
        """Raise UserError unless both are numbers, or both have a number for each channel."""
        scale, shift = (
            len(one) if isinstance(one, tuple) else 0 for one in (self.scale, self.shift)
        )
        if scale != shift or () in (self.scale, self.shift):
            raise UserError(
                "scaling_factor and shift_factor must both be numbers, or both lists with a number "
                "for each channel"
            )

    @property
    def num_channels(self) -> int | None:
        """Number of channels with a scaling of their own; None: one scaling for all."""
        return len(self.scale) if isinstance(self.scale, tuple) else None

    def __str__(self) -> str:
        if self.num_channels:
            digest = hashlib.sha256(repr((self.scale, self.shift)).encode()).hexdigest()
            return f"per channel, {digest[:12]}"
        return f"{self.scale:.5g}" + (f", shift_factor {self.shift:.5g}" if self.shift else "")


@record
class ObjectiveConfig:
    """What the network predicts, and how often it sees each timestep."""

    prediction: Prediction = "epsilon"
    """epsilon, the noise, as in the paper; v = alpha noise - sigma x_0; or flow, the velocity
    noise - x_0 of x_s = (1 - s) x_0 + s noise. epsilon and v use Stable Diffusion's schedule."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """Density of the timesteps. logit_normal: t / 1000 = sigmoid(logit_mean + logit_std z) for a
    standard normal z (Esser et al. 2024)."""
    logit_mean: LogitMean = 0.0
    """Mean of the logit; above 0: more noise."""
    logit_std: LogitStd = 1.0
    """Standard deviation of the logit."""
    shift: Shift = 1.0
    """Moves every u = t / 1000 to shift u / (1 + (shift - 1) u), for latents of many pixels; above
    1: more noise. Solvers of flows space their steps by the same shift."""
    min_snr_gamma: PositiveFloat | None = None
    """Weight the errors of x_0 by min(SNR, gamma) (Hang et al. 2023); unset: equal weights."""

    def __post_init__(self) -> None:
        """Raise UserError for a mean or deviation that uniform timesteps do not have."""
        if self.timesteps == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise UserError(
                "objective: logit_mean and logit_std belong to timesteps: logit_normal; "
                "set it, or remove them"
            )


@record
class RepresentationConfig:
    """Representation alignment (REPA, Yu et al. 2024): loss += weight (1 - mean cosine).

    The cosine is that of projected image tokens and features of an image encoder.
    """

    weight: PositiveFloat = 0.5
    """Weight of the loss, equal for all timesteps."""
    stop_step: PositiveInt | None = None
    """Steps after which the weight is 0 (HASTE, Wang et al. 2025); unset: never."""

    def is_on(self, step: int) -> bool:
        """Whether the step after `step` finished ones has this loss, and so needs features."""
        return self.stop_step is None or step < self.stop_step


@dataclass(frozen=True)
class Guidance:
    """uncond + scale (cond - uncond) at timesteps low ... high, and cond elsewhere."""

    scale: float
    low: float = 0.0
    high: float = 999.0

    def applies_at(self, timestep: SupportsFloat) -> bool:
        """Whether the guided prediction at this timestep depends on the unconditional one.

        Flows count to 1000, their pure noise, which belongs to every interval that reaches 999.
        Reading a timestep from a GPU makes the host wait for the device. It is therefore read only
        if the interval of guidance is narrower than all timesteps. It is rounded, because that of a
        flow is 1000 times a float32, such as 599.99994 for 600.
        """
        everywhere = self.low <= 0.0 and self.high >= 999.0
        return self.scale != 1.0 and (
            everywhere or self.low <= min(round(float(timestep), 3), 999.0) <= self.high
        )


Timestep = Annotated[float, Rule("from 0 to 999", lambda value: 0 <= value <= 999)]


@record
class SolverConfig:
    """Settings that decide the latents of an image, given weights, condition and position."""

    solver: SolverName = "dpm_solver_pp"
    """Deterministic ODE solver: DPM-Solver++ of order 2 (multistep) or Euler; for epsilon and v
    also U-ViT's "fast" DPM-Solver++ of order 3 (singlestep), DDIM and UniPC; for flow also Heun."""
    num_steps: Annotated[int, Rule("from 2 to 999", lambda value: 2 <= value <= 999)] = 50
    """Function evaluations (NFE) per image, at most. A guided evaluation of both halves counts as
    one; Heun takes an odd number."""
    guidance_scale: float = 2.0
    """w in uncond + w (cond - uncond); 1 turns guidance off. The scale s that the paper and U-ViT
    print is w - 1."""
    guidance_low: Timestep = 0.0
    """Apply guidance only at timesteps of at least this (0 … 999, 0 is clean). A narrower interval
    is cheaper and gives less saturated images (Kynkäänniemi et al. 2024)."""
    guidance_high: Timestep = 999.0
    """Apply guidance only at timesteps of at most this."""
    shift: Shift | None = None
    """Spacing of a flow's steps, as `objective.shift` of its training; unset: that shift."""
    precision: Precision = "fp32"
    """Matrix products of the backbone: tf32 rounds those of float32 weights, on GPUs that can;
    bf16 and fp16 round the weights, too. Guidance, solver and autoencoder stay in float32."""
    seed: int = 0
    """The initial noise of an image is a function of this seed and the image's position."""

    def __post_init__(self) -> None:
        """Raise UserError for an interval of guidance that is empty."""
        if self.guidance_low > self.guidance_high:
            raise UserError(
                f"guidance_low {self.guidance_low} is above guidance_high {self.guidance_high}"
            )

    @property
    def guidance(self) -> Guidance:
        """The three guidance fields as one record."""
        return Guidance(scale=self.guidance_scale, low=self.guidance_low, high=self.guidance_high)
