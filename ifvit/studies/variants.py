"""Runs => the settings that the paper compares: seeds of one backbone stand together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ifvit.errors import UserError
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.runs import FUSIONS, Run
from ifvit.models.config import Conditioning, FusionUViTConfig

_T_975 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)
"""97.5 % points of Student's t for 1, 2, … degrees of freedom."""
_NORMAL_975 = 1.96


@dataclass(frozen=True, order=True)
class Setting:
    """A row of the paper's tables; early fusion has neither kind of block, intermediate both."""

    conditioning: Conditioning
    image_blocks: bool
    text_blocks: bool

    @property
    def fusion(self) -> str:
        """In the paper's words; a half of intermediate fusion is named by what it has."""
        return FUSIONS[self.image_blocks, self.text_blocks]

    @property
    def is_early(self) -> bool:
        """Whether it is the one that others are compared with."""
        return not (self.image_blocks or self.text_blocks)

    @property
    def path(self) -> str:
        """How fused blocks see text."""
        return self.conditioning.replace("_", "-")

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.path}, {self.fusion}".capitalize()

    @property
    def slug(self) -> str:
        """For files and flags."""
        return f"{self.conditioning}_{self.fusion}".replace(" ", "_")


PAPER_SETTINGS = (
    Setting("concat", False, False),
    Setting("concat", True, True),
    Setting("cross_attention", False, False),
    Setting("cross_attention", True, True),
)
"""The rows of Table 1 from top to bottom; the first is the paper's baseline."""
SETTINGS = (
    *PAPER_SETTINGS,
    Setting("cross_attention", True, False),
    Setting("cross_attention", False, True),
    Setting("concat", True, False),
    Setting("concat", False, True),
)


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """Mean of a number over a setting's runs.

    `seed_error` is the standard error s / sqrt(k) over k runs, None for one run; `sample_error`
    the mean standard error of one run over its samples. All runs draw the same captions, so the
    former contains the noise of training and not that of other captions.
    """

    values: tuple[float, ...]
    seed_error: float | None
    sample_error: float
    num_samples: int

    @property
    def value(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """Over seeds where there are several, else over samples."""
        return self.sample_error if self.seed_error is None else self.seed_error

    def as_estimate(self, lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
        """With the 95 % interval that belongs to `error`, as far as such values exist."""
        freedom = len(self.values) - 1
        half = (_t_975(freedom) if freedom else _NORMAL_975) * self.error
        return Estimate(
            value=self.value,
            standard_error=self.error,
            num_samples=self.num_samples,
            low=max(lowest, self.value - half),
            high=min(highest, self.value + half),
        )


def group_runs(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Settings in the paper's order, each with its runs in the given order.

    Raises UserError for a run without weights, one of another kind of backbone, and for two shapes
    that are the same setting.
    """
    groups: dict[Setting, list[Run]] = {setting: [] for setting in SETTINGS}
    for run in runs:
        groups[setting_of(shape_of(run))].append(run)
    for setting, members in groups.items():
        # How the weights began is not what they are.
        if len({replace(shape_of(run), init_std=1.0) for run in members}) > 1:
            names = ", ".join(run.url for run in members)
            raise UserError(f"{names}: {setting.title} in two shapes; give one sheet to each")
    return {setting: members for setting, members in groups.items() if members}


def shape_of(run: Run) -> FusionUViTConfig:
    """The run's backbone. Raises UserError if it is none of the paper's kinds."""
    shape = run.backbone
    if not isinstance(shape, FusionUViTConfig) or shape.is_modulated:
        raise UserError(
            f"{run.url}/weights: no backbone that fuses by concat or cross_attention alone, so "
            "none of the paper's settings; leave this run out"
        )
    return shape


def setting_of(backbone: FusionUViTConfig) -> Setting:
    """The setting that a backbone is."""
    return Setting(
        backbone.conditioning, backbone.num_image_blocks > 0, backbone.num_text_blocks > 0
    )


def mean_over_seeds(estimates: Sequence[Estimate]) -> SeedMean:
    """The mean of one estimate or more."""
    values = [estimate.value for estimate in estimates]
    several = len(values) > 1
    return SeedMean(
        values=tuple(values),
        seed_error=float(np.std(values, ddof=1)) / math.sqrt(len(values)) if several else None,
        sample_error=sum(estimate.standard_error for estimate in estimates) / len(values),
        num_samples=min(estimate.num_samples for estimate in estimates),
    )


def noise_between(first: SeedMean, second: SeedMean) -> float:
    """Half the 95 % interval of the difference of two means.

    Welch's interval over seeds; over samples where either setting has one run, which leaves out
    what another seed would change, or where no run differs from another of its setting.
    """
    errors = first.seed_error, second.seed_error
    if None in errors or not any(errors):
        return _NORMAL_975 * math.hypot(first.sample_error, second.sample_error)
    shares = [(error or 0.0) ** 2 for error in errors]
    freedoms = [len(mean.values) - 1 for mean in (first, second)]
    parts = sum(share**2 / freedom for share, freedom in zip(shares, freedoms, strict=True))
    freedom = math.floor(sum(shares) ** 2 / parts + 1e-9)
    return _t_975(freedom) * math.sqrt(sum(shares))


def _t_975(freedom: int) -> float:
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    # The first term of the quantile's expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).
    return _NORMAL_975 * (1 + (_NORMAL_975**2 + 1) / (4 * freedom))
