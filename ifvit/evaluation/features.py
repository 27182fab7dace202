"""Features of images by frozen networks (CLIP, Inception), gathered over processes.

Shapes: N, n images, F features, B batch, H, W image.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ifvit import storage
from ifvit.distributed import ProcessGroup
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.metrics import KID_SUBSET, KID_SUBSETS, Features, FeatureStatistics
from ifvit.images import Pixels, to_model_range
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.models.pretrained import reading
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
        with reading(f"inception {name}: not the tensors of Inception v3"):
            network = Inception(safetensors.torch.load(data), device)
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
    size = (_IMAGE_SIZE, _IMAGE_SIZE)
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
    statistics: dict[str, FeatureStatistics] = {}
    kept: dict[str, list[tuple[Positions, Features]]] = {name: [] for name in networks.features}
    remaining = iter(positions)
    for pixels in batches:
        images = to_model_range(pixels, networks.device)
        batch = np.array([next(remaining) for _ in pixels])
        for name, network in networks.features.items():
            features = network.embed(images).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"{name}: features are not finite; its weights are damaged")
            found = FeatureStatistics.of(features)
            statistics[name] = statistics[name].merge(found) if name in statistics else found
            is_kept = np.isin(batch, parts[name])
            kept[name].append((batch[is_kept], features[is_kept]))
    return {
        name: _gather(group.gather((statistics.get(name), blocks)), parts[name])
        for name, blocks in kept.items()
    }


def _gather(
    gathered: Sequence[tuple[FeatureStatistics | None, list[tuple[Positions, Features]]]],
    part: Positions,
) -> FeatureSet:
    """The feature set of the statistics and the kept features of all processes."""
    blocks = [block for _, blocks in gathered for block in blocks]
    rows = np.empty(part.max() + 1, np.int64)
    rows[part] = np.arange(len(part))
    ordered = np.empty((len(part), blocks[0][1].shape[1]), np.float32)
    for positions, features in blocks:
        ordered[rows[positions]] = features
    found = [statistics for statistics, _ in gathered if statistics]
    return FeatureSet(statistics=reduce(FeatureStatistics.merge, found), part=ordered)


_IMAGE_SIZE = 299
"""Pixels of the images that Inception reads."""
_EPSILON = 1e-3
"""Constant that batch normalisation adds to the variance."""

# A block is a row of branches whose outputs are concatenated. A branch is a row of steps: names of
# convolutions (`+`: two of them side by side, `/2`: stride 2 without padding) and poolings.
_A = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "average _pool")
_B = ("3x3/2", "3x3dbl_1 3x3dbl_2 3x3dbl_3/2", "max/2")
_C = ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "average _pool")
_D = ("3x3_1 3x3_2/2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/2", "max/2")
_E = ("1x1", "3x3_1 3x3_2a+3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b")
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    "Mixed_7b": (*_E, "average _pool"),
    "Mixed_7c": (*_E, "max _pool"),  # as in the network of FID, unlike torchvision's
}


class Inception:
    """Inception v3 up to its last average pooling, built from its tensors alone.

    Names of tensors are those of pytorch-fid's file `pt_inception-2015-12-05-6726825d.pth` and of
    torchvision's Inception v3. Widths are those of the tensors. C channels.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        """Raises KeyError, IndexError or RuntimeError unless `tensors` are those of the network."""
        self._tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
        self(torch.zeros(1, 3, _IMAGE_SIZE, _IMAGE_SIZE, device="meta"))
        self._tensors = {name: tensor.float().to(device) for name, tensor in tensors.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, 299, 299) in [0, 255] => features (B, C)."""
        x = self._convolve("Conv2d_1a_3x3", (images - 128) / 128, stride=2)
        x = self._convolve("Conv2d_2a_3x3", x, is_padded=False)
        x = self._convolve("Conv2d_2b_3x3", x)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self._convolve("Conv2d_3b_1x1", x)
        x = self._convolve("Conv2d_4a_3x3", x, is_padded=False)
        x = functional.max_pool2d(x, 3, stride=2)
        for name, branches in _BLOCKS.items():
            x = torch.cat([self._follow(f"{name}.branch", branch, x) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))

    def _follow(self, prefix: str, branch: str, x: Tensor) -> Tensor:
        for step in branch.split():
            if step == "average":
                x = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "max":
                x = functional.max_pool2d(x, 3, stride=1, padding=1)
            elif step == "max/2":
                x = functional.max_pool2d(x, 3, stride=2)
            elif step.endswith("/2"):
                x = self._convolve(prefix + step.removesuffix("/2"), x, stride=2)
            else:
                x = torch.cat([self._convolve(prefix + name, x) for name in step.split("+")], dim=1)
        return x

    def _convolve(
        self, name: str, x: Tensor, *, stride: int = 1, is_padded: bool | None = None
    ) -> Tensor:
        """Convolution without bias, batch norm and ReLU; padding keeps the size at stride 1."""
        weight = self._tensors[f"{name}.conv.weight"]
        is_padded = stride == 1 if is_padded is None else is_padded
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if is_padded else (0, 0)
        mean, variance, scale, shift = (
            self._tensors[f"{name}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = functional.conv2d(x, weight, stride=stride, padding=padding)
        return functional.batch_norm(x, mean, variance, scale, shift, eps=_EPSILON).relu()
