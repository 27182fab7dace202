"""Settings of the two methods that align images with their captions; imports no torch."""

from dataclasses import dataclass
from typing import Literal

Mass = Literal["preserve", "free"]
MethodName = Literal["plain", "date", "regulate", "both"]


@dataclass(frozen=True, kw_only=True)
class DateConfig:
    """Diffusion Adaptive Text Embedding (Na et al. 2025), by its released defaults."""

    clip: str | None = None
    """CLIP model whose score rises; unset: the one whose text tower encodes the prompts."""

    clip_weight: float = 1.0
    """Weight of the CLIP score in what rises; 0 leaves it out."""

    image_reward: str = "zai-org/ImageReward"
    """Folder or hub repository of ImageReward.pt and med_config.json; read when it has a weight."""

    image_reward_weight: float = 0.0
    """Weight of ImageReward in what rises; 0 leaves it out."""

    radius: float = 0.5
    """Length rho of every update, in the space of the text encoder's output."""

    every: int = 10
    """Update before the evaluations 0, every, 2 every, … of the backbone; a solver that takes
    three to a step has them moved to the start of its next step."""

    evaluations: tuple[int, ...] | None = None
    """Instead of `every`: the evaluations to update before, counted from 0."""

    start: Literal["latest", "original"] = "latest"
    """Embedding that each update starts from; `original` never leaves the ball of radius rho."""

    def __post_init__(self) -> None:
        """Refuse a frequency or a radius without meaning, and nothing to raise."""
        if self.every < 1:
            raise ValueError(f"date.every {self.every} is less than 1")
        if self.radius < 0:
            raise ValueError(f"date.radius {self.radius} is negative")
        if not (self.clip_weight or self.image_reward_weight):
            raise ValueError("date.clip_weight and date.image_reward_weight: at least one not 0")


@dataclass(frozen=True, kw_only=True)
class RegulationConfig:
    """Attention regulation (Zhang et al. 2024)."""

    targets: str | None = None
    """Words of the prompt to regulate, as in "bag apple"; unset: its nouns and numerals."""

    mass: Mass = "preserve"
    """Keep the attention that each image token pays to the text as a whole, or let it grow."""

    share_of_steps: float = 0.5
    """Regulate this first share of the evaluations of the backbone."""

    blocks: tuple[int, ...] | None = None
    """Fused blocks to regulate, counted from 0 on the way in; unset: the middle five."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.share_of_steps <= 1:
            raise ValueError(
                f"regulation.share_of_steps {self.share_of_steps} is not between 0 and 1"
            )
