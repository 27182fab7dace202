"""Features of images by frozen networks (CLIP, Inception), gathered over processes.

`references` embeds real images with these functions, `measure` the generated samples.
Shapes: N, n images, F features, B batch, H, W image.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from ifvit import storage
from ifvit.distributed import ProcessGroup
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.inception import IMAGE_SIZE, Inception
from ifvit.evaluation.metrics import (
    KID_SUBSET,
    KID_SUBSETS,
    Features,
    FeatureStatistics,
    RunningStatistics,
)
from ifvit.images import Pixels, to_model_range
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.records import shorten
from ifvit.shards.format import EncoderIdentity

CLIP, INCEPTION = "clip", "inception"
"""Names of the networks."""

ORIGINAL = "inception-2015-12-05"
"""The network of FID's authors for TensorFlow, converted to TorchScript by NVIDIA."""
_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{ORIGINAL}.pt"
_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

NUM_KEPT = {CLIP: 30_000, INCEPTION: KID_SUBSET * KID_SUBSETS}
"""Features that the kernel distances CMMD and KID need, at most."""
_SEED = 0

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Statistics of the features of all images, and the features `part` (n, F) of n of them."""

    statistics: FeatureStatistics
    part: Features


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A frozen network; `embed` turns images (B, 3, H, W) in [-1, 1] into features (B, F)."""

    embed: Callable[[Tensor], Tensor]
    identity: EncoderIdentity


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a protocol by name, on one device; `clip` also embeds texts."""

    clip: ClipScorer
    features: Mapping[str, FeatureNetwork]
    device: str


def load_networks(protocol: ProtocolConfig, device: str) -> Networks:
    """Load CLIP and, if the protocol names it, Inception. Raises UserError if one does not load."""
    clip = load_clip(protocol.clip, device)
    features = {CLIP: FeatureNetwork(embed=clip.embed_images, identity=clip.identity)}
    if protocol.inception:
        features[INCEPTION] = load_inception(protocol.inception, device)
    return Networks(clip=clip, features=features, device=device)


def load_inception(name: str, device: str = "cpu") -> FeatureNetwork:
    """Load `inception-2015-12-05`, which is downloaded once, its file, or a safetensors file.

    Its features are those of the last pooling layer, (B, 2048) for the original network. A
    TorchScript file is code, so only the published one is loaded, known by its sha256. Raises
    UserError if the file is missing, damaged or another, or cannot be downloaded.
    """
    path = _download() if name == ORIGINAL else Path(name)
    data = storage.read_bytes(str(path))
    digest = hashlib.sha256(data).hexdigest()
    network: Callable[[Tensor], Tensor]
    if digest == _SHA256:
        original = torch.jit.load(io.BytesIO(data), map_location=device).eval()  # type: ignore[no-untyped-call]
        network = partial(original, return_features=True)
    elif path.suffix == ".safetensors":
        try:
            network = Inception(safetensors.torch.load(data), device)
        except (SafetensorError, UserError) as error:
            raise UserError(
                f"inception {name}: not the tensors of Inception v3 ({shorten(error)})"
            ) from None
    else:
        raise UserError(
            f"inception {path}: damaged or another network, its sha256 is not {_SHA256}; give "
            f"{ORIGINAL}, its file, or the tensors of pytorch-fid's network as .safetensors"
        )
    identity = EncoderIdentity(name=name, sha256=digest)
    return FeatureNetwork(embed=partial(_embed_by_inception, network), identity=identity)


def _embed_by_inception(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] => (B, F); the network itself takes values in [0, 255].

    Images are resized to 299 x 299 as pytorch-fid does it: bilinear, without antialiasing,
    before any rounding.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    return network((resized + 1.0) * 127.5)


def _download() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", f"{ORIGINAL}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_URL, str(path), hash_prefix=_SHA256)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"inception {ORIGINAL}: cannot be downloaded ({error}); fetch {_URL} to {path}"
            ) from None
    return path


def choose_parts(total: int) -> dict[str, Positions]:
    """Choose whose features are kept: network => positions among `total`, in random order."""
    order = np.random.default_rng(_SEED).permutation(total)
    return {name: order[:limit] for name, limit in NUM_KEPT.items()}


@torch.no_grad()
def collect_features(
    networks: Networks,
    batches: Iterable[Pixels],
    positions: Sequence[int],
    parts: Mapping[str, Positions],
    group: ProcessGroup,
) -> dict[str, FeatureSet]:
    """Embed the images of all processes by every network; all processes get the result.

    `batches` uint8 (B, H, W, 3) hold this process's images, `positions` their positions among all
    images. The features at the positions `parts[name]` are kept, in that order. Raises UserError
    for features that are not finite, which would make every metric meaningless.
    """
    running = {name: RunningStatistics() for name in networks.features}
    kept: dict[str, list[tuple[Positions, Features]]] = {name: [] for name in running}
    start = 0
    for pixels in batches:
        images = to_model_range(pixels, networks.device)
        batch = np.array(positions[start : start + len(pixels)])
        start += len(pixels)
        for name, network in networks.features.items():
            features = network.embed(images).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"{name}: features are not finite; its weights are damaged")
            running[name].add(features)
            is_kept = np.isin(batch, parts[name])
            kept[name].append((batch[is_kept], features[is_kept]))
    return {name: _gather(running[name], kept[name], parts[name], group) for name in running}


def _gather(
    running: RunningStatistics,
    kept: list[tuple[Positions, Features]],
    part: Positions,
    group: ProcessGroup,
) -> FeatureSet:
    """The feature set of the statistics and the kept features of all processes."""
    gathered = group.gather((running, kept))
    total = RunningStatistics()
    for one, _ in gathered:
        total.merge(one)
    blocks = [block for _, blocks in gathered for block in blocks]
    row_of = {position: row for row, position in enumerate(part.tolist())}
    ordered = np.empty((len(part), blocks[0][1].shape[1]), np.float32)
    for positions, features in blocks:
        ordered[[row_of[position] for position in positions.tolist()]] = features
    return FeatureSet(statistics=total.finish(), part=ordered)
