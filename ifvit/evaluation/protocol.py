"""How numbers were made: two rows of metrics compare only if this is the same for both."""

from dataclasses import dataclass
from typing import Any

from ifvit.sampling.config import flatten_settings

_LABELS = {"name", "features", "inception"}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was drawn and how it was measured, stored with every number.

    Names are labels; all else decides the numbers. Hashes are SHA-256.
    """

    name: str
    num_samples: int
    prompts_sha256: str
    """Of image id and drawn caption of every sample, in order."""
    caption_rule: str
    """Which of an image's captions is drawn: `first` or `random` (of seed and position)."""
    score_caption: str
    """Which one the image is scored against: the `same`, or the `first` of the image."""
    sampling: dict[str, Any]
    """`SamplingConfig.settings`."""
    image_size: int
    resize: str
    """How real images became square."""
    features: str
    """CLIP of all numbers but FID and KID."""
    features_sha256: str
    paper_prefix: str
    inception: str | None
    """Inception of FID and KID; None: neither was measured."""
    inception_sha256: str | None
    num_reference_images: int | None
    reference_sha256: str | None
    """Of the real images' files, their order and their resize; None: no distance was measured."""

    @property
    def facts(self) -> dict[str, Any]:
        """All of it by name, the settings of sampling among the rest."""
        return flatten_settings(vars(self))

    @property
    def guidance_scale(self) -> float:
        """Of sampling."""
        scale: float = self.sampling["guidance_scale"]
        return scale


def differences(first: Protocol, second: Protocol) -> list[str]:
    """What keeps numbers of the two from being compared, in words; empty when nothing does."""
    one, other = first.facts, second.facts
    pairs = {name: (one.get(name), other.get(name)) for name in one | other}
    return [
        f"{describe_field(name)} {describe_value(name, a)} against {describe_value(name, b)}"
        for name, (a, b) in pairs.items()
        if a != b and name not in _LABELS
    ]


def describe_field(name: str) -> str:
    """`guidance_scale` => `guidance scale`, `prompts_sha256` => `prompts hash`."""
    return name.replace("_", " ").replace("sha256", "hash")


def describe_value(name: str, value: object) -> str:
    """The value as text, hashes shortened to 12 digits."""
    if value is None:
        return "none"
    return str(value)[:12] if name.endswith("sha256") else str(value)
