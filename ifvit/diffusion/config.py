"""Settings that turn noise into latents: solver, guidance and seed. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal, SupportsFloat

from ifvit.errors import UserError
from ifvit.records import Rule, record

SolverName = Literal["dpm_solver_pp", "dpm_solver_pp_fast", "ddim", "euler", "unipc"]


@dataclass(frozen=True)
class Guidance:
    """eps_uncond + scale (eps_cond - eps_uncond) at timesteps low ... high, eps_cond elsewhere."""

    scale: float
    low: float = 0.0
    high: float = 999.0

    def applies_at(self, timestep: SupportsFloat) -> bool:
        """Whether the guided noise at this timestep (0 ... 999) depends on eps_uncond.

        Reading a timestep from a GPU makes the host wait for the device. It is therefore read only
        if the interval of guidance is narrower than all timesteps.
        """
        everywhere = self.low <= 0.0 and self.high >= 999.0
        return self.scale != 1.0 and (everywhere or self.low <= float(timestep) <= self.high)


Timestep = Annotated[float, Rule("from 0 to 999", lambda value: 0 <= value <= 999)]


@record
class SolverConfig:
    """Settings that decide the latents of an image, given weights, condition and position."""

    solver: SolverName = "dpm_solver_pp"
    """Deterministic ODE solver: DPM-Solver++ of order 2 (multistep), U-ViT's "fast" DPM-Solver++ of
    order 3 (singlestep), DDIM, Euler or UniPC."""
    num_steps: Annotated[int, Rule("from 2 to 999", lambda value: 2 <= value <= 999)] = 50
    """Function evaluations (NFE) per image. A guided evaluation of both halves counts as one."""
    guidance_scale: float = 2.0
    """w in eps = eps_uncond + w (eps_cond - eps_uncond); 1 turns guidance off. The scale s that
    the paper and U-ViT print is w - 1."""
    guidance_low: Timestep = 0.0
    """Apply guidance only at timesteps of at least this (0 … 999, 0 is clean). A narrower interval
    is cheaper and gives less saturated images (Kynkäänniemi et al. 2024)."""
    guidance_high: Timestep = 999.0
    """Apply guidance only at timesteps of at most this."""
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
