"""The frozen networks whose features are compared."""

from collections.abc import Mapping
from dataclasses import dataclass

from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.feature_sets import Positions, random_part
from ifvit.evaluation.frechet import FeatureNetwork
from ifvit.evaluation.inception import load_inception
from ifvit.evaluation.kernel_distances import KID_SUBSET, KID_SUBSETS
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.shards import EncoderIdentity

CLIP, INCEPTION = "clip", "inception"
_KEPT = {CLIP: 30_000, INCEPTION: KID_SUBSET * KID_SUBSETS}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """CLIP and, where FID and KID are wanted, Inception, on one device."""

    clip: ClipScorer
    functions: Mapping[str, FeatureNetwork]
    """Images => features, by name."""
    identities: Mapping[str, EncoderIdentity]
    """By the same names."""
    device: str


def load_networks(protocol: ProtocolConfig, device: str) -> Networks:
    """Raises UserError for a network that does not load."""
    clip = load_clip(protocol.clip, device)
    functions: dict[str, FeatureNetwork] = {CLIP: clip.embed_images}
    identities = {CLIP: clip.identity}
    if protocol.inception:
        inception = load_inception(protocol.inception, device)
        functions[INCEPTION], identities[INCEPTION] = inception, inception.identity
    return Networks(clip=clip, functions=functions, identities=identities, device=device)


def kept_parts(total: int) -> dict[str, Positions]:
    """Which features of `total` images the kernel distances need."""
    return {name: random_part(total, limit) for name, limit in _KEPT.items()}
