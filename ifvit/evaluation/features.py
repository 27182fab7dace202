"""Features of images: the frozen networks, and what is kept of many images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ifvit import storage
from ifvit.distributed import ProcessGroup
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.metrics import (
    KID_SUBSET,
    KID_SUBSETS,
    FeatureNetwork,
    Features,
    FeatureStatistics,
    RunningStatistics,
)
from ifvit.images import Pixels, to_model_range
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.shards import EncoderIdentity

ORIGINAL = "inception-2015-12-05"
"""Name of TensorFlow's network of FID's authors, converted by NVIDIA."""
_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{ORIGINAL}.pt"
_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INPUT_SIZE = 299


class Inception:
    """Images => features of the last pooling, (B, 2048) for the original network."""

    def __init__(self, network: torch.jit.ScriptModule, identity: EncoderIdentity) -> None:
        self._network = network
        self.identity = identity

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, F).

        Resized as pytorch-fid does it: bilinear, without antialiasing, before any rounding.
        """
        size = (_INPUT_SIZE, _INPUT_SIZE)
        resized = functional.interpolate(images, size, mode="bilinear", align_corners=False)
        features: Tensor = self._network((resized + 1.0) * 127.5, return_features=True)
        return features


def load_inception(name: str, device: str = "cpu") -> Inception:
    """Open a TorchScript file, or `inception-2015-12-05`, which is downloaded once and checked.

    It is called with images (B, 3, 299, 299) in [0, 255] and `return_features=True`.
    Raises UserError for a file that is none or cannot be fetched.
    """
    path = _find(name)
    try:
        network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"inception {name}: not a TorchScript file ({reason})") from None
    digest = storage.sha256_of(path)
    if name == ORIGINAL and digest != _SHA256:
        raise UserError(f"{path}: damaged, its sha256 is not {_SHA256}; delete it")
    return Inception(network, EncoderIdentity(name=name, sha256=digest))


def _find(name: str) -> Path:
    if name != ORIGINAL:
        if not Path(name).is_file():
            raise UserError(f"inception {name}: no such file; name one or use {ORIGINAL}")
        return Path(name)
    path = Path(torch.hub.get_dir(), "checkpoints", f"{ORIGINAL}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_URL, str(path), hash_prefix=_SHA256)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"inception {name}: cannot be downloaded ({error}); fetch {_URL} to {path}"
            ) from None
    return path


Positions = NDArray[np.int64]
Item = TypeVar("Item")

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Moments of all features, and `part` (n, F) float32 of them."""

    statistics: FeatureStatistics
    part: Features


def random_part(total: int, limit: int) -> Positions:
    """At most `limit` of the positions 0 ... total - 1, in random order, always the same."""
    return np.random.default_rng(_SEED).permutation(total)[:limit]


@torch.no_grad()
def collect_features(
    networks: Mapping[str, FeatureNetwork],
    batches: Iterable[Pixels],
    positions: Sequence[int],
    parts: Mapping[str, Positions],
    device: str,
    channel: ProcessGroup,
) -> dict[str, FeatureSet]:
    """Features by every network of the images of all processes, on all of them.

    `batches` uint8 (B, H, W, 3) are this process's images, `positions` where they stand among all.
    Of network `name` the features of the positions `parts[name]` are kept, in that order.
    Raises UserError for features that are not finite, which make every number meaningless.
    """
    collectors = {name: _Collector(parts[name]) for name in networks}
    start = 0
    for pixels in batches:
        images = to_model_range(pixels, device)
        for name, network in networks.items():
            features = network(images).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"{name}: features are not finite; its weights are damaged")
            collectors[name].add(positions[start : start + len(pixels)], features)
        start += len(pixels)
    return {name: collector.finish(channel) for name, collector in collectors.items()}


class _Collector:
    """Takes the features of one network, batch by batch."""

    def __init__(self, part: Positions) -> None:
        self._running = RunningStatistics()
        self._place = {position: place for place, position in enumerate(part.tolist())}
        self._places: list[int] = []
        self._kept: list[Features] = []

    def add(self, positions: Sequence[int], features: Features) -> None:
        """Features (B, F) of the images at `positions`."""
        self._running.add(features)
        rows = [row for row, position in enumerate(positions) if position in self._place]
        self._places += [self._place[positions[row]] for row in rows]
        self._kept.append(features[rows])

    def finish(self, channel: ProcessGroup) -> FeatureSet:
        """What all processes have taken."""
        gathered = channel.gather((self._running, self._places, self._kept))
        whole = RunningStatistics()
        for running, _, _ in gathered:
            whole.merge(running)
        kept = [rows for _, _, pieces in gathered for rows in pieces]
        part = np.empty((len(self._place), kept[0].shape[1]), np.float32)
        start, places = 0, [place for _, numbers, _ in gathered for place in numbers]
        for rows in kept:
            part[places[start : start + len(rows)]] = rows
            start += len(rows)
        return FeatureSet(statistics=whole.finish(), part=part)


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
